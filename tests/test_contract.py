"""What every folder owes, whatever its experiment. Folders are found by their train.py: a new one is covered at once.

A check applies where a folder offers what it is about: killing and resuming where train.py has --resume, for instance.
"""

import ast
import contextlib
import csv
import functools
import hashlib
import http.server
import importlib.util
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
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch

from conftest import FOLDERS, ROOT, failure, load

spec = importlib.util.spec_from_file_location("ledger", ROOT / "tools" / "ledger.py")
ledger = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ledger)

each_folder = pytest.mark.parametrize("folder", FOLDERS)
fetchers = [folder for folder in FOLDERS if (ROOT / folder / "fetch.py").exists()]


def offers(folder, flag):
    return flag in flags(folder)


@functools.cache
def flags(folder):
    return vars(load(folder).parser().parse_args([])).keys()


def quick(folder, **more):
    """Arguments of train.py for a run of a second or so on built-in data."""
    wanted = {"data": "builtin", "seed": 3, "device": "cpu", "epochs": 2, "iters": 20, "limit": 200, "bs": 32} | more
    return [word for name, value in wanted.items() if offers(folder, name) for word in (f"--{name}", str(value))]


def train(folder, *argv):
    return load(folder).main(list(argv))


def need_resume(folder):
    if not offers(folder, "resume"):
        pytest.skip(f"{folder}/train.py is over in a moment and offers no --resume")


def metrics(out):
    """metrics.csv without its columns of seconds."""
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


