"""The common parts of the studies: settings, records, and the small pieces of their figures."""

import io
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from common import run

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image
from tqdm import tqdm

import data

WIDTH = 9  # inches of a figure


@dataclass
class Context:
    """One part of a study: its arguments, and the path of its record."""

    name: str  # of the record: STUDY-PART
    out: Path
    command: list[str]
    quick: bool = False
    seeds: int | None = None  # of --seeds
    images: str = "auto"
    data_dir: str | None = None
    jobs: int = 1
    facts: dict = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def pick(self, full, quick):
        """A size of the study: `full`, or `quick` with --quick."""
        return quick if self.quick else full

    def seeds_of(self, full: int = 3, quick: int = 1) -> range:
        """The seeds: those of --seeds, else the first `full`, or `quick` with --quick."""
        return range(self.seeds or self.pick(full, quick))

    def digits(self, train: int, test: int = 10_000, flat: bool = True) -> tuple[data.Digits, data.Digits]:
        """The first `train` training and `test` test images; 150 and 50 with --quick. Raises UserError."""
        train_set, _, test_set, facts = data.load(self.images, self.data_dir)
        if len(train_set.classes) != 10:
            raise run.UserError(f"--data {self.images}: has {len(train_set.classes)} classes; the studies are for ten")
        train_set = train_set.subset(self.pick(train, 150), flat)
        test_set = test_set.subset(self.pick(test, 50), flat)
        self.facts["dataset"] = facts | {"train": len(train_set), "test": len(test_set)}
        return train_set, test_set

    def points(self, name: str) -> tuple[data.Points, data.Points]:
        """Training and test points of the function `name`."""
        train_set, _, test_set, facts = data.load_function(name)
        self.facts.setdefault("dataset", facts)
        return train_set, test_set

    def map(self, function: Callable, tasks: Iterable[tuple]) -> list:
        """[function(*task) for each task], in `jobs` processes of one thread each, with a progress bar."""
        tasks = list(tasks)
        bar = dict(desc=self.name, total=len(tasks), leave=False, disable=None)
        if self.jobs == 1:
            return [function(*task) for task in tqdm(tasks, **bar)]
        with multiprocessing.get_context("spawn").Pool(self.jobs, torch.set_num_threads, (1,)) as pool:
            results = [pool.apply_async(function, task) for task in tasks]
            return [result.get() for result in tqdm(results, **bar)]

    def save(self, rows: list[dict], draw: Callable[[dict], Figure], **facts) -> dict:
        """Write the record STUDY-PART.json, and the figure STUDY-PART.png that `draw` makes of the record alone."""
        machine = run.environment(torch.device("cpu"), Path(__file__).parents[1] / "sweep.py")
        rows = [{"study": self.name, "state": "done", "command": self.command} | row for row in rows]
        record = {
            "study": self.name,
            "quick": self.quick,
            **machine,
            **self.facts,
            **rounded(facts),
            "wall_s": round(time.monotonic() - self.began, 1),
            "rows": rounded(rows),
        }
        run.write_json(self.out / f"{self.name}.json", record)
        write_small_figure(self.out / f"{self.name}.png", draw(record))
        print(f"{self.name}: {record['wall_s']:.0f} s -> {run.display_path(self.out / self.name)}.json, .png")
        return record


def write_small_figure(path: Path, figure: Figure):
    """Write a figure as a PNG of 128 colours, a third of the size: the committed ones must be below 150 KB."""
    run.write_figure(path, figure)
    content = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    run.write(path, content.getbuffer())


def rounded(value):
    """Numbers to five significant digits, in lists and dicts and arrays too: enough for a curve in a record."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value


def groups(rows: list[dict], *keys: str) -> dict:
    """{the values of `keys` (one key: the value): the rows that have them}, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys) if len(keys) > 1 else row[keys[0]], []).append(row)
    return found


def log_steps(steps: int, count: int = 80) -> np.ndarray:
    """About `count` step numbers from 1 to `steps`, evenly on a log scale."""
    return np.unique(np.geomspace(1, steps, count).round().astype(int))


def draw_band(axes, x, curves, label, style="-", color=None):
    """The mean of `curves` (runs, points) over runs, and a band from the lowest to the highest."""
    curves = np.array(curves, dtype=float)
    (line,) = axes.plot(x, curves.mean(0), style, label=label, color=color)
    if len(curves) > 1:
        axes.fill_between(x, curves.min(0), curves.max(0), alpha=0.15, color=line.get_color(), lw=0)
    return line.get_color()


def panels(rows: int, columns: int, height: float = 3.1):
    """(figure, axes (rows, columns)). Every figure is equally wide, so that its letters are equally large on a page."""
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish_axes(axes):
    """A grid, and a legend if something has a label."""
    for panel in np.ravel(axes):
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)


def label_plainly(axis):
    """Numbers such as 0.2 and 0.5 at a logarithmic axis that spans few powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
