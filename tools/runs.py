"""List the run folders below a folder, and draw the validation curves of some of them over each other.

    python tools/runs.py                                  # all runs below out/
    python tools/runs.py out/cifar                        # the runs of one experiment
    python tools/runs.py out/cifar --draw lenet5 best     # runs.png: the runs whose folder names contain these words

The table has a line for each run: experiment, data, model, state, epochs or iterations, best validation and test score,
seconds, commit.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.files import csv_reader, write_figure  # noqa: E402
from common.records import read_record  # noqa: E402
from common.terminal import UserError, cli, printable  # noqa: E402

COLUMNS = ("folder", "experiment", "data", "model", "state", "length", "validation", "test", "seconds", "commit")


def find_runs(folder: Path) -> list[tuple[Path, dict]]:
    """(run folder, record) of every run below `folder`, the oldest first. Records that cannot be read are skipped, with
    a line on standard error."""
    runs = []
    for file in sorted(folder.rglob("run.json")):
        try:
            runs.append((file.parent, read_record(file)))
        except UserError as error:
            print(f"skipped: {printable(error)}", file=sys.stderr)
    return sorted(runs, key=lambda entry: str(entry[1].get("started")))


def score(final: dict, part: str) -> str:
    """The accuracy of a part, else its first other score, else its loss."""
    named = {name.removeprefix(f"{part}_"): value for name, value in final.items() if name.startswith(f"{part}_")}
    named = {name: value for name, value in named.items() if isinstance(value, int | float)}
    for name in ("accuracy", *(name for name in named if name != "loss"), "loss"):
        if name in named:
            return f"{name} {named[name]:.4f}"
    return ""


def line(folder: Path, record: dict, top: Path) -> dict:
    args = record["args"]
    final = record.get("final") or {}
    git = record.get("git") or {}
    length = next((f"{args[name]} {name}" for name in ("epochs", "iters") if args.get(name)), "")
    model = args.get("model") if isinstance(args.get("model"), str) else args.get("recipe", "")
    row = {
        "folder": str(folder.relative_to(top)),
        "experiment": record["experiment"],
        "data": str((record.get("dataset") or {}).get("name", args.get("data", ""))),
        "model": str(model),
        "state": record["state"],
        "length": length,
        "validation": score(final, "val"),
        "test": score(final, "test"),
        "seconds": f"{record['wall_s']:.0f}",
        "commit": str(git.get("commit", ""))[:7] + ("*" if git.get("dirty") else ""),
    }
    return {name: printable(value) for name, value in row.items()}


def print_table(lines: list[dict]):
    widths = {name: max(len(name), *(len(row[name]) for row in lines)) for name in COLUMNS}
    for row in [dict(zip(COLUMNS, COLUMNS)), *lines]:
        print("  ".join(f"{row[name]:{widths[name]}}" for name in COLUMNS).rstrip())


def read_metrics(file: Path) -> dict[str, list[float]]:
    """The columns of a metrics.csv, without a last row that a killed run cut short. Raises UserError."""
    try:
        if not file.is_file():  # a FIFO would wait for ever
            raise ValueError("not a regular file")
        with csv_reader(file, file.read_text(encoding="utf-8")) as lines:
            header, *rows = [line for line in lines if line]
        if rows and len(rows[-1]) < len(header):
            rows.pop()
        if any(len(row) != len(header) for row in rows):
            raise ValueError("rows of different lengths")
        return {name: [float(row[i]) for row in rows] for i, name in enumerate(header)}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not a table of numbers ({error})") from error


def draw(runs: list[tuple[Path, dict]], path: Path):
    """One panel per validation score, one line per run."""
    from matplotlib.figure import Figure

    curves = {}  # {(name of x, score): [(label, (x, y)), ...]}
    for folder, _ in runs:
        if not (folder / "metrics.csv").exists():
            continue
        try:
            columns = read_metrics(folder / "metrics.csv")
        except UserError as error:
            print(f"skipped: {printable(error)}", file=sys.stderr)
            continue
        for name, values in columns.items():
            if name.startswith("val_") and values:
                x = next(iter(columns))
                points = columns[x], values
                curves.setdefault((x, name.removeprefix("val_")), []).append((folder.name, points))
    if not curves:
        raise UserError("none of these runs has a validation score in its metrics.csv")
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    for axes, ((x, name), lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for label, points in lines:
            axes.plot(*points, label=label.replace("$", r"\$"))
        axes.set(xlabel=x, title=f"validation {name}")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    write_figure(path, figure)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", nargs="?", type=Path, default=ROOT / "out", help="(default: out/ of the repository)")
    p.add_argument("--draw", nargs="*", metavar="WORD", help="draw the runs whose folders contain one of these words")
    p.add_argument("--png", type=Path, default=Path("runs.png"), metavar="FILE", help="(default: %(default)s)")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    runs = find_runs(args.folder)
    if not runs:
        raise UserError(f"{args.folder}: holds no run that can be read")
    print_table([line(folder, record, args.folder) for folder, record in runs])
    if args.draw is not None:
        chosen = [(f, r) for f, r in runs if not args.draw or any(word in f.name for word in args.draw)]
        draw(chosen, args.png)
        print(f"{len(chosen)} runs -> {printable(args.png)}")


if __name__ == "__main__":
    cli(main)
