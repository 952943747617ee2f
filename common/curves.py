"""Curves against epochs or iterations."""

import math
from pathlib import Path

from common.files import plain_text, write_figure

import numpy as np

WIDE = 1000  # values whose largest is this many times the smallest are drawn on a logarithmic scale
PANELS_IN_A_LINE = 5
LARGEST = 1e240  # of what is drawn: beyond it, the next tick of matplotlib's axis may overflow


def draw_curves(rows: list[dict], path: Path, title: str, best: float | None = None, explosion: list[dict] = ()):
    """One panel per quantity: train_X and val_X of the metrics `rows` against their first column.

    best: the value of the first column where the weights of best.pt are from, which a line marks. explosion: of a run
    that has diverged, {"step": number, "loss": number} up to the step that is not finite; it has a panel of its own.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(rows[0]) if rows else []
    quantities = list(dict.fromkeys(c.split("_", 1)[1] for c in names if c.startswith(("train_", "val_"))))
    count = len(quantities) + bool(explosion)
    lines = math.ceil(count / PANELS_IN_A_LINE)
    width = math.ceil(count / lines)
    figure = Figure(figsize=(4.5 * width, 3.6 * lines), layout="constrained")
    figure.suptitle(plain_text(title), fontsize=10)
    grid = figure.subplots(lines, width, squeeze=False).flatten()
    panels = grid[:count]
    for axes in grid[count:]:
        axes.axis("off")
    for axes, quantity in zip(panels, quantities):
        drawn = []
        for part, style in (("train", "--"), ("val", "-")):
            columns = [names[0], f"{part}_{quantity}"]
            points = [[row[name] for name in columns] for row in rows if row.keys() >= set(columns)]
            if points:
                x, values = zip(*points)
                values = without_overflow(values)
                axes.plot(x, values, style, marker="." if len(points) < 30 else None, label=part)
                drawn += values
        if best is not None:
            axes.axvline(best, color="0.5", ls=":", lw=1.2, label=f"best.pt: {names[0]} {best:g}")
        axes.set(xlabel=names[0], title=quantity)
        choose_scale(axes, drawn)
    if explosion:
        axes = panels[-1]
        steps = [row["step"] for row in explosion]
        losses = without_overflow([row["loss"] for row in explosion])
        axes.plot(steps, losses, color="tab:red", marker="." if len(steps) < 30 else None, label="training loss")
        axes.axvline(steps[-1], color="k", ls=":", lw=1.2, label=f"not finite at step {steps[-1]}")
        axes.set(xlabel="step", title="each step before the explosion")
        choose_scale(axes, losses)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    write_figure(path, figure)


def without_overflow(values: list[float]) -> list[float]:
    """`values` with NaN, of which nothing is drawn, for those that are too large to draw."""
    return [value if abs(value) < LARGEST else math.nan for value in values]


def choose_scale(axes, values: list[float]):
    """Draw `values` on a logarithmic scale if their sizes are so different that the small ones would look like zero."""
    finite = np.array([value for value in values if math.isfinite(value)])
    sizes = np.abs(finite[finite != 0])
    if len(sizes) == 0 or sizes.max() < WIDE * sizes.min():
        return
    if (finite > 0).all():
        axes.set_yscale("log")
    elif sizes.max() > WIDE * np.median(sizes):
        axes.set_yscale("symlog", linthresh=np.median(sizes))


def draw_epochs(axes, rows: list[dict], quantity: str = "val_accuracy", label: str = "validation accuracy"):
    """The curves `quantity` in the rows of a study against epochs: for each setting a line for the mean over seeds, and
    a band from the lowest to the highest. Runs that have not ended are left out."""
    from matplotlib.ticker import MaxNLocator

    for setting in dict.fromkeys(row["setting"] for row in rows):
        curves = [row[quantity] for row in rows if row["setting"] == setting and row["state"] == "done"]
        if curves:
            x = range(1, len(curves[0]) + 1)
            (line,) = axes.plot(x, np.mean(curves, 0), label=setting, zorder=3 - len(x) / 1000)  # short ones on top
            axes.fill_between(x, np.min(curves, 0), np.max(curves, 0), alpha=0.15, color=line.get_color())
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
