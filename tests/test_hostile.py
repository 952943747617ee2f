"""What users and strangers give to every folder: edited records, damaged checkpoints, closed streams, odd names.

Each ends in success or in one line, and what was there before is unharmed.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import FOLDERS, ROOT, failure, load, one_line, quick, run, train
from test_contract import longer, metrics, start, wait_for_rows

each_folder = pytest.mark.parametrize("folder", FOLDERS)
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX: signals and shell redirections")


def refused(folder, out, capsys):
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
    wrong = {"lr": ["abc", -1, float("nan"), None, [0.1], 1e999], "epochs": [None, 0, 2.5, "ten"], "iters": [None, 0],
             "bs": [0, -8, None, "x"], "model": ["nothing", 3], "device": ["tpu", None], "precision": ["fp8", 16],
             "recipe": ["none", None], "seed": [-1, "x", 2**40], "limit": [0, "x"],
             "data": ["nowhere", 5, ""]}  # fmt: skip
    for name, values in wrong.items():
        for value in values if name in args else []:
            yield f"{name} {value}", record | {"args": args | {name: value}}
    for name in args:
        if args[name] is not None:
            yield f"no {name}", record | {"args": {k: v for k, v in args.items() if k != name}}
    yield "an argument more", record | {"args": args | {"colour": "red"}}
    yield "help", record | {"args": args | {"help": True}}
    for name, value in (("args", []), ("args", "x"), ("experiment", None), ("device", {}), ("device", {"threads": -1}),
                        ("device", {"threads": "many"}), ("precision", "fp8"), ("wall_s", "long"), ("wall_s", 1e300),
                        ("git", {"commit": "--output=evil"}), ("git", "x"), ("dataset", []),
                        ("resumed", "x")):  # fmt: skip
        yield f"{name} = {value}", record | {name: value}
    yield "no state", {k: v for k, v in record.items() if k != "state"}


@each_folder
def test_an_edited_record_is_refused(folder, copied, capsys):
    out = copied(folder)
    record = json.loads((out / "run.json").read_text())
    for what, edited in edits(record):
        (out / "run.json").write_text(json.dumps(edited))
        message = refused(folder, out, capsys)
        assert len(message) < 600, what


@each_folder
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b'"x"', b"\xff\xfe", b"[" * 200_000, b'{"args": ' * 100_000]
)
def test_a_record_that_is_none(folder, content, copied, capsys):
    out = copied(folder)
    (out / "run.json").write_bytes(content)
    assert "run.json" in refused(folder, out, capsys)


# -------------------------------------------------------------------------------------------- damaged run folders


@each_folder
@pytest.mark.parametrize("content", ["empty", "cut", "state dict", "list", "tensor", "no epoch", "random state", "zip",
                                     "rows", "step", "random", "folder"])  # fmt: skip
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
        other = {"state dict": state["model"], "list": [1, 2], "tensor": torch.ones(3),
                 "no epoch": {k: v for k, v in state.items() if k in ("model", "random", "rows")},
                 "random state": state | {"random": [{"cpu": torch.zeros(7, dtype=torch.uint8)}]},
                 "rows": state | {"rows": "many"}, "step": state | {"epoch": -1, "step": "x"},
                 "random": state | {"random": 5}}  # fmt: skip
        torch.save(other[content], file)
    message = refused(folder, out, capsys)
    assert "last.pt" in message and "(101)" not in message and "PyTorch 2.6" not in message


@each_folder
def test_a_missing_best_checkpoint_is_missing_not_damaged(folder, copied, capsys):
    out = copied(folder)
    if not (out / "best.pt").exists():
        pytest.skip(f"{folder}/ keeps no best.pt")
    (out / "best.pt").unlink()
    assert "best.pt: is missing" in refused(folder, out, capsys)


@each_folder
@pytest.mark.parametrize("content", [b"\xff\x00\x80" * 50, b"epoch,train_loss\r\none,two\r\nthree,four\r\n"])
def test_damaged_metrics(folder, content, copied, capsys):
    out = copied(folder)
    (out / "metrics.csv").write_bytes(content)
    assert "metrics.csv" in refused(folder, out, capsys)


@posix
@each_folder
@pytest.mark.parametrize("name", ["run.json", "local.json", "metrics.csv", "train.log", "last.pt", "best.pt"])
def test_a_fifo_in_a_run_folder_does_not_hang(folder, name, copied, capsys):
    out = copied(folder)
    if not (out / name).exists():
        pytest.skip(f"{folder}/ keeps no {name}")
    (out / name).unlink()
    os.mkfifo(out / name)
    message = failure(train, folder, "--resume", str(out))[1] or capsys.readouterr().err
    assert name in message and ("not a regular file" in message or "is damaged" in message)


# ------------------------------------------------------------------------------------------------------- the terminal


@pytest.mark.slow
@posix
@each_folder
@pytest.mark.parametrize("how", ["> /dev/full", ">&- 2>&-"])
def test_a_run_whose_output_cannot_be_written(folder, how, tmp_path, finished):
    """It goes on, train.log is complete, and it ends with its usual status."""
    words = " ".join([sys.executable, str(ROOT / folder / "train.py"), *quick(folder), "--out", str(tmp_path / "run")])
    done = subprocess.run(f"{words} {how}", shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    logs = [(out / "train.log").read_text().splitlines() for out in (tmp_path / "run", finished(folder))]
    assert len(logs[0]) == len(logs[1]) and metrics(tmp_path / "run") == metrics(finished(folder))


@pytest.mark.slow
@posix
@each_folder
def test_names_that_are_not_utf8_in_a_terminal_that_knows_no_unicode(folder, tmp_path):
    environment = os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    out = os.fsencode(tmp_path) + b"/r\xffn"
    words = [sys.executable, str(ROOT / folder / "train.py"), *quick(folder), "--out", out]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert json.loads((Path(os.fsdecode(out)) / "run.json").read_text())["state"] == "done"
    assert "r\\udcffn" in done.stdout


@pytest.mark.slow
@posix
@each_folder
@pytest.mark.parametrize("pause", [0, 0.003])
def test_a_second_signal_always_ends_a_run(folder, pause, tmp_path):
    """Two signals of one kind in a row: the run ends, as interrupted, whatever it is doing."""
    out = tmp_path / "run"
    process = start(folder, *longer(folder), "--out", str(out))
    wait_for_rows(process, out, 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(pause)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in errors
    assert json.loads((out / "run.json").read_text())["state"] == "interrupted"


# ---------------------------------------------------------------------------------------------------------- fuzzing


def mutations(content, rng, count):
    """Truncations, bit flips, and runs of other bytes in the bytes of a good file."""
    for _ in range(count):
        data = bytearray(content)
        kind = rng.randrange(3)
        if kind == 0:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.randrange(1, 9)):
                at = rng.randrange(len(data))
                if kind == 1:
                    data[at] ^= 1 << rng.randrange(8)
                else:
                    data[at : at + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
        yield bytes(data)


@each_folder
@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.json", "last.pt", "best.pt", "metrics.csv", "local.json"])
def test_fuzzed_run_folders(folder, name, copied, capsys):
    """Resuming from a mutated file works or ends in one line, and changes no other checkpoint."""
    out = copied(folder)
    file = out / name
    if not file.exists():
        pytest.skip(f"{folder}/ keeps no {name}")
    whole, rng = file.read_bytes(), random.Random(name)
    pristine = shutil.copytree(out, out.with_name("pristine"))
    count = {"run.json": 150, "last.pt": 60, "best.pt": 30, "metrics.csv": 40, "local.json": 60}[name]
    for data in mutations(whole, rng, count):
        file.write_bytes(data)
        try:
            with io.StringIO():
                train(folder, "--resume", str(out))
        except (SystemExit, run.UserError) as error:
            assert isinstance(error, run.UserError) or error.code == 2, error
            assert "\n" not in str(error).strip()
            if file.exists():
                assert file.read_bytes() == data or name == "run.json", "the file that was there is unharmed"
        shutil.rmtree(out)
        shutil.copytree(pristine, out)
        capsys.readouterr()


def test_every_folder_is_covered():
    assert all(hasattr(load(folder), "parse") for folder in FOLDERS)
