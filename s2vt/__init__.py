"""`s2vt.load(RUN)` opens a trained model of this folder in a program of your own."""

from pathlib import Path

from .common.modules import import_from


def load(run):
    """The trained model in the run folder `run`: see `load` in checkpoint.py."""
    return import_from(Path(__file__).resolve().parent, "checkpoint").load(run)
