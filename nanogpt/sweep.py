"""Studies: many runs of train.py, each study a record and a figure.

    python nanogpt/sweep.py --study clock --seeds 1 --jobs 1    # loss against seconds: nanoGPT's recipe, fast, best
    python nanogpt/sweep.py --study seeds                       # how much cpu and fast depend on the seed
    python nanogpt/sweep.py --study options                     # what each modern option does to the loss
    python nanogpt/sweep.py --study words --jobs 1              # bigram, MLP and GPT of equal size, in equal time
    python nanogpt/sweep.py --study options --list              # only print the commands, for another engine to run

Given again, the same command continues where it stopped. --jobs 1 gives each run all cores, for studies of seconds.
Under --out: a run folder for every setting and seed, results.txt, and for every study STUDY.json and STUDY.png.
"""

import argparse
from pathlib import Path

from common import run, study

import numpy as np
from matplotlib.figure import Figure

import data
import train

STUDIES = {  # study: {setting: arguments of train.py}
    "clock": {name: dict(recipe=name) for name in ("cpu", "fast", "best")},
    "seeds": {name: dict(recipe=name) for name in ("cpu", "fast")},
    "options": {
        "GPT-2, AdamW": dict(recipe="muon", muon=0.0, beta2=0.99, weight_decay=0.1, clip=1.0),
        "GPT-2, Muon": dict(recipe="muon"),
        "+ rotary positions": dict(recipe="muon", model=dict(rotary=True)),
        "+ RMSNorm": dict(recipe="muon", model=dict(norm="rms")),
        "+ squared ReLU": dict(recipe="muon", model=dict(mlp="relu2")),
        "+ SwiGLU": dict(recipe="muon", model=dict(mlp="swiglu")),
        "+ QK-norm": dict(recipe="muon", model=dict(qk_norm=True)),
        "+ rotary, QK-norm, squared ReLU": dict(recipe="muon", model=dict(rotary=True, qk_norm=True, mlp="relu2")),
    },
    "words": {name: dict(recipe=name) for name in ("word-bigram", "word-mlp", "word-gpt")},
}


def folder_of(out, name, setting, seed):
    return out / f"{name}-{list(STUDIES[name]).index(setting)}-s{seed}"


def jobs_of(args, out):
    """The runs of the studies, seed by seed: a sweep that is stopped early has all settings with fewer seeds."""
    dataset = args.data if args.list else data.choose(args.data, run.data_dir(args.data_dir))
    changes = {name: getattr(args, name) for name in ("limit", "iters") if getattr(args, name) is not None}
    where, jobs = ["--data-dir", args.data_dir] if args.data_dir else [], []
    for seed in range(args.seeds):
        for name in args.study:
            for setting, values in STUDIES[name].items():
                argv = run.to_argv(train.parser(), values | dict(data=dataset, seed=seed) | changes) + where
                recipe = train.RECIPES[values["recipe"]] | changes
                cost = recipe["iters"] * recipe["bs"] * recipe["model"]["block_size"]  # tokens
                jobs.append(study.Job(folder_of(out, name, setting, seed), argv, cost))
    return jobs


def row_of(name, setting, seed, out):
    """The row of the record: the values of study.row, and the curve [[iteration, seconds, validation loss], ...]."""
    curves = dict(iter="iter", seconds="seconds", val_loss="val_loss")
    row = study.row(name, setting, seed, folder_of(out, name, setting, seed), **curves)
    return row | {"curve": list(zip(*(row.pop(column, []) for column in curves)))}


def draw(name, rows, path):
    """Validation loss against seconds, a line for each run. Study options: bars of the final losses."""
    rows = [row for row in rows if row["state"] == "done"]
    if not rows:
        return
    figure, settings = Figure(figsize=(6.5, 4), layout="constrained"), list(dict.fromkeys(r["setting"] for r in rows))
    axes, losses = figure.subplots(), [row["final"]["val_loss"] for row in rows]
    for i, setting in enumerate(settings):
        runs = [row for row in rows if row["setting"] == setting]
        final = [row["final"]["val_loss"] for row in runs]
        if name == "options":
            axes.barh(i, np.mean(final), color="tab:blue", alpha=0.6)
            axes.plot(final, [i] * len(final), "k.", markersize=4)
            continue
        for row in runs:
            _, seconds, curve = zip(*row["curve"])
            axes.plot(seconds, curve, ".-", color=f"C{i}", label=setting if row is runs[0] else None)
    if name == "options":
        axes.set_yticks(range(len(settings)), settings)
        axes.invert_yaxis()
        axes.set(xlim=(min(losses) - 0.1, max(losses) + 0.03), xlabel="validation loss after the same number of steps")
    else:
        axes.set(xlabel="seconds, with evaluations", ylabel="validation loss", xscale="log")
        axes.set(ylim=(min(losses) - 0.05, min(losses) + 1.2))
        axes.legend()
    axes.grid(alpha=0.3)
    run.write_figure(path, figure)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study.add_flags(p, STUDIES)
    run.add_flags(p, "data_dir", data=dict(type=data.dataset_arg, default="auto", help=data.DATA_HELP),
                  out=dict(default=str(run.ROOT / "out" / "nanogpt" / "sweep"), help="folder of the study"),
                  limit=dict(help="only the first N tokens of each part, for a quick look"),
                  iters=dict(help="instead of each setting's own, for a quick look"))  # fmt: skip
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    out = Path(args.out)
    if not study.run_jobs(train, jobs_of(args, out), args):
        return
    for name in args.study:
        rows = [row_of(name, setting, seed, out) for seed in range(args.seeds) for setting in STUDIES[name]]
        run.write_json(out / f"{name}.json", {"study": name, "rows": rows})
        draw(name, rows, out / f"{name}.png")
        for setting in STUDIES[name]:
            runs = [row for row in rows if row["setting"] == setting]
            losses = [row["final"]["val_loss"] for row in runs if row["state"] == "done"]
            mean = f"{np.mean(losses):.4f}" if losses else "none"
            print(f"{name:8} {setting:34} validation loss {mean}, {len(losses)} of {len(runs)} runs finished")


if __name__ == "__main__":
    run.cli(main)
