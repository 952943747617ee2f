"""The modules of an experiment's folder, in a program of the user's own. Standard library only."""

import importlib
import sys
from pathlib import Path

imported = {}  # {folder: {name: module}}


def import_from(folder: Path, name: str):
    """The module `name` of an experiment's folder.

    The modules of a folder import each other as `data`, `model` and `train`, which several folders and the user's
    program may have, too. So they are imported without other modules of these names, once for each folder, and
    sys.modules is as it was afterwards.
    """
    own = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    others = take(own)
    sys.modules.update(imported.get(folder, {}))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        imported[folder] = take(own)
        sys.modules.update(others)


def take(names: set[str]) -> dict:
    """Remove the modules `names`, and those below them, from sys.modules. Returns them."""
    taken = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in taken}
