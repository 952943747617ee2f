"""What the tests share: the folders, and one way to import from them, since nine modules are called `model`."""

import atexit
import functools
import importlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(file.parent.name for file in ROOT.glob("*/train.py"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks gain nothing from more threads

if "MPLCONFIGDIR" not in os.environ:  # fonts are listed once, not by the first training, which would say so
    os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
    atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
    importlib.import_module("matplotlib.font_manager")

sys.path.insert(0, str(ROOT))  # `common`: one copy for the tests and for all folders
run = importlib.import_module("common.run")
shapes = importlib.import_module("common.shapes")
shapes.draw_builtin = functools.cache(shapes.draw_builtin)  # a second each time


@functools.cache
def load(folder, module="train"):
    """The module `module` of `folder`, imported with that folder first on sys.path and without other folders' modules.

    `load("cifar").data` is the data module that cifar/train.py itself imported. The modules of common/ are shared.
    """
    own = {file.stem for file in ROOT.glob("*/*.py")} - {"conftest", "common"}
    before = {name: sys.modules.pop(name) for name in own & sys.modules.keys()}
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(ROOT / folder))
        for name in own & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(before)


def offers(folder, flag):
    module = load(folder)
    if hasattr(module, "Options"):
        return flag in module.Options.__dataclass_fields__
    return flag in vars(module.parser().parse_args([]))


def quick(folder, **more):
    """Arguments of train.py for a run of a second or so."""
    wanted = {"recipe": "tiny", "data": "builtin", "seed": 3, "device": "cpu", "limit": 200} | more
    return [word for name, value in wanted.items() if offers(folder, name) for word in (f"--{name}", str(value))]


def train(folder, *argv):
    return load(folder).main(list(argv))


@pytest.fixture(scope="session")
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


def failure(call, *args):
    """Call what must fail: (exit status, message) as the command line would have them."""
    with pytest.raises((SystemExit, run.UserError)) as caught:
        call(*args)
    if isinstance(caught.value, run.UserError):
        return 1, f"error: {caught.value}"
    return (caught.value.code, "") if isinstance(caught.value.code, int) else (1, str(caught.value))


def run_cells(cells):
    """Run the code cells of a notebook of nanogpt/, and forget the modules that they import. Returns their names."""
    modules, path, space = dict(sys.modules), list(sys.path), {"__name__": "__main__"}
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


def one_line(message):
    return message.startswith("error: ") and "\n" not in message.strip() and "Traceback" not in message


def pytest_collection_modifyitems(items):
    """With pytest-xdist and --dist loadgroup, tests of one folder run in one process: what they share is made once."""
    for item in items:
        folder = getattr(item, "callspec", None) and item.callspec.params.get("folder")
        group = folder or re.sub(r"^test_|(_text)?\.py$", "", Path(item.fspath).name)
        item.add_marker(pytest.mark.xdist_group(group))
