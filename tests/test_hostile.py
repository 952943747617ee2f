"""What is a property of common/ is tested here, on a folder whose runs are one process and on one that offers torchrun:
full disks, closed streams, signals, edited records, damaged checkpoints, FIFOs, and the flags of resuming.

Each ends in success or in one line, and what was there before is unharmed.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import ROOT, failure, load, one_line, quick, run, start, train
from helpers import metrics, mutations, same_weights
from processes import pause_at, signal_at

two_folders = pytest.mark.parametrize("folder", ["cifar", "nanogpt"])
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX: signals and shell redirections")


def steps_between_rows(finished, folder):
    """(the first, the last) backward pass between the first and the last row of the metrics of a quick run."""
    first, *_, last = json.loads((finished(folder).parent / "steps.json").read_text())
    return first + 1, last


# --------------------------------------------------------------------------------------------------------- run folders


@two_folders
def test_output_below_a_regular_file(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, message = failure(train, folder, *quick(folder), "--out", tmp_path / "file" / "run")
    assert code == 1 and one_line(message) and "file" in message
    assert (tmp_path / "file").read_text() == "in the way"


@two_folders
def test_a_folder_that_holds_a_run_is_refused(folder, copied):
    out = copied(folder)
    before = (out / "run.json").read_bytes()
    code, message = failure(train, folder, *quick(folder), "--out", out)
    assert code == 1 and one_line(message) and str(out) in message
    assert (out / "run.json").read_bytes() == before


@two_folders
def test_the_default_run_folder_is_the_first_free_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for _ in range(2):
        train(folder, *quick(folder))
    names = sorted(f.name for f in (tmp_path / "out" / folder).iterdir())
    assert len(names) == 2 and names[0].endswith("-s3-1") and names[1].endswith("-s3-2")
    assert run.newest_run(folder).name == names[1]


@two_folders
def test_a_newer_run_that_was_interrupted_is_named_with_its_command(folder, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "out" / folder
    for i, (name, state) in enumerate({"a": "done", "b": "interrupted", "c": "failed", "d": "running"}.items()):
        shutil.copytree(finished(folder), place / name)
        record = json.loads((place / name / "run.json").read_text())
        (place / name / "run.json").write_text(json.dumps(record | {"state": state}))
        os.utime(place / name / "run.json", (1e9 + i, 1e9 + i))
    script = Path(folder, "train.py")
    for name in "db":  # the newest, and after it is gone the one before
        assert run.newest_run(folder).name == "a"
        message = f"{Path('out', folder, name)} has not finished; to continue it: python {script} --resume "
        assert capsys.readouterr().err == f"{message}{Path('out', folder, name)}\n"
        shutil.rmtree(place / name)
    assert run.newest_run(folder).name == "a" and not capsys.readouterr().err


@two_folders
def test_a_second_process_in_the_same_folder(folder, copied):
    out = copied(folder)
    lock = run.lock_folder(out)
    code, message = failure(train, folder, "--resume", out)
    assert code == 1 and one_line(message) and f"process {os.getpid()} on {socket.gethostname()}" in message
    lock.release()
    train(folder, "--resume", out)  # the lock of a process that is gone is not in the way


# ---------------------------------------------------------------------------------------------------------- resuming


@two_folders
def test_resume_auto_starts_or_continues(folder, tmp_path, finished, refused):
    command = [*quick(folder), "--out", str(tmp_path / "run"), "--resume", "auto"]
    train(folder, *command)
    (tmp_path / "run" / "last.pt").unlink()  # as if it had been killed before its first checkpoint
    train(folder, *command)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed"] == 1
    assert metrics(tmp_path / "run") == metrics(finished(folder)) and same_weights(tmp_path / "run", finished(folder))
    line = refused(load(folder).parse, *command[:-4], "--seed", "5", *command[-4:])
    assert "--seed 5" in line, "it is the run of another command"


@two_folders
def test_tensorboard_shows_the_metrics_once(folder, tmp_path):
    """The event files hold every row of metrics.csv, and after a resume no step stands twice."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    train(folder, *quick(folder), "--tensorboard", "--out", out)
    (out / "last.pt").unlink()  # as if it had been killed before its first checkpoint
    train(folder, "--resume", out)
    assert len(list(out.glob("events.out.tfevents.*"))) == 2
    events = accumulator.EventAccumulator(str(out)).Reload()
    rows = metrics(out)
    x = next(iter(rows[0]))
    points = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert points == [(int(row[x]), pytest.approx(float(row["train_loss"]), rel=1e-5)) for row in rows]


