"""Two regression problems with known answers, and any CSV of numbers.

    python lms/data.py                                          # describe the plane
    python lms/data.py --data fir                               # the unknown filter
    python lms/data.py --data houses.csv --target price         # numbers of your own

builtin is a plane over two correlated features, small enough to be seen in three dimensions. fir is what adaptive
filters are bought for: an unknown system is heard only through a coloured input and a noisy output.
"""

import argparse
import csv
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import run
from run import UserError

PLANE = np.array([2.0, -3.0, 1.0])  # the true weights of x1, x2 and the bias
TAPS = 16
RESPONSE = np.exp(-np.arange(TAPS) / 4) * np.cos(0.9 * np.arange(TAPS))  # of the unknown filter: a damped ringing


@dataclass
class Regression:
    """Rows of inputs and what they should give: target = inputs @ weights + noise."""

    name: str
    columns: list[str]  # a name for each of the M inputs
    inputs: np.ndarray  # (N, M) float64, to adapt on
    targets: np.ndarray  # (N,)
    val_inputs: np.ndarray  # (N_val, M), a fifth of the rows, never adapted on
    val_targets: np.ndarray  # (N_val,)
    true_weights: np.ndarray | None = None  # (M,), where they are known

    @property
    def digest(self):
        whole = hashlib.blake2b(digest_size=16)
        for array in (self.inputs, self.targets, self.val_inputs, self.val_targets):
            whole.update(np.ascontiguousarray(array))
        return whole.hexdigest()


