# The modules that all folders share lie in ../common: this file makes `from common import run` find them.
from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "common")]
if not Path(__path__[0]).is_dir():
    raise SystemExit(f"error: {__path__[0]} is missing: copy a folder with `python tools/export.py FOLDER DIR`")
