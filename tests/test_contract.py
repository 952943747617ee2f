"""What every folder owes, whatever its experiment. Folders are found by their train.py: a new one is covered at once.

Most tests call main(argv) in-process with the recipe `tiny` on built-in data.
"""

import argparse
import ast
import contextlib
import csv
import inspect
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import FOLDERS, ROOT, failure, load, offers, one_line, quick, run, train

each_folder = pytest.mark.parametrize("folder", FOLDERS)
VARIANTS = {
    "cifar": [["--model", "simplenn"]],
    "nanogpt": [["--kind", "wordmlp"]],
}  # more trainings, where one does not read all flags


def longer(folder):
    """A run of some seconds, with a checkpoint every few tens of milliseconds: there is time to kill it."""
    return quick(folder, epochs=40, iters=1200)


def metrics(out):
    """metrics.csv without its columns of seconds."""
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


def same_weights(a, b):
    ours, theirs = (torch.load(out / "last.pt", weights_only=True)["model"] for out in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ---------------------------------------------------------------------------------------------------------- the files


def test_there_are_folders():
    assert FOLDERS


@each_folder
def test_common_py_is_the_same_few_lines(folder):
    text = (ROOT / folder / "common.py").read_text(encoding="utf-8")
    assert text == (ROOT / FOLDERS[0] / "common.py").read_text(encoding="utf-8") and len(text.splitlines()) <= 6


@each_folder
def test_a_folder_copied_without_common_says_what_to_do(folder, tmp_path):
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("figures", "results", "weights"))
    words = [sys.executable, str(tmp_path / folder / "train.py"), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and one_line(done.stderr) and "tools/export.py" in done.stderr and not done.stdout


@each_folder
def test_no_script_shadows_the_standard_library(folder):
    assert not {file.stem for file in (ROOT / folder).rglob("*.py")} & sys.stdlib_module_names


@each_folder
def test_imports_stay_inside_the_folder(folder):
    others = {f.stem for other in FOLDERS if other != folder for f in (ROOT / other).glob("*.py")} | set(FOLDERS)
    own = {file.stem for file in (ROOT / folder).rglob("*.py")}
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            reached = {name.split(".")[0] for name in names} & (others - own)
            assert not reached, f"{file.name} imports {reached}"


def test_common_knows_no_experiment():
    for file in (ROOT / "common").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"data", "model", "train", *FOLDERS}, f"{file.name} imports {names}"


@each_folder
def test_public_functions_and_classes_are_documented(folder):
    for module in ("data", "model"):
        for name, thing in vars(load(folder, module)).items():
            public = inspect.isclass(thing) or inspect.isfunction(thing) and name not in ("parser", "parse", "main")
            if public and thing.__module__ == module and not name.startswith("_"):
                assert thing.__doc__, f"{folder}/{module}.py: {name} has no docstring"


# -------------------------------------------------------------------------------------------------------- command line


@each_folder
def test_every_flag_is_read(folder, tmp_path, monkeypatch):
    """Each flag of train.py is an attribute that the training, or common/run.py, really asks for."""
    read = {"out", "resume", "set", "data_dir", "recipe"}  # asked for while the command line is parsed

    class Recorder(argparse.Namespace):
        def __getattribute__(self, name):
            if not name.startswith("_"):
                read.add(name)
            return super().__getattribute__(name)

    module, parse = load(folder), load(folder).parse
    monkeypatch.setattr(module, "parse", lambda argv=None: Recorder(**vars(parse(argv))))
    for i, more in enumerate([[], *VARIANTS.get(folder, [])]):
        module.main([*quick(folder), *more, "--out", str(tmp_path / str(i))])
    names = module.Options.__dataclass_fields__ if hasattr(module, "Options") else vars(module.parser().parse_args([]))
    assert not names.keys() - read


