"""What all tests share: how they are spread over processes, runs that are made once, and what a command line says."""

import atexit
import dataclasses
import functools
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

import helpers
import processes
from helpers import FOLDERS, ROOT, Lazy, lazy, load  # noqa: F401, test files take these from here

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks gain nothing from more threads

sys.path.insert(0, str(ROOT))  # `common`: one copy for the tests and for all folders


def import_run():
    from common import run

    return run


run = Lazy(import_run)


# ------------------------------------------------------------------------------------------------------- the processes

# Tests of one folder run in one process: what they share is made once. The slowest folders begin, so that no process
# is left with one of them when the others have ended (`pytest --durations=0 -n 0 tests/test_FOLDER.py` measures one).
SLOWEST = ["resnet", "distilgpt2", "nanogpt", "simplenn", "textbooks", "cifar", "s2vt", "gan", "lstm_imdb"]


def group_of(nodeid: str) -> str:
    """The folder of a test: that of its file, or the one that is named in its parameters; else the file's name."""
    file, _, test = nodeid.partition("::")
    subject = re.sub(r"^test_|(_text)?\.py$", "", Path(file).name)
    if subject in (*FOLDERS, "textbooks"):
        return subject
    named = [word for word in re.findall(r"\w+", test.partition("[")[2]) if word in FOLDERS]
    return named[0] if named else subject


def pytest_collection_modifyitems(items):
    order = {group: i for i, group in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of one group go to one process. `--dist loadgroup` would do the same by changing the names of tests, but
    since pytest 9.2 they cannot be changed, and every test went to any process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    return ByFolder(config, log)


def pytest_configure(config):
    """Folders that the processes of a session share, which the first one makes and removes."""
    for name in ("MPLCONFIGDIR", "FORK_SERVER_DIR"):
        if name not in os.environ:
            os.environ[name] = tempfile.mkdtemp(prefix="tests-")
            atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)


def pytest_runtest_setup(item):
    helpers.Drawing.real = item.get_closest_marker("draws") is not None


# ---------------------------------------------------------------------------------------------------------------- runs


def flags_of(folder):
    """The names of the options of FOLDER/train.py."""
    return {field.name: field for field in dataclasses.fields(load(folder).Options)}


def offers(folder, flag):
    return flag in flags_of(folder)


def quick(folder, **options):
    """Arguments of train.py for a run of a second or so, with `options` as flags; those that `folder` lacks, such as
    `epochs` where a run is counted in steps, are left out."""
    wanted = {"recipe": "tiny", "data": "builtin", "seed": 3, "device": "cpu", "limit": 200} | options
    return [word for name, value in wanted.items() if offers(folder, name) for word in (f"--{name}", str(value))]


def train(folder, *argv):
    return load(folder).main([str(word) for word in argv])


def start(folder, *argv, script="train.py", **options):
    """A command of `folder` in a process of its own: see processes.start."""
    return processes.start(ROOT / folder / script, *argv, **options)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(folder): the run folder of a quick run, made once, without network and with real figures. Beside it,
    steps.json has the number of backward passes before each row of its metrics."""

    @functools.cache
    def get(folder):
        import torch

        out = tmp_path_factory.mktemp(folder) / "run"
        backward = torch.Tensor.backward
        log = run.Run.log
        steps = [0]

        def counted_backward(*args, **options):
            steps[-1] += 1
            return backward(*args, **options)

        def counted_log(r, row):
            log(r, row)
            steps.append(steps[-1])

        with pytest.MonkeyPatch.context() as patch, helpers.drawn():
            patch.setattr(socket.socket, "connect", refuse_network)
            patch.setattr(torch.Tensor, "backward", counted_backward)
            patch.setattr(run.Run, "log", counted_log)
            train(folder, *quick(folder), "--out", out)
        (out.parent / "steps.json").write_text(json.dumps(steps[:-1]))
        return out

    return get


def refuse_network(*args, **kwargs):
    raise AssertionError("the network was asked for")


@pytest.fixture
def copied(finished, tmp_path):
    """copied(folder): a copy of that run, for a test that damages it."""
    return lambda folder: Path(shutil.copytree(finished(folder), tmp_path / "copy"))


@pytest.fixture
def data_dir():
    """data_dir(name): the folder of the real datasets (DATA_DIR), which holds `name`; or a skip with the reason."""

    def need(name):
        folder = Path(os.environ.get("DATA_DIR") or ROOT / "data")
        if not (folder / name).exists():
            pytest.skip(f"{folder / name} is absent: set DATA_DIR to a folder that holds the real datasets")
        return folder

    return need


# ------------------------------------------------------------------------------------------------------- command lines


def failure(call, *args):
    """Call what must fail: (exit status, message) as the command line would have them."""
    with pytest.raises((SystemExit, run.UserError)) as caught:
        call(*args)
    if isinstance(caught.value, run.UserError):
        return 1, f"error: {caught.value}"
    return (caught.value.code, "") if isinstance(caught.value.code, int) else (1, str(caught.value))


def one_line(message):
    return message.startswith("error: ") and "\n" not in message.strip() and "Traceback" not in message


@pytest.fixture
def refused(capsys):
    """refused(parse, *argv): the last line on standard error where `parse`, of a script, must refuse these arguments
    in argparse's way: usage, one line, exit 2."""

    def check(parse, *argv):
        capsys.readouterr()
        code, message = failure(parse, [str(word) for word in argv])
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2, (argv, message)
        assert lines[0].startswith("usage:") and sum("error:" in line for line in lines) == 1, (argv, lines)
        assert "error:" in lines[-1], (argv, lines)
        return lines[-1]

    return check


def run_cells(cells):
    """Run the code cells of a notebook of nanogpt/, and forget the modules that they import. Returns their names."""
    modules = dict(sys.modules)
    path = list(sys.path)
    space = {"__name__": "__main__"}
    try:
        for i, cell in enumerate(cells):
            exec(compile(cell, f"walkthrough.ipynb, code cell {i + 1}", "exec"), space)
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - set(modules):
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "nanogpt")):
                del sys.modules[name]
        sys.modules.update(modules)
    return space
