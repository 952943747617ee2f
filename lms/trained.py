"""Load the weights of a run, and call them on rows."""

from pathlib import Path
from typing import NamedTuple

from common import run

import numpy as np


class Trained(NamedTuple):
    """A linear model: the names of the M inputs, in their order, and their weights (M,). The input `bias` is 1.

    mean, std: (M,), of the columns of a CSV, whose weights are for the columns with mean 0 and standard deviation 1.
    """

    columns: list[str]
    weights: np.ndarray
    mean: np.ndarray | float = 0.0
    std: np.ndarray | float = 1.0

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """inputs (N, M), as they are in the CSV -> (N,)"""
        return (inputs - self.mean) / self.std @ self.weights


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
    if record["dataset"]["builtin"]:
        return Trained(columns, weights)
    return Trained(columns, weights, *scale_of(record, folder))


def scale_of(record: dict, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation of each input of a run on a CSV. Raises UserError."""
    scale = record.get("scale")
    try:
        mean, std = np.array(scale["mean"], dtype=float), np.array(scale["std"], dtype=float)
    except (KeyError, TypeError, ValueError) as error:
        problem = "has no scale of its inputs, as in a run of an earlier version; train again"
        raise run.UserError(f"{folder}: {problem}") from error
    if not mean.shape == std.shape == (len(record["columns"]),) or not (np.isfinite(mean).all() and (std > 0).all()):
        raise run.UserError(f"{folder}: is damaged: the scale of its inputs is not valid")
    return mean, std
