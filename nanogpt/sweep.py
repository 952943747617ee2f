"""Studies: many runs of train.py, each study a record and a figure.

    python nanogpt/sweep.py --study clock      # loss against seconds: nanoGPT's recipe, `fast`, three minutes
    python nanogpt/sweep.py --study seeds      # how much of `cpu` and `fast` is luck
    python nanogpt/sweep.py --study options    # what each modern option does to the loss, and to the clock
    python nanogpt/sweep.py --study words      # bigram, MLP and GPT, of equal size and in equal time

Given again, it continues where it stopped. Under --out: a run folder for every setting and seed, and for every study
STUDY.json and STUDY.png. Runs of `seeds` and `options` go one a core, with one thread each; the others, where seconds
are what is asked for, one after the other with all threads.
"""

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import data
import run
import train

PLAIN = train.FAST | dict(iters=500, evals=5, model=train.GPT)
STUDIES = {  # study: {setting: recipe}
    "clock": {name: train.RECIPES[name] for name in ("cpu", "fast", "best")},
    "seeds": {name: train.RECIPES[name] for name in ("cpu", "fast")},
    "options": {
        "GPT-2, AdamW": PLAIN | dict(muon=0.0, beta2=0.99, weight_decay=0.1, clip=1.0),
        "GPT-2, Muon": PLAIN,
        "+ rotary positions": PLAIN | dict(model=train.GPT | dict(rotary=True)),
        "+ RMSNorm": PLAIN | dict(model=train.GPT | dict(norm="rms")),
        "+ squared ReLU": PLAIN | dict(model=train.GPT | dict(mlp="relu2")),
        "+ SwiGLU": PLAIN | dict(model=train.GPT | dict(mlp="swiglu")),
        "+ QK-norm": PLAIN | dict(model=train.GPT | dict(qk_norm=True)),
        "+ rotary, QK-norm, squared ReLU": PLAIN | dict(model=train.MODERN),
    },
    "words": {name: train.RECIPES[name] for name in ("word-bigram", "word-mlp", "word-gpt")},
}


def one_run(job):
    """Train one setting with one seed, or continue it; a run that is over is left alone. Returns its row."""
    folder, study, setting, seed, flags, where = job
    train.RECIPES[setting] = STUDIES[study][setting]  # a setting is a recipe like any other
    record_file, told = folder / "run.json", ["--recipe", setting, "--seed", str(seed)]
    if not run.ended(folder, train.parse([*told, *flags])):
        resumed = record_file.exists()
        words = ["--resume", str(folder), *where] if resumed else [*told, "--out", str(folder), *flags, *where]
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            with contextlib.suppress(run.Diverged):  # a result like any other
                train.main(words)
    record = json.loads(record_file.read_text(encoding="utf-8"))
    keys = (
        "state",
        "args",
        "final",
        "diverged_at_step",
        "wall_s",
        "parameters",
        "tokens_per_step",
        "dataset",
        "device",
        "precision",
        "git",
        "versions",
    )
    row = {"study": study, "setting": setting, "seed": seed, "folder": folder.name} | {k: record.get(k) for k in keys}
    row["curve"] = []
    if (folder / "metrics.csv").exists():  # not where it diverged before its first evaluation
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            row["curve"] = [[float(line[k]) for k in ("iter", "seconds", "val_loss")] for line in csv.DictReader(file)]
    return row


def start_worker():
    torch.set_num_threads(1)


def draw(study, rows, path):
    """Validation loss against seconds, a line a run; of `options` the ends, against the first setting's."""
    if all(row["state"] == "diverged" for row in rows):
        return
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes, settings = figure.subplots(), list(dict.fromkeys(row["setting"] for row in rows))
    for i, setting in enumerate(settings):
        mine = [row for row in rows if row["setting"] == setting and row["state"] == "done"]
        if study == "options":
            ends = [row["final"]["val_loss"] for row in mine]
            axes.barh(i, np.mean(ends), color="tab:blue", alpha=0.6)
            axes.plot(ends, [i] * len(ends), "k.", markersize=4)
        else:
            for row in mine:
                _, seconds, losses = zip(*row["curve"])
                axes.plot(seconds, losses, ".-", color=f"C{i}", label=setting if row is mine[0] else None)
    ends = [row["final"]["val_loss"] for row in rows if row["state"] == "done"]
    if study == "options":
        axes.set_yticks(range(len(settings)), settings)
        axes.invert_yaxis()
        axes.set(xlim=(min(ends) - 0.1, max(ends) + 0.03), xlabel="validation loss after as many steps")
    else:
        axes.set(
            xlabel="seconds, evaluations included",
            ylabel="validation loss",
            xscale="log",
            ylim=(min(ends) - 0.05, min(ends) + 1.2),
        )
        axes.legend()
    axes.grid(alpha=0.3)
    run.write_figure(path, figure)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES), help="(default: all of them)")
    p.add_argument("--seeds", type=run.positive_int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    run.add_flags(
        p,
        "data_dir",
        out=dict(default=str(run.ROOT / "out" / "nanogpt" / "sweep"), help="where to"),
        data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP),
        limit=dict(help="only the first N tokens of each part, for a quick look"),
        iters=dict(help="instead of each setting's own, for a quick look"),
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    out = run.make_folder(args.out)
    lock = run.hold(out)
    for study in args.study:
        flags = ["--data", args.data]
        for name in ("limit", "iters"):
            if getattr(args, name) is not None:
                flags += [f"--{name}", str(getattr(args, name))]
        where = ["--data-dir", args.data_dir] if args.data_dir else []
        jobs = [
            (out / f"{study}-{i}-s{seed}", study, setting, seed, flags, where)
            for seed in range(args.seeds)
            for i, setting in enumerate(STUDIES[study])
        ]
        if study in ("seeds", "options"):
            with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), start_worker) as pool:
                rows = list(tqdm(pool.map(one_run, jobs), study, len(jobs), disable=None))
        else:
            rows = [one_run(job) for job in tqdm(jobs, study, disable=None)]
        run.write_json(out / f"{study}.json", {"study": study, "rows": rows})
        draw(study, rows, out / f"{study}.png")
        for setting in STUDIES[study]:
            ends = [row["final"]["val_loss"] for row in rows if row["setting"] == setting and row["state"] == "done"]
            mean = np.mean(ends) if ends else math.nan
            print(f"{study:8} {setting:34} validation loss {mean:.4f} of {len(ends)} runs")
    lock.close()


if __name__ == "__main__":
    run.cli(main)