@each_folder
def test_help_from_another_directory(folder, tmp_path):
    command = [sys.executable, str(ROOT / folder / "train.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "python " + folder + "/train.py" in done.stdout
    assert not list(tmp_path.iterdir())


@each_folder
def test_every_script_has_help(folder):
    for file in (ROOT / folder).glob("*.py"):
        module = load(folder, file.stem) if file.stem != "common" else None
        if hasattr(module, "parser") and hasattr(module, "main"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert failure(module.main, ["--help"])[0] == 0
            assert f"python {folder}/{file.name}" in out.getvalue(), f"{file.name} --help shows no command to paste"


BAD = [("epochs", "0"), ("epochs", "-1"), ("epochs", "ten"), ("iters", "0"), ("iters", "x"), ("bs", "0"), ("bs", "-8"),
       ("bs", "2.5"), ("lr", "0"), ("lr", "-0.1"), ("lr", "nan"), ("lr", "fast"), ("seed", "-1"), ("limit", "0"),
       ("device", "tpu"), ("precision", "fp8"), ("data", "no-such-dataset"), ("colour", "red"), ("set", "colour=red"),
       ("data", ""), ("resume", ""), ("out", ""), ("recipe", "none"), ("lr", "1e999")]  # fmt: skip


@each_folder
@pytest.mark.parametrize("flag, value", BAD)
def test_a_wrong_argument_is_one_line(folder, flag, value, capsys):
    if flag != "colour" and not offers(folder, flag):
        pytest.skip(f"{folder}/train.py has no --{flag}")
    code, _ = failure(train, folder, f"--{flag}", value)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and lines[0].startswith("usage:") and sum("error:" in line for line in lines) == 1
    assert flag in lines[-1] and "error:" in lines[-1]


@each_folder
@pytest.mark.parametrize("flag", ["epochs", "iters", "seed", "bs"])
def test_the_bound_that_fails_is_the_one_named(folder, flag, capsys):
    if not offers(folder, flag):
        pytest.skip(f"{folder}/train.py has no --{flag}")
    assert failure(train, folder, f"--{flag}", "99999999999")[0] == 2
    assert "above the maximum, 2147483647" in capsys.readouterr().err.splitlines()[-1]


@each_folder
def test_output_below_a_regular_file(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, message = failure(train, folder, *quick(folder), "--out", str(tmp_path / "file" / "run"))
    assert code == 1 and one_line(message) and "file" in message
    assert (tmp_path / "file").read_text() == "in the way"


@each_folder
def test_a_folder_that_holds_a_run_is_refused(folder, copied):
    out = copied(folder)
    before = (out / "run.json").read_bytes()
    code, message = failure(train, folder, *quick(folder), "--out", str(out))
    assert code == 1 and one_line(message) and str(out) in message
    assert (out / "run.json").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------- the record


@each_folder
def test_builtin_data_trains_offline(folder, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    record = train(folder, *quick(folder), "--out", "run")
    assert record["state"] == "done" and record["dataset"]["builtin"] and record["final"]


@each_folder
def test_the_record_says_what_is_needed_to_trust_it(folder, finished):
    text = (finished(folder) / "run.json").read_text()
    record = json.loads(text)
    for key in ("args", "git", "versions", "device", "precision", "dataset", "wall_s", "peak_memory_mb", "final"):
        assert key in record, key
    assert str(finished(folder)) not in text and str(ROOT) not in text, "a record holds no paths of a machine"
    assert {"run.json", "metrics.csv", "curves.png", "train.log"} <= {f.name for f in finished(folder).iterdir()}
    assert not list(finished(folder).glob("*.tmp"))


@each_folder
def test_same_seed_same_metrics(folder, finished, tmp_path):
    train(folder, *quick(folder), "--out", str(tmp_path / "again"))
    assert metrics(tmp_path / "again") == metrics(finished(folder))
    train(folder, *quick(folder, seed=4), "--out", str(tmp_path / "other"))
    assert metrics(tmp_path / "other") != metrics(finished(folder))


@each_folder
def test_the_default_run_folder_is_the_first_free_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for _ in range(2):
        train(folder, *quick(folder))
    names = sorted(f.name for f in (tmp_path / "out" / folder).iterdir())
    assert len(names) == 2 and names[0].endswith("-s3-1") and names[1].endswith("-s3-2")
    newest = run.newest_run(folder)
    assert newest.name == names[1] if folder != "lms" else newest is None, "lms/ keeps no best.pt"


@each_folder
def test_a_key_of_the_recipe_is_set_checked_and_recorded(folder, tmp_path, capsys):
    """--set NAME=VALUE for a key that has no flag, or else for one that has."""
    module, base = load(folder), quick(folder)
    args, plain = vars(module.parse(base)), vars(module.parser().parse_args(base))
    keys = [
        k for k, v in args.items() if isinstance(v, int | float) and not isinstance(v, bool) and plain.get(k) is None
    ]
    key = sorted(keys, key=lambda k: k in plain)[0]
    value = args[key] + (1 if isinstance(args[key], int) else 0.125)
    assert vars(module.parse([*base, "--set", f"{key}={value}"]))[key] == value
    assert failure(module.parse, [*base, "--set", f"{key}=word"])[0] == 2
    assert f"--set {key}=word" in capsys.readouterr().err.splitlines()[-1]


# -------------------------------------------------------------------------------------- killed, resumed, full, twice


def start(folder, *more, **options):
    words = [sys.executable, str(ROOT / folder / "train.py"), *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_rows(process, out, rows):
    while process.poll() is None:
        if (out / "metrics.csv").exists() and len((out / "metrics.csv").read_text().splitlines()) > rows:
            return
        time.sleep(0.01)
    pytest.fail(f"the run ended before it could be stopped: {process.communicate()}")


def wait_for_resume(process, out, times):
    """Until the record says that the run has been resumed so many times: the process then handles signals."""
    while process.poll() is None:
        if (out / "run.json").exists() and json.loads((out / "run.json").read_text())["resumed"] == times:
            return
        time.sleep(0.01)
    pytest.fail(f"the run ended before it could be stopped: {process.communicate()}")


ONCE, THRICE = [("SIGKILL", 2)], [("SIGKILL", 1), ("SIGKILL", 4), ("SIGTERM", 7)]


@each_folder
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    "plan", [pytest.param(ONCE, id="once"), pytest.param(THRICE, id="thrice", marks=pytest.mark.slow)]
)
def test_killed_and_resumed_is_as_if_nothing_happened(folder, plan, tmp_path):
    """Killed at seeded moments, then resumed to the end: the same weights, bit for bit, and the same metrics."""
    arguments, delay = longer(folder), random.Random(0)
    train(folder, *arguments, "--out", str(tmp_path / "whole"))
    out = tmp_path / "broken"
    for i, (name, rows) in enumerate(plan):
        number = getattr(signal, name)
        process = start(folder, *(["--resume", str(out)] if i else [*arguments, "--out", str(out)]))
        wait_for_resume(process, out, i)
        wait_for_rows(process, out, rows)
        time.sleep(delay.random() * 0.1)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == (-number if name == "SIGKILL" else 128 + number), errors
        if name == "SIGTERM":
            assert "--resume" in errors and "Traceback" not in errors
            assert json.loads((out / "run.json").read_text())["state"] == "interrupted"
    train(folder, "--resume", str(out))
    assert metrics(out) == metrics(tmp_path / "whole")
    assert same_weights(out, tmp_path / "whole")
    assert json.loads((out / "run.json").read_text())["resumed"] == len(plan)


@each_folder
def test_resume_auto_starts_or_continues(folder, tmp_path, finished, capsys):
    command = [*quick(folder), "--out", str(tmp_path / "run"), "--resume", "auto"]
    train(folder, *command)
    (tmp_path / "run" / "last.pt").unlink()  # as if it had been killed before its first checkpoint
    train(folder, *command)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed"] == 1
    assert metrics(tmp_path / "run") == metrics(finished(folder)) and same_weights(tmp_path / "run", finished(folder))
    assert failure(train, folder, *command[:-4], "--seed", "5", *command[-4:])[0] == 2
    assert "--seed 5" in capsys.readouterr().err, "it is the run of another command"


@each_folder
def test_tensorboard_shows_the_metrics_once(folder, tmp_path, monkeypatch):
    """The event files hold every row of metrics.csv, and after a resume no step stands twice."""
    if not offers(folder, "tensorboard"):
        pytest.fail(f"{folder}/train.py does not offer --tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    train(folder, *quick(folder), "--tensorboard", "--out", str(out))
    (out / "last.pt").unlink()  # as if it had been killed before its first checkpoint
    train(folder, "--resume", str(out))
    assert len(list(out.glob("events.out.tfevents.*"))) == 2
    events = accumulator.EventAccumulator(str(out)).Reload()
    rows = metrics(out)
    x, loss = list(rows[0])[0], next(name for name in rows[0] if name.startswith("train_"))
    points = [(event.step, event.value) for event in events.Scalars(f"{loss.removeprefix('train_')}/train")]
    assert points == [(int(row[x]), pytest.approx(float(row[loss]), rel=1e-5)) for row in rows]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, message = failure(train, folder, *quick(folder), "--tensorboard", "--out", str(tmp_path / "other"))
    assert code == 1 and one_line(message) and "pip install tensorboard" in message


@each_folder
def test_resume_with_another_flag_names_it(folder, copied, capsys):
    code, _ = failure(train, folder, "--resume", str(copied(folder)), "--seed", "99")
    assert code == 2 and "--seed 99" in capsys.readouterr().err


@each_folder
def test_resume_of_another_experiment(folder, copied, capsys):
    file = copied(folder) / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"experiment": "another"}))
    code, _ = failure(train, folder, "--resume", str(file.parent))
    assert code == 2 and "run of another/" in capsys.readouterr().err


@each_folder
def test_resume_of_a_run_of_an_older_version_names_the_commit(folder, copied, capsys):
    file = copied(folder) / "run.json"
    record = json.loads(file.read_text())
    del record["format"]
    file.write_text(json.dumps(record | {"git": {"commit": "c0ffee", "dirty": False}}))
    code, _ = failure(train, folder, "--resume", str(file.parent))
    assert code == 2 and "commit c0ffee" in capsys.readouterr().err.splitlines()[-1]


@each_folder
def test_resume_with_another_dataset(folder, copied):
    file = copied(folder) / "run.json"
    record = json.loads(file.read_text())
    record["dataset"]["digest"] = "0" * 32
    file.write_text(json.dumps(record))
    code, message = failure(train, folder, "--resume", str(file.parent))
    assert code == 1 and one_line(message) and "another dataset" in message


@each_folder
def test_a_resumed_run_keeps_the_commit_it_began_with(folder, copied):
    """Committing the changes of a run before it is resumed does not make its record clean."""
    file = copied(folder) / "run.json"
    record = json.loads(file.read_text())
    if record["git"] is None:
        pytest.skip("there is no git here")
    file.write_text(json.dumps(record | {"git": record["git"] | {"dirty": True}}))
    assert train(folder, "--resume", str(file.parent))["git"] == record["git"] | {"dirty": True}


@each_folder
def test_resume_of_nothing(folder, tmp_path, capsys):
    code, _ = failure(train, folder, "--resume", str(tmp_path / "nothing"))
    assert code == 2 and "nothing" in capsys.readouterr().err and not (tmp_path / "nothing").exists()


@each_folder
def test_the_checkpoint_of_another_model(folder, copied):
    out = copied(folder)
    state = torch.load(out / "last.pt", weights_only=True)
    state["model"] = {"other." + k: v for k, v in state["model"].items()}
    torch.save(state, out / "last.pt")
    before = (out / "last.pt").read_bytes()
    code, message = failure(train, folder, "--resume", str(out))
    assert code == 1 and one_line(message) and "last.pt" in message and "another model" in message
    assert (out / "last.pt").read_bytes() == before


@each_folder
@pytest.mark.slow
def test_a_file_size_limit_while_saving(folder, tmp_path):
    """As on a full disk: one line, no half file, and the earlier checkpoint is unharmed."""
    resource = pytest.importorskip("resource", reason="file-size limits are POSIX")
    out = tmp_path / "run"
    process = start(folder, *longer(folder), "--out", str(out))
    wait_for_rows(process, out, 2)
    process.terminate()
    process.communicate()
    before = (out / "last.pt").read_bytes()
    limit = len(before) // 2
    process = start(folder, "--resume", str(out),
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # fmt: skip
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert sum(line.startswith("error:") for line in errors.splitlines()) == 1
    assert (out / "last.pt").read_bytes() == before and not list(out.glob(".*.tmp"))


@each_folder
def test_a_second_process_in_the_same_folder(folder, copied):
    out = copied(folder)
    lock = run.lock_folder(out)
    code, message = failure(train, folder, "--resume", str(out))
    assert code == 1 and one_line(message) and f"process {os.getpid()} on {socket.gethostname()}" in message
    lock.release()
    train(folder, "--resume", str(out))  # the lock of a process that is gone is not in the way


@each_folder
def test_torchrun_is_offered_or_refused(folder, tmp_path, monkeypatch):
    if "ddp" in vars(load(folder)):
        pytest.skip(f"{folder}/train.py offers torchrun; its own tests run two processes")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, message = failure(train, folder, *quick(folder), "--out", str(tmp_path / "run"))
    assert code == 1 and one_line(message) and "torchrun" in message and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- the pages


@each_folder
def test_a_readme_has_a_table_and_its_figures(folder):
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert "<!-- ledger" in text, "no results table is rendered from records"
    assert len(text.splitlines()) <= 160
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert figures
    for page in (ROOT / folder).glob("*.md"):
        for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (ROOT / folder / figure).stat().st_size < 150_000, figure