def training_rows(n):
    """All but the last fifth, which validates."""
    return n - max(1, n // 5)


def split(name, columns, inputs, targets, true_weights=None):
    """A Regression whose last rows validate: inputs (N, features), targets (N,)."""
    n = training_rows(len(targets))
    return Regression(name, columns, inputs[:n], targets[:n], inputs[n:], targets[n:], true_weights)


def plane(seed: int = 0, n: int = 2500) -> Regression:
    """targets = 2 x1 - 3 x2 + 1 + noise of deviation 0.5; x1, x2 standard normal with correlation 0.5."""
    rng = np.random.default_rng(seed)
    x1, x2, noise = rng.normal(size=(3, n))
    inputs = np.stack([x1, 0.5 * x1 + math.sqrt(0.75) * x2, np.ones(n)], 1)  # (n, 3)
    return split("builtin", ["x1", "x2", "bias"], inputs, inputs @ PLANE + 0.5 * noise, PLANE)


def fir(seed: int = 0, n: int = 2500, response: np.ndarray = RESPONSE) -> Regression:
    """targets[k] = sum_i response[i] u[k - i] + noise of deviation 0.1, for u[k] = 0.8 u[k - 1] + white noise.

    u has variance 1; neighbouring samples resemble each other, so that the eigenvalues of its correlation matrix
    spread sixty-fold: this is what makes LMS slow. Rows are in the order of time: row k is u[k], u[k - 1], ...
    """
    rng = np.random.default_rng(seed)
    taps = len(response)
    white, u = rng.normal(size=n + taps - 1), np.empty(n + taps - 1)
    u[0] = white[0]
    for k in range(1, len(u)):
        u[k] = 0.8 * u[k - 1] + 0.6 * white[k]  # 0.8^2 + 0.6^2 = 1 keeps the variance
    inputs = np.lib.stride_tricks.sliding_window_view(u, taps)[:, ::-1].copy()  # (n, taps)
    columns = [f"u[k-{i}]" for i in range(taps)]
    return split("fir", columns, inputs, inputs @ response + 0.1 * rng.normal(size=n), response)


def read_csv(path, target):
    """(names, values float64 (N, columns)) of a CSV with a line of names above numbers. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            names = [name.strip() for name in next(lines, [])]
            if target not in names:
                said = " ".join(", ".join(names).split())[:300] or "none"
                raise UserError(f"{path}: has no column {target!r}; its first line names {said}")
            if len(set(names)) < len(names) or len(names) < 2:
                raise UserError(f"{path}: wants two columns or more, each with a name of its own, in its first line")
            rows = []
            for cells in lines:
                if cells:  # blank lines are no rows
                    if len(cells) != len(names):
                        raise UserError(f"{path}, line {lines.line_num}: {len(cells)} cells for {len(names)} columns")
                    rows.append(
                        [
                            number(cell, f"{path}, line {lines.line_num}, column {name!r}")
                            for cell, name in zip(cells, names)
                        ]
                    )
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV text ({error})") from None
    return names, np.array(rows, dtype=np.float64).reshape(-1, len(names))


def number(cell, where):
    """The float in a cell of a CSV; `where` it is names it in the UserError."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        said = f"{cell.strip()[:40]!r} is no number" if cell.strip() else "the cell is empty"
        raise UserError(f"{where}: {said}; fill it or leave the row out")
    return value


def from_csv(path, target) -> Regression:
    """The columns of a CSV but `target`, each brought to mean 0 and deviation 1 over the training rows, and a bias.

    Without that the largest column alone would dictate the step size. Rows are put in a random order that is always
    the same, then the last fifth validates. Raises UserError.
    """
    names, values = read_csv(path, target)
    values = values[np.random.default_rng(0).permutation(len(values))]
    at = names.index(target)
    features, targets = np.delete(values, at, axis=1), values[:, at]
    n = training_rows(len(targets))
    if n < len(names):  # as many weights as columns: a bias stands where the target stood
        raise UserError(
            f"{path}: {len(targets)} rows, {max(n, 0)} of them to adapt on, cannot fix {len(names)} "
            "weights; it wants more rows or fewer columns"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = features[:n].mean(0), features[:n].std(0)
        inputs = np.c_[(features - mean) / np.where(std > 0, std, 1.0), np.ones(len(targets))]
        if not (np.isfinite(inputs).all() and np.isfinite(std).all() and np.isfinite(targets @ targets)):
            raise UserError(f"{path}: numbers so large that their squares overflow; scale the columns down")
        if targets[:n] @ targets[:n] == 0:
            raise UserError(f"{path}: column {target!r} is zero, or its squares are: there is nothing to predict")
    return split(Path(path).stem, [*np.delete(names, at).tolist(), "bias"], inputs, targets)


BUILT_IN = {"builtin": plane, "fir": fir}
DATA_HELP = "builtin, a plane over two features; fir, an unknown filter; or a CSV with a line of names above numbers"


def known(name):
    """The argparse type of --data."""
    if name in BUILT_IN or Path(name).is_file():
        return name
    raise argparse.ArgumentTypeError(f"{name} is neither {', '.join(BUILT_IN)} nor a file")


def add_data_flags(parser):
    """--data and --target, the same in every script."""
    run.add_flags(parser, data=dict(type=known, default="builtin", help=DATA_HELP))
    parser.add_argument("--target", metavar="COLUMN", help="the column of the CSV that is to be predicted")


def parse(parser, argv, namespace=None):
    """Parse `argv`; --target without a CSV, or a CSV without it, is an error."""
    args = parser.parse_args(argv, namespace)
    if (args.data in BUILT_IN) == (args.target is not None):
        parser.error(
            f"--data {args.data} "
            + (
                "has its own target; leave --target out"
                if args.target is not None
                else "wants --target COLUMN, the column to predict"
            )
        )
    return args


def load(args) -> Regression:
    """The problem that --data and --target name. Raises UserError."""
    return BUILT_IN[args.data]() if args.data in BUILT_IN else from_csv(args.data, args.target)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(p)
    return p


def main(argv=None):
    problem = load(parse(parser(), argv))
    print(
        f"{problem.name}: {len(problem.targets):,} rows to adapt on, {len(problem.val_targets):,} to validate, "
        f"digest {problem.digest}"
    )
    for i, name in enumerate(problem.columns):
        truth = "" if problem.true_weights is None else f"   true weight {problem.true_weights[i]:7.4f}"
        column = problem.inputs[:, i]
        print(f"{name:>12}: mean {column.mean():7.4f}   deviation {column.std():7.4f}{truth}")


if __name__ == "__main__":
    run.cli(main)
