"""Curves against epochs or iterations."""

from pathlib import Path

from common.files import write_figure

import numpy as np


def draw_curves(rows: list[dict], path: Path):
    """One panel per quantity: train_X and val_X of the metrics `rows` against their first column."""
    from matplotlib.figure import Figure

    quantities = list(dict.fromkeys(c.split("_", 1)[1] for c in rows[0] if c.startswith(("train_", "val_"))))
    x = next(iter(rows[0]))
    figure = Figure(figsize=(4.5 * len(quantities), 3.4), layout="constrained")
    for axes, quantity in zip(np.atleast_1d(figure.subplots(1, len(quantities))), quantities):
        for part, style in (("train", "--"), ("val", "-")):
            points = [(row[x], row[f"{part}_{quantity}"]) for row in rows if f"{part}_{quantity}" in row]
            if points:
                axes.plot(*zip(*points), style, marker="." if len(points) < 30 else None, label=part)
        axes.set(xlabel=x, title=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    write_figure(path, figure)


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