@two_folders
def test_tensorboard_that_is_not_installed(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, message = failure(train, folder, *quick(folder), "--tensorboard", "--out", tmp_path / "other")
    assert code == 1 and one_line(message) and "pip install tensorboard" in message


@two_folders
def test_resume_with_another_flag_names_it(folder, copied, refused):
    assert "--seed 99" in refused(load(folder).parse, "--resume", copied(folder), "--seed", "99")


@two_folders
def test_resume_of_another_experiment(folder, copied, refused):
    file = copied(folder) / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"experiment": "another"}))
    assert "run of another/" in refused(load(folder).parse, "--resume", file.parent)


@two_folders
def test_resume_of_a_run_of_an_older_version_names_the_commit(folder, copied, refused):
    file = copied(folder) / "run.json"
    record = json.loads(file.read_text())
    del record["format"]
    file.write_text(json.dumps(record | {"git": {"commit": "c0ffee", "dirty": False}}))
    assert "commit c0ffee" in refused(load(folder).parse, "--resume", file.parent)


@two_folders
def test_resume_of_nothing(folder, tmp_path, refused):
    assert "nothing" in refused(load(folder).parse, "--resume", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@two_folders
def test_a_resumed_run_keeps_the_commit_it_began_with(folder, copied):
    """Committing the changes of a run before it is resumed does not make its record clean."""
    file = copied(folder) / "run.json"
    record = json.loads(file.read_text())
    if record["git"] is None:
        pytest.skip("there is no git here")
    file.write_text(json.dumps(record | {"git": record["git"] | {"dirty": True}}))
    assert train(folder, "--resume", file.parent)["git"] == record["git"] | {"dirty": True}


# --------------------------------------------------------------------------------------------- killed, stopped, full


@posix
@two_folders
def test_interrupted_three_times_is_as_if_nothing_happened(folder, finished, tmp_path):
    """Killed while a checkpoint is written, killed after a row of the metrics, and told to stop: then the same weights,
    bit for bit, and the same metrics."""
    out, rows = tmp_path / "broken", len(metrics(finished(folder)))
    events = [
        signal_at("common.run:Run.save", 1, "SIGKILL", before=True),  # of best.pt: nothing is saved yet
        signal_at("common.run:Run.log", rows, "SIGKILL"),  # a row, and not its checkpoint
        signal_at("common.files:os.replace", 2, "SIGKILL", before=True),  # what was to become run.json
        pause_at("torch:Tensor.backward", 1),
    ]
    for i, event in enumerate(events):
        process = start(folder, *([*quick(folder), "--out", out] if i == 0 else ["--resume", out]), events=[event])
        if i == len(events) - 1:
            process.wait_for_pause()
            process.terminate()
            process.go_on()
        _, errors = process.communicate()
        assert process.returncode == (143 if i == len(events) - 1 else -9), errors
    assert "--resume" in errors and "Traceback" not in errors
    assert json.loads((out / "run.json").read_text())["state"] == "interrupted"
    train(folder, "--resume", out)
    assert metrics(out) == metrics(finished(folder)) and same_weights(out, finished(folder))
    assert json.loads((out / "run.json").read_text())["resumed"] == 3, "the third process did not come so far"


@posix
@two_folders
@pytest.mark.parametrize("written", [False, True])
def test_a_second_signal_always_ends_a_run(folder, written, finished, tmp_path):
    """Two signals of one kind in a row: the run ends, as interrupted, whatever it is doing: here, before and after it
    writes how it ended."""
    out, (step, _) = tmp_path / "run", steps_between_rows(finished, folder)
    events = [pause_at("torch:Tensor.backward", step), pause_at("common.run:Run._close", 1, before=not written)]
    process = start(folder, *quick(folder), "--out", out, events=events)
    for i in range(2):
        process.wait_for_pause(i)
        process.terminate()
        process.go_on(i)
    _, errors = process.communicate()
    assert process.returncode == 143 and "Traceback" not in errors
    assert json.loads((out / "run.json").read_text())["state"] == "interrupted"


@two_folders
def test_a_file_size_limit_while_saving(folder, finished, tmp_path):
    """As on a full disk: one line, no half file, and the earlier checkpoint is unharmed."""
    pytest.importorskip("resource", reason="file-size limits are POSIX")
    out, (_, last) = tmp_path / "run", steps_between_rows(finished, folder)
    start(folder, *quick(folder), "--out", out, events=[signal_at("torch:Tensor.backward", last, "SIGKILL")]).wait()
    before = (out / "last.pt").read_bytes()
    process = start(folder, "--resume", out, limits={"RLIMIT_FSIZE": len(before) // 2})
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert sum(line.startswith("error:") for line in errors.splitlines()) == 1
    assert (out / "last.pt").read_bytes() == before and not list(out.glob(".*.tmp"))


def refuses_to_resume(folder, out, capsys):
    """Resume must fail with one line that names the run folder; returns the line."""
    before = {file.name: file.read_bytes() for file in out.glob("*.pt") if file.is_file()}
    capsys.readouterr()
    code, message = failure(train, folder, "--resume", str(out))
    if code == 2:
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[0].startswith("usage:") and sum("error:" in line for line in lines) == 1
        message = "error: " + lines[-1].partition("error: ")[2]
    assert one_line(message) and out.name in message, message
    assert before == {file.name: file.read_bytes() for file in out.glob("*.pt") if file.is_file()}
    return message


# ------------------------------------------------------------------------------------------------- an edited run.json


def edits(record):
    """{what was done: the record afterwards}"""
    args = record["args"]
    wrong = {
        "lr": ["abc", -1, float("nan"), None, [0.1], 1e999],
        "epochs": [None, 0, 2.5, "ten"],
        "iters": [None, 0],
        "bs": [0, -8, None, "x"],
        "model": ["nothing", 3],
        "device": ["tpu", None],
        "precision": ["fp8", 16],
        "recipe": ["none", None],
        "seed": [-1, "x", 2**40],
        "limit": [0, "x"],
        "data": ["nowhere", 5, ""],
    }
    for name, values in wrong.items():
        for value in values if name in args else []:
            yield f"{name} {value}", record | {"args": args | {name: value}}
    for name in args:
        if args[name] is not None:
            yield f"no {name}", record | {"args": {k: v for k, v in args.items() if k != name}}
    yield "an argument more", record | {"args": args | {"colour": "red"}}
    yield "help", record | {"args": args | {"help": True}}
    for name, value in (
        ("args", []),
        ("args", "x"),
        ("experiment", None),
        ("device", {}),
        ("device", {"threads": -1}),
        ("device", {"threads": "many"}),
        ("precision", "fp8"),
        ("wall_s", "long"),
        ("wall_s", 1e300),
        ("git", {"commit": "--output=evil"}),
        ("git", "x"),
        ("dataset", []),
        ("resumed", "x"),
    ):
        yield f"{name} = {value}", record | {name: value}
    yield "no state", {k: v for k, v in record.items() if k != "state"}


@two_folders
def test_an_edited_record_is_refused(folder, copied, capsys):
    out = copied(folder)
    record = json.loads((out / "run.json").read_text())
    for what, edited in edits(record):
        (out / "run.json").write_text(json.dumps(edited))
        message = refuses_to_resume(folder, out, capsys)
        assert len(message) < 600, what


@two_folders
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b'"x"', b"\xff\xfe", b"[" * 200_000, b'{"args": ' * 100_000]
)
def test_a_record_that_is_none(folder, content, copied, capsys):
    out = copied(folder)
    (out / "run.json").write_bytes(content)
    assert "run.json" in refuses_to_resume(folder, out, capsys)


# -------------------------------------------------------------------------------------------- damaged run folders


@two_folders
@pytest.mark.parametrize(
    "content",
    [
        "empty",
        "cut",
        "state dict",
        "list",
        "tensor",
        "no epoch",
        "random state",
        "zip",
        "rows",
        "step",
        "random",
        "folder",
    ],
)
def test_a_damaged_last_checkpoint(folder, content, copied, capsys):
    out = copied(folder)
    file, whole = out / "last.pt", (out / "last.pt").read_bytes()
    state = torch.load(file, weights_only=True)
    if content in ("empty", "cut"):
        file.write_bytes(b"" if content == "empty" else whole[: len(whole) // 2])
    elif content == "folder":
        file.unlink()
        file.mkdir()
    elif content == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("hello", "world")
    else:
        other = {
            "state dict": state["model"],
            "list": [1, 2],
            "tensor": torch.ones(3),
            "no epoch": {k: v for k, v in state.items() if k in ("model", "random", "rows")},
            "random state": state | {"random": [{"cpu": torch.zeros(7, dtype=torch.uint8)}]},
            "rows": state | {"rows": "many"},
            "step": state | {"epoch": -1, "step": "x"},
            "random": state | {"random": 5},
        }
        torch.save(other[content], file)
    message = refuses_to_resume(folder, out, capsys)
    assert "last.pt" in message and "(101)" not in message and "PyTorch 2.6" not in message


@two_folders
def test_a_missing_best_checkpoint_is_missing_not_damaged(folder, copied, capsys):
    out = copied(folder)
    (out / "best.pt").unlink()
    assert "best.pt: is missing" in refuses_to_resume(folder, out, capsys)


@two_folders
@pytest.mark.parametrize("content", [b"\xff\x00\x80" * 50, b"epoch,train_loss\r\none,two\r\nthree,four\r\n"])
def test_damaged_metrics(folder, content, copied, capsys):
    out = copied(folder)
    (out / "metrics.csv").write_bytes(content)
    assert "metrics.csv" in refuses_to_resume(folder, out, capsys)


@posix
@two_folders
@pytest.mark.parametrize("name", ["run.json", "local.json", "metrics.csv", "train.log", "last.pt", "best.pt"])
def test_a_fifo_in_a_run_folder_does_not_hang(folder, name, copied, capsys):
    out = copied(folder)
    (out / name).unlink()
    os.mkfifo(out / name)
    message = failure(train, folder, "--resume", str(out))[1] or capsys.readouterr().err
    assert name in message and ("not a regular file" in message or "is damaged" in message)


# ------------------------------------------------------------------------------------------------------- the terminal


@posix
@two_folders
@pytest.mark.parametrize("how", [dict(stdout="/dev/full"), dict(closed=["stdout", "stderr"])], ids=["full", "closed"])
def test_a_run_whose_output_cannot_be_written(folder, how, tmp_path, finished):
    """It goes on, train.log is complete, and it ends with its usual status."""
    process = start(folder, *quick(folder), "--out", tmp_path / "run", **how)
    _, errors = process.communicate()
    assert process.returncode == 0 and "Traceback" not in errors
    logs = [(out / "train.log").read_text().splitlines() for out in (tmp_path / "run", finished(folder))]
    assert len(logs[0]) == len(logs[1]) and metrics(tmp_path / "run") == metrics(finished(folder))


@pytest.mark.slow
@posix
@two_folders
def test_names_that_are_not_utf8_in_a_terminal_that_knows_no_unicode(folder, tmp_path):
    environment = os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    out = os.fsencode(tmp_path) + b"/r\xffn"
    words = [sys.executable, str(ROOT / folder / "train.py"), *quick(folder), "--out", out]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert json.loads((Path(os.fsdecode(out)) / "run.json").read_text())["state"] == "done"
    assert "r\\udcffn" in done.stdout


# ---------------------------------------------------------------------------------------------------------- fuzzing


@two_folders
@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.json", "last.pt", "best.pt", "metrics.csv", "local.json"])
def test_fuzzed_run_folders(folder, name, copied, capsys):
    """Resuming from a mutated file works or ends in one line, and changes no other checkpoint."""
    out = copied(folder)
    file = out / name
    whole, rng = file.read_bytes(), random.Random(name)
    pristine = shutil.copytree(out, out.with_name("pristine"))
    count = {"run.json": 150, "last.pt": 60, "best.pt": 30, "metrics.csv": 40, "local.json": 60}[name]
    for data in mutations(whole, rng, count):
        file.write_bytes(data)
        try:
            train(folder, "--resume", out)
        except (SystemExit, run.UserError) as error:
            assert isinstance(error, run.UserError) or error.code == 2, error
            assert "\n" not in str(error).strip()
            if file.exists():
                assert file.read_bytes() == data or name == "run.json", "the file that was there is unharmed"
        shutil.rmtree(out)
        shutil.copytree(pristine, out)
        capsys.readouterr()
