"""Studies: many runs of train.py, each study a record and a figure.

    python nanogpt/sweep.py --study clock --seeds 1 --jobs 1    # loss against seconds: nanoGPT's recipe, fast, best
    python nanogpt/sweep.py --study seeds                       # how much cpu and fast depend on the seed
    python nanogpt/sweep.py --study options                     # what each modern option does to the loss
    python nanogpt/sweep.py --study words --jobs 1              # bigram, MLP and GPT of equal size, in equal time
    python nanogpt/sweep.py --study held-out --seeds 1          # what makes the recipe long better than best: an hour
    python nanogpt/sweep.py --study long                        # both on the validation text: an hour
    python nanogpt/sweep.py --study options --list              # only print the commands, for another engine to run

Run again, the same command continues where it stopped. --jobs 1 gives each run all cores, for studies of seconds.
Under --out: a run folder for every setting and seed, results.txt, and for every study STUDY.json and STUDY.png.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from common import run, study
from common.options import option

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import data
import train
from data import DATA_HELP, dataset_arg

STUDIES = {  # study: {setting: arguments of train.py}
    "clock": {name: dict(recipe=name) for name in ("cpu", "fast", "best")},
    "seeds": {name: dict(recipe=name) for name in ("cpu", "fast")},
    "options": {
        "GPT-2, AdamW": dict(recipe="muon", muon=0.0, beta2=0.99, weight_decay=0.1, clip=1.0),
        "GPT-2, Muon": dict(recipe="muon"),
        "+ rotary positions": dict(recipe="muon", rotary=True),
        "+ RMSNorm": dict(recipe="muon", norm="rms"),
        "+ squared ReLU": dict(recipe="muon", mlp="relu2"),
        "+ SwiGLU": dict(recipe="muon", mlp="swiglu"),
        "+ QK-norm": dict(recipe="muon", qk_norm=True),
        "+ rotary, QK-norm, squared ReLU": dict(recipe="muon", rotary=True, qk_norm=True, mlp="relu2"),
    },
    "words": {name: dict(recipe=name) for name in ("word-bigram", "word-mlp", "word-gpt")},
    "held-out": {  # what makes `long` better than `best`? The validation text is not read
        "best": dict(recipe="best", held_out=True),
        "long": dict(recipe="long", held_out=True),
        "without weight decay": dict(recipe="long", held_out=True, weight_decay=0.0),
        "without longer sequences": dict(recipe="long", held_out=True, block_size=128, first_block_size=None, bs=16),
        "without the average": dict(recipe="long", held_out=True, ema=0.0),
        "with dropout": dict(recipe="long", held_out=True, dropout=0.1, iters=2000),  # in as many seconds
        "with the steps of best": dict(recipe="long", held_out=True, iters=1800),
    },
    "long": {  # all of the training text; the validation text is read once, in the end
        "best": dict(recipe="best", evals=1),
        "long": dict(recipe="long", evals=1),
    },
}
SHORT = ("clock", "seeds", "options", "words")  # minutes of a run; a run of the recipe `long` takes six, of two cores


def folder_of(out, name, setting, seed):
    return out / f"{name}-{list(STUDIES[name]).index(setting)}-s{seed}"


def jobs_of(args, out):
    """The runs of the studies, seed by seed: a sweep that is stopped early has all settings with fewer seeds."""
    dataset = args.data if args.list else data.choose(args.data, run.data_dir(args.data_dir))
    changes = {name: getattr(args, name) for name in ("limit", "iters") if getattr(args, name) is not None}
    where = ["--data-dir", args.data_dir] if args.data_dir else []
    jobs = []
    for seed in range(args.seeds):
        for name in args.study:
            for setting, values in STUDIES[name].items():
                argv = study.argv_of(train, values | {"data": dataset, "seed": seed} | changes)
                options = replace(train.RECIPES[values["recipe"]], **values | changes)
                tokens = options.iters * options.bs * options.block_size
                jobs.append(study.Job(folder_of(out, name, setting, seed), argv + where, cost=tokens))
    return jobs


def row_of(name, setting, seed, out):
    """The row of the record: the values of study.row, and the curve [[iteration, seconds, validation loss], ...]."""
    curves = dict(iter="iter", seconds="elapsed_seconds", val_loss="val_loss")
    row = study.row(name, setting, seed, folder_of(out, name, setting, seed), **curves)
    columns = [row.pop(column, []) for column in curves]
    row["curve"] = list(zip(*columns))
    return row


def draw(record) -> Figure:
    """Validation loss against seconds, a line for each run. Study options: bars of the final losses."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    runs = {}  # setting: its rows
    for row in record["rows"]:
        if row["state"] == "done":
            runs.setdefault(row["setting"], []).append(row)
    if record["study"] == "options":
        draw_bars(axes, runs)
    else:
        draw_seconds(axes, runs)
    return figure


def draw_bars(axes, runs):
    """The mean of the final losses of each setting as a bar, and each run as a dot."""
    losses = {setting: [row["final"]["val_loss"] for row in rows] for setting, rows in runs.items()}
    values = [loss for setting in losses.values() for loss in setting]
    lowest = min(values, default=0)
    for i, setting in enumerate(losses.values()):
        mean = np.mean(setting)
        axes.barh(i, mean, color="tab:blue", alpha=0.6)
        axes.plot(setting, [i] * len(setting), "k.", markersize=4)
        axes.annotate(f"{mean:.3f}", (max(setting), i), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(losses)), list(losses))
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.set(xlim=(lowest - 0.1, max(values, default=0) + 0.06))
    axes.set(xlabel="validation loss after the same number of steps")


def draw_seconds(axes, runs):
    """A line for each run; the legend has the means of each setting."""
    for i, (setting, rows) in enumerate(runs.items()):
        for row in rows:
            _, seconds, losses = zip(*row["curve"])
            axes.plot(seconds, losses, ".-", color=f"C{i}")
        loss = np.mean([row["final"]["val_loss"] for row in rows])
        last = np.mean([row["curve"][-1][1] for row in rows])
        axes.lines[-1].set_label(f"{setting}: {loss:.2f} after {last:.0f} s")
    final = [row["final"]["val_loss"] for rows in runs.values() for row in rows]
    lowest = min(final, default=0)
    axes.set(xlabel="seconds, with evaluations", ylabel="validation loss", xscale="log")
    axes.set(ylim=(lowest - 0.05, lowest + 1.2))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


@dataclass(kw_only=True)
class Options(study.StudyOptions):
    study: tuple[str, ...] = study.study_option(STUDIES, SHORT)
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    out: str = option(str(run.ROOT / "out/nanogpt/sweep"), "folder of the study", type=run.path_arg, metavar="DIR")
    limit: int | None = option(None, "only the first N tokens of each part, for a quick look", above=0)
    iters: int | None = option(None, "steps instead of each setting's own, for a quick look", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    out = Path(args.out)
    if not study.run_jobs(train, jobs_of(args, out), args):
        return
    for name in args.study:
        rows = [row_of(name, setting, seed, out) for seed in range(args.seeds) for setting in STUDIES[name]]
        record = {"study": name, "rows": rows}
        run.write_json(out / f"{name}.json", record)
        run.write_figure(out / f"{name}.png", draw(record))
        for setting in STUDIES[name]:
            runs = [row for row in rows if row["setting"] == setting]
            losses = [row["final"]["val_loss"] for row in runs if row["state"] == "done"]
            mean = f"{np.mean(losses):.4f}" if losses else "none"
            print(f"{name:8} {setting:34} validation loss {mean}, {len(losses)} of {len(runs)} runs finished")


if __name__ == "__main__":
    run.cli(main)
