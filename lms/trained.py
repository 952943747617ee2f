"""Load the weights of a run, and call them on rows."""

from pathlib import Path
from typing import NamedTuple

from common import run

import numpy as np


class Trained(NamedTuple):
    """A linear model: the names of the M inputs, in their order, and their weights (M,). The input `bias` is 1."""

    columns: list[str]
    weights: np.ndarray

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """inputs (N, M) -> (N,)"""
        return inputs @ self.weights


def load(folder: str | Path) -> Trained:
    """The last weights of the run in `folder`. Raises UserError."""
    folder = Path(folder)
    record = run.read_record(folder / "run.json")
    if record["experiment"] != "lms":
        raise run.UserError(f"{folder}: holds a run of {record['experiment']}/")
    last = run.read_checkpoint(folder / "last.pt")
    columns = record.get("columns")
    weights = last["model"]["w"].numpy()
    if not np.isfinite(weights).all():
        raise run.UserError(f"{last.path}: is damaged: it has weights that are not finite")
    if not isinstance(columns, list) or len(columns) != len(weights):
        raise run.UserError(f"{folder}: has no names of its inputs, as in a run of an earlier version; train again")
    return Trained(columns, weights)