def same_weights(a, b):
    ours, theirs = (torch.load(out / "last.pt", weights_only=True)["model"] for out in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(folder): the run folder of a quick run, made once."""
    made = {}

    def get(folder):
        if folder not in made:
            made[folder] = tmp_path_factory.mktemp(folder) / "run"
            train(folder, *quick(folder), "--out", str(made[folder]))
        return made[folder]

    return get


@pytest.fixture
def copied(finished, tmp_path):
    """copied(folder): a copy of that run to be spoilt."""
    return lambda folder: Path(shutil.copytree(finished(folder), tmp_path / "copy"))


def one_line(message):
    return message.startswith("error: ") and "\n" not in message.strip() and "Traceback" not in message


# ---------------------------------------------------------------------------------------------------------- the files


def test_there_are_folders():
    assert FOLDERS


@pytest.mark.parametrize("name", ["run.py", "fetch.py"])
def test_copies_are_identical(name):
    copies = {file.read_bytes() for file in ROOT.glob(f"*/{name}")}
    assert len(copies) == 1


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


@each_folder
def test_every_flag_is_read(folder):
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / folder).glob("*.py"))
    for name in flags(folder):
        assert re.search(rf'\bargs\.{name}\b|"{name}"\)|named\["{name}"\]', source), f"nothing reads --{name}"


@each_folder
def test_public_functions_and_classes_are_documented(folder):
    for module in ("data", "model", "train"):
        for name, thing in vars(load(folder, module)).items():
            function = inspect.isfunction(thing) and module != "train" and name not in ("parser", "parse", "main")
            if (inspect.isclass(thing) or function) and thing.__module__ == module and not name.startswith("_"):
                assert thing.__doc__, f"{folder}/{module}.py: {name} has no docstring"


# -------------------------------------------------------------------------------------------------------- command line


@each_folder
def test_help_from_another_directory(folder, tmp_path):
    command = [sys.executable, str(ROOT / folder / "train.py"), "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "python " + folder + "/train.py" in shown.stdout
    assert not list(tmp_path.iterdir())


@each_folder
def test_every_verb_has_help(folder):
    for file in (ROOT / folder).glob("*.py"):
        module = load(folder, file.stem)
        if hasattr(module, "parser") and hasattr(module, "main"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert failure(module.main, ["--help"])[0] == 0
            assert f"python {folder}/{file.name}" in out.getvalue(), f"{file.name} --help shows no command to paste"


BAD = [
    ("epochs", "0"),
    ("epochs", "-1"),
    ("epochs", "ten"),
    ("iters", "0"),
    ("iters", "x"),
    ("bs", "0"),
    ("bs", "-8"),
    ("bs", "2.5"),
    ("lr", "0"),
    ("lr", "-0.1"),
    ("lr", "nan"),
    ("lr", "fast"),
    ("seed", "-1"),
    ("limit", "0"),
    ("device", "tpu"),
    ("precision", "fp8"),
    ("data", "no-such-dataset"),
    ("colour", "red"),
]


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
    began = time.monotonic()
    record = train(folder, *quick(folder), "--out", "run")
    assert time.monotonic() - began < 60
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
    monkeypatch.setattr(load(folder).run, "ROOT", tmp_path)
    for _ in range(2):
        train(folder, *quick(folder))
    names = sorted(f.name for f in (tmp_path / "out" / folder).iterdir())
    assert len(names) == 2 and names[0].endswith("-s3-1") and names[1].endswith("-s3-2")


# -------------------------------------------------------------------------------------- killed, resumed, full, twice


def start(folder, out, *more, **options):
    words = [sys.executable, str(ROOT / folder / "train.py"), *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_rows(process, out, rows):
    while process.poll() is None:
        if (out / "metrics.csv").exists() and len((out / "metrics.csv").read_text().splitlines()) > rows:
            return
        time.sleep(0.01)
    pytest.fail(f"the run ended before it could be stopped: {process.communicate()}")


@each_folder
def test_killed_and_resumed_is_as_if_nothing_happened(folder, tmp_path):
    """SIGKILL at two seeded moments, then SIGTERM, then to the end: the same weights, bit for bit, the same metrics."""
    need_resume(folder)
    arguments, chance = quick(folder, epochs=14, iters=400, limit=400), random.Random(0)
    train(folder, *arguments, "--out", str(tmp_path / "whole"))
    out = tmp_path / "broken"
    for i, (rows, number) in enumerate([(1, signal.SIGKILL), (4, signal.SIGKILL), (7, signal.SIGTERM)]):
        process = start(folder, out, *(["--resume", str(out)] if i else [*arguments, "--out", str(out)]))
        wait_for_rows(process, out, rows)
        time.sleep(chance.random() * 0.1)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), errors
    assert "--resume" in errors and "Traceback" not in errors
    assert json.loads((out / "run.json").read_text())["state"] == "interrupted"
    train(folder, "--resume", str(out))
    assert metrics(out) == metrics(tmp_path / "whole")
    assert same_weights(out, tmp_path / "whole")
    assert json.loads((out / "run.json").read_text())["resumed"] == 3


@each_folder
def test_resume_before_the_first_checkpoint_starts_at_zero(folder, copied, finished):
    need_resume(folder)
    out = copied(folder)
    (out / "last.pt").unlink()
    train(folder, "--resume", str(out))
    assert metrics(out) == metrics(finished(folder)) and same_weights(out, finished(folder))


@each_folder
def test_resume_with_another_flag_names_it(folder, copied, capsys):
    need_resume(folder)
    code, _ = failure(train, folder, "--resume", str(copied(folder)), "--seed", "99")
    assert code == 2 and "--seed 99" in capsys.readouterr().err


@each_folder
def test_resume_of_another_experiment(folder, copied, capsys):
    need_resume(folder)
    file = copied(folder) / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"experiment": "another"}))
    code, _ = failure(train, folder, "--resume", str(file.parent))
    assert code == 2 and "run of another/" in capsys.readouterr().err


@each_folder
def test_resume_with_other_data(folder, copied):
    need_resume(folder)
    file = copied(folder) / "run.json"
    record = json.loads(file.read_text())
    record["dataset"]["digest"] = "0" * 32
    file.write_text(json.dumps(record))
    code, message = failure(train, folder, "--resume", str(file.parent))
    assert code == 1 and one_line(message) and "other data" in message


@each_folder
def test_a_resumed_run_keeps_the_commit_it_began_with(folder, copied):
    """Committing what a run was begun with, before it is resumed, does not make its record clean."""
    need_resume(folder)
    file = copied(folder) / "run.json"
    record = json.loads(file.read_text())
    if record["git"] is None:
        pytest.skip("there is no git here")
    file.write_text(json.dumps(record | {"git": record["git"] | {"dirty": True}}))
    assert train(folder, "--resume", str(file.parent))["git"] == record["git"] | {"dirty": True}


@each_folder
def test_resume_of_nothing(folder, tmp_path, capsys):
    need_resume(folder)
    code, _ = failure(train, folder, "--resume", str(tmp_path / "nothing"))
    assert code == 2 and "nothing" in capsys.readouterr().err and not (tmp_path / "nothing").exists()


@each_folder
def test_a_truncated_checkpoint(folder, copied):
    need_resume(folder)
    out = copied(folder)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    best = (out / "best.pt").read_bytes()
    code, message = failure(train, folder, "--resume", str(out))
    assert code == 1 and one_line(message) and "last.pt" in message
    assert (out / "best.pt").read_bytes() == best


@each_folder
def test_the_checkpoint_of_another_model(folder, copied):
    need_resume(folder)
    out = copied(folder)
    state = torch.load(out / "last.pt", weights_only=True)
    state["model"] = {"other." + k: v for k, v in state["model"].items()}
    torch.save(state, out / "last.pt")
    before = (out / "last.pt").read_bytes()
    code, message = failure(train, folder, "--resume", str(out))
    assert code == 1 and one_line(message) and "last.pt" in message and "another model" in message
    assert (out / "last.pt").read_bytes() == before


@each_folder
def test_a_file_size_limit_while_saving(folder, tmp_path):
    """As on a full disk: one line, no half file, and the run goes on from the earlier checkpoint."""
    need_resume(folder)
    resource = pytest.importorskip("resource", reason="file-size limits are POSIX")
    out = tmp_path / "run"
    process = start(folder, out, *quick(folder, epochs=30, iters=1000, limit=400), "--out", str(out))
    wait_for_rows(process, out, 2)
    process.terminate()
    process.communicate()
    before = (out / "last.pt").read_bytes()
    limit = len(before) // 2
    process = start(
        folder, out, "--resume", str(out), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert sum(line.startswith("error:") for line in errors.splitlines()) == 1
    assert (out / "last.pt").read_bytes() == before and not list(out.glob(".*.tmp"))


@each_folder
def test_a_second_process_in_the_same_folder(folder, copied):
    need_resume(folder)
    out = copied(folder)
    with load(folder).run.hold(out):
        code, message = failure(train, folder, "--resume", str(out))
    assert code == 1 and one_line(message) and "another process" in message
    train(folder, "--resume", str(out))  # the lock of a process that is gone is not in the way


# ------------------------------------------------------------------------------------------------------------ fetch.py


class Host(http.server.BaseHTTPRequestHandler):
    """A mirror on localhost that misbehaves as its path says."""

    CONTENT = bytes(range(256)) * 2000

    def do_GET(self):
        way, body = self.path.split("/")[1], self.CONTENT
        if way == "down":
            return self.send_error(503)
        if way == "silent":
            return time.sleep(3)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if way == "wrong":
                body = body[::-1]
            if way == "cut":
                return self.wfile.write(body[: len(body) // 2])
            if way == "slow":
                for i in range(0, len(body), 5000):
                    self.wfile.write(body[i : i + 5000])
                    self.wfile.flush()
                    time.sleep(0.1)
                return None
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


MD5 = "md5:" + hashlib.md5(Host.CONTENT).hexdigest()


@pytest.mark.parametrize("way", ["down", "silent", "wrong", "cut", "slow", "nobody"])
def test_a_bad_mirror_is_passed_over(way, host, tmp_path):
    fetch = load(fetchers[0], "fetch")
    bad = "http://127.0.0.1:9/file" if way == "nobody" else f"{host}/{way}/file"
    path = tmp_path / "sub" / "file"
    got = fetch.download([bad, f"{host}/good/file"], path, MD5, patience=0.5)
    assert got == path and path.read_bytes() == Host.CONTENT
    path.unlink()
    code, message = failure(lambda: fetch.download([bad], path, MD5, patience=0.5))
    assert code == 1 and one_line(message) and "127.0.0.1" in message
    assert not list(path.parent.iterdir()), "a half file was left behind"


def test_a_patient_download_takes_a_slow_host(host, tmp_path):
    fetch = load(fetchers[0], "fetch")
    fetch.download([f"{host}/slow/file"], tmp_path / "file", MD5, patience=5, min_rate=0)
    assert (tmp_path / "file").read_bytes() == Host.CONTENT


def test_a_file_already_there_is_verified(tmp_path):
    fetch = load(fetchers[0], "fetch")
    (tmp_path / "file").write_bytes(Host.CONTENT)
    assert fetch.download([], tmp_path / "file", MD5) == tmp_path / "file"
    (tmp_path / "file").write_bytes(b"rubbish")
    code, message = failure(lambda: fetch.download([], tmp_path / "file", MD5))
    assert code == 1 and one_line(message) and str(tmp_path / "file") in message
    assert (tmp_path / "file").read_bytes() == b"rubbish", "what the user had is the user's"


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "link/escaped"])
def test_a_tar_that_wants_to_escape(name, tmp_path):
    fetch = load(fetchers[0], "fetch")
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        if name.startswith("link"):
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path.parent)
            tar.addfile(link)
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    (tmp_path / "in").mkdir()
    code, message = failure(lambda: fetch.extract(tmp_path / "bad.tar.gz", tmp_path / "in" / "folder"))
    assert code == 1 and one_line(message) and "bad.tar.gz" in message
    assert not list((tmp_path / "in").iterdir())
    assert not [f for f in (tmp_path / "escaped", tmp_path.parent / "escaped", Path("/tmp/escaped")) if f.exists()]


def test_a_truncated_archive(tmp_path):
    fetch = load(fetchers[0], "fetch")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(os.urandom(100_000))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "folder", "folder")
    shutil.rmtree(tmp_path / "folder")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[:50_000])
    code, message = failure(lambda: fetch.extract(tmp_path / "a.tar.gz", tmp_path / "folder"))
    assert code == 1 and one_line(message) and not (tmp_path / "folder").exists()
    (tmp_path / "a.tar.gz").write_bytes(whole)
    assert (fetch.extract(tmp_path / "a.tar.gz", tmp_path / "folder") / "file").stat().st_size == 100_000


# ---------------------------------------------------------------------------------------------------------- the ledger

READMES = ledger.markdown_files()


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_what_the_records_say(readme):
    assert ledger.render(readme) == readme.read_text(encoding="utf-8"), "run: python tools/ledger.py"


@each_folder
def test_a_readme_has_tables_and_its_figures(folder):
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert ledger.TABLE.search(text), "no results table is rendered from records"
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures
    for picture in pictures:
        assert (ROOT / folder / picture).stat().st_size < 150_000, picture


def test_the_ledger_renders_marks_and_spreads(tmp_path):
    (tmp_path / "results").mkdir()

    def put(**changes):
        row = {"setting": "a", "git": {"commit": "x", "dirty": False}, "final": {"acc": 0.5}} | changes
        rows = [row, row | {"final": {"acc": 0.7}}, {"setting": "b", "state": "diverged", "git": row["git"]}]
        (tmp_path / "results" / "s.json").write_text(json.dumps({"study": "s", "rows": rows}))

    spec = "records: results/s.json\nrows: setting\ncolumns: Setting = setting; Accuracy = final.acc .1%; Runs = runs\n"
    (tmp_path / "README.md").write_text(f"# t\n<!-- ledger\n{spec}-->\n<!-- /ledger -->\n")
    put()
    text = ledger.render(tmp_path / "README.md")
    assert "| a | 60.0% ± 14.1% | 2 |" in text and "| b | diverged | 1 |" in text and "†" not in text
    put(git={"commit": "x", "dirty": True})
    assert "| a † |" in ledger.render(tmp_path / "README.md")
    put(git=None, dataset={"builtin": True})
    assert "| a † ‡ |" in ledger.render(tmp_path / "README.md")
