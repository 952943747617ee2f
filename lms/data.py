"""Two regression problems with known answers, and a reader for a CSV of numbers.

    python lms/data.py                                          # describe the plane
    python lms/data.py --data fir                               # the unknown filter
    python lms/data.py --data houses.csv --target price         # a CSV of your own

builtin is a plane over two correlated features, small enough to draw in three dimensions. fir is system identification,
the classic use of adaptive filters: an unknown filter, a coloured input, and its noisy output.
"""

import argparse
import csv
import hashlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from common import run
from common.options import option, short
from common.run import UserError

import numpy as np

PLANE = np.array([2.0, -3.0, 1.0])  # the true weights of x1, x2 and the bias
TAPS = 16
RESPONSE = np.exp(-np.arange(TAPS) / 4) * np.cos(0.9 * np.arange(TAPS))  # the unknown filter: a decaying cosine


@dataclass
class Regression:
    """A linear regression problem: target = inputs @ weights + noise."""

    name: str
    columns: list[str]  # the names of the M inputs
    inputs: np.ndarray  # (N, M) float64, for training
    targets: np.ndarray  # (N,)
    val_inputs: np.ndarray  # (N_val, M), a fifth of the rows, for validation
    val_targets: np.ndarray  # (N_val,)
    true_weights: np.ndarray | None = None  # (M,), if they are known
    mean: np.ndarray | None = None  # (M,), subtracted from the columns of a CSV, which are then divided by
    std: np.ndarray | None = None  # (M,)

    @property
    def digest(self) -> str:
        """A hash of all inputs and targets."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.inputs, self.targets, self.val_inputs, self.val_targets):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def training_rows(n: int) -> int:
    """The number of training rows among n; the last fifth is for validation."""
    return n - max(1, n // 5)


def split(
    name: str, columns: list[str], inputs: np.ndarray, targets: np.ndarray, true_weights: np.ndarray | None = None
) -> Regression:
    """A Regression from inputs (N, M) and targets (N,), whose last fifth is for validation."""
    n = training_rows(len(targets))
    return Regression(name, columns, inputs[:n], targets[:n], inputs[n:], targets[n:], true_weights)


def plane(seed: int = 0, n: int = 2500) -> Regression:
    """targets = 2 x1 - 3 x2 + 1 + noise of standard deviation 0.5; x1, x2 standard normal with correlation 0.5."""
    rng = np.random.default_rng(seed)
    x1, x2, noise = rng.normal(size=(3, n))
    inputs = np.stack([x1, 0.5 * x1 + math.sqrt(0.75) * x2, np.ones(n)], 1)  # (n, 3)
    return split("builtin", ["x1", "x2", "bias"], inputs, inputs @ PLANE + 0.5 * noise, PLANE)


def fir(seed: int = 0, n: int = 2500, response: np.ndarray = RESPONSE) -> Regression:
    """targets[k] = sum_i response[i] u[k - i] + noise of standard deviation 0.1, u[k] = 0.8 u[k - 1] + white noise.

    u has variance 1 and is correlated in time: the eigenvalues of its correlation matrix differ by a factor of 60,
    which makes LMS slow. Rows are in the order of time: row k is u[k], u[k - 1], ...
    """
    rng = np.random.default_rng(seed)
    taps = len(response)
    white, u = rng.normal(size=n + taps - 1), np.empty(n + taps - 1)
    u[0] = white[0]
    for k in range(1, len(u)):
        u[k] = 0.8 * u[k - 1] + 0.6 * white[k]  # 0.8^2 + 0.6^2 = 1: the variance stays 1
    inputs = np.lib.stride_tricks.sliding_window_view(u, taps)[:, ::-1].copy()  # (n, taps)
    columns = [f"u[k-{i}]" for i in range(taps)]
    return split("fir", columns, inputs, inputs @ response + 0.1 * rng.normal(size=n), response)


def read_csv(path: str | Path, wanted: list[str], all_columns: bool) -> tuple[list[str], np.ndarray]:
    """(names, values float64 (N, columns)) of a CSV with a line of names above lines of numbers. Raises UserError.

    wanted: names of columns that have to be there. all_columns: read the others too; else these may hold anything, and
    no wanted name stands for the only column.
    """
    file_name, rows = run.display_path(path), []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            names = [name.strip() for name in next(lines, [])]
            found = " ".join(", ".join(names).split())[:300] or "nothing"
            for name in wanted:
                if name not in names:
                    raise UserError(f"{file_name}: has no column {short(name)!r}; its first line has {found}")
            if len(set(names)) < len(names):
                raise UserError(f"{file_name}: needs columns with different names in its first line")
            if all_columns and len(names) < 2:
                raise UserError(f"{file_name}: needs at least two columns")
            if not all_columns and not wanted and len(names) != 1:
                raise UserError(f"{file_name}: needs --column NAME; its first line has {found}")
            read = names if all_columns else wanted or names
            for cells in lines:
                line = f"{file_name}, line {lines.line_num}"
                if cells and len(cells) != len(names):  # a blank line has none, and is skipped
                    raise UserError(f"{line}: has {len(cells)} cells for {len(names)} columns")
                if cells:
                    cells = dict(zip(names, cells))
                    rows.append([number(cells[name], f"{line}, column {name!r}") for name in read])
    except OSError as error:
        raise UserError(f"{file_name}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file_name}: is not a CSV text file ({error})") from error
    return read, np.array(rows, dtype=np.float64).reshape(-1, len(read))


def number(cell: str, place: str) -> float:
    """The float in a cell of a CSV. Raises UserError, which begins with `place`."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        problem = f"{cell.strip()[:40]!r} is not a number" if cell.strip() else "the cell is empty"
        raise UserError(f"{place}: {problem}; correct it or remove the row")
    return value


