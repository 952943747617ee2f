"""What the tests share: the folders, and one way to import from them, since nine modules are called `model`."""

import functools
import importlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(file.parent.name for file in ROOT.glob("*/train.py"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks gain nothing from more, and lose much on a busy machine


@functools.cache
def load(folder, module="train"):
    """The module `module` of `folder`, imported with that folder first on sys.path and no other folder's modules about.

    `load("cifar").data` is the data module that cifar/train.py itself imported.
    """
    own = {file.stem for file in ROOT.glob("*/*.py")} - {"conftest", "ledger"}
    before = {name: sys.modules.pop(name) for name in own & sys.modules.keys()}
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(ROOT / folder))
        for name in own & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture
def data_dir():
    """Where the real datasets lie (DATA_DIR), or a skip that says so. `need` names what a test wants from it."""

    def need(name):
        folder = Path(os.environ.get("DATA_DIR") or ROOT / "data")
        if not (folder / name).exists():
            pytest.skip(f"{folder / name} is absent: set DATA_DIR to a folder that holds the real datasets")
        return folder

    return need


def failure(call, *args):
    """Call, expecting it to end the program: (exit status, message), with Python's rule that a text exits with 1."""
    with pytest.raises(SystemExit) as caught:
        call(*args)
    code = caught.value.code
    return (code, "") if isinstance(code, int) else (1, str(caught.value))