def from_csv(path: str | Path, target: str) -> Regression:
    """The inputs are all columns of a CSV but `target`, with mean 0 and standard deviation 1 over the training rows,
    and a bias.

    Without this scaling, the column with the largest numbers would limit the step size. Rows are shuffled, always in
    the same order. Raises UserError.
    """
    names, values = read_csv(path, [target], all_columns=True)
    values = values[np.random.default_rng(0).permutation(len(values))]
    column, file_name = names.index(target), run.display_path(path)
    features, targets = np.delete(values, column, axis=1), values[:, column]
    n = training_rows(len(targets))
    if n < len(names):  # one weight for each feature and one for the bias
        raise UserError(
            f"{file_name}: has too few rows ({len(targets)}, of which {max(n, 0)} for training) for "
            f"{len(names)} weights; add rows or remove columns"
        )
    if np.abs(values).max() > 1e100:
        raise UserError(f"{file_name}: has numbers above 1e100, whose squares may overflow; scale the columns down")
    if targets[:n] @ targets[:n] == 0:
        raise UserError(f"{file_name}: column {target!r} is zero, or its squares are: there is nothing to predict")
    std = features[:n].std(0)
    mean = np.append(features[:n].mean(0), 0.0)  # the bias stays 1
    largest = np.abs(features[:n]).max(0)
    std = np.append(np.where(std > 1e-12 * largest, std, 1.0), 1.0)  # of a constant column, rounding errors are left
    inputs = (np.c_[features, np.ones(len(targets))] - mean) / std
    problem = split(Path(path).stem, [*np.delete(names, column).tolist(), "bias"], inputs, targets)
    return replace(problem, mean=mean, std=std)


BUILT_IN = {"builtin": plane, "fir": fir}
DATA_HELP = "builtin: a plane over two features; fir: an unknown filter; or a CSV with a line of names above numbers"


def dataset_arg(text: str) -> str:
    """The argparse type of --data: a built-in problem, or the absolute path of a file."""
    if text in BUILT_IN:
        return text
    if os.path.isfile(text):
        return os.path.abspath(text)
    raise argparse.ArgumentTypeError(f"{short(text)!r} is neither {', '.join(BUILT_IN)} nor a file")


def data_option():
    """The field of --data, which is the same in every script."""
    return option("builtin", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")


def target_option():
    """The field of --target."""
    return option(None, "column of the CSV to predict", type=str, metavar="COLUMN")


def check_target(args) -> None:
    """Raise UserError if --target is given without a CSV, or a CSV without --target."""
    if args.data in BUILT_IN and args.target is not None:
        raise UserError(f"--target: --data {args.data} has its own target")
    if args.data not in BUILT_IN and args.target is None:
        raise UserError(f"--data {run.display_path(args.data)}: needs --target COLUMN, the column to predict")


def load(data: str, target: str | None = None) -> Regression:
    """The built-in problem `data`, or the CSV at the path `data` with the column `target`. Raises UserError."""
    return BUILT_IN[data]() if data in BUILT_IN else from_csv(data, target)


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = data_option()
    target: str | None = target_option()

    def check(self):
        check_target(self)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    problem = load(args.data, args.target)
    print(
        f"{problem.name}: {len(problem.targets):,} training rows, {len(problem.val_targets):,} validation rows, "
        f"digest {problem.digest}"
    )
    for i, name in enumerate(problem.columns):
        truth = "" if problem.true_weights is None else f"   true weight {problem.true_weights[i]:7.4f}"
        column = problem.inputs[:, i]
        print(f"{name:>12}: mean {column.mean():7.4f}   standard deviation {column.std():7.4f}{truth}")


if __name__ == "__main__":
    run.cli(main)
