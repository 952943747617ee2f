"""Studies: several runs of train.py, each study a named table with a figure.

    python lstm_imdb/sweep.py --study plain                # three seeds of the plain recipe
    python lstm_imdb/sweep.py --study stop-words --jobs 2  # does it help to leave out stop words?
    python lstm_imdb/sweep.py --study pooling --list       # only print the commands

One process per core. Given again, the command continues where it stopped. Under --out: a run folder for every setting
and seed, results.txt, and for every study its record STUDY.json and its figure STUDY.png.
"""

import argparse
from pathlib import Path

from common import run, study

import numpy as np
from matplotlib.figure import Figure

import data
import train

STUDIES = {  # study: {setting: arguments of train.py}
    "plain": {"plain": dict(recipe="plain")},
    "best": {"best": dict(recipe="best")},
    "buckets": {"by length": dict(recipe="plain"), "in random order": dict(recipe="plain", bucket=1)},
    "vectors": {"standard deviation 1": dict(recipe="plain", embed_std=1.0),
                "standard deviation 0.1": dict(recipe="plain")},
    "stop-words": {"all words": dict(recipe="plain"), "no stop words": dict(recipe="plain", stop_words=True)},
    "pooling": {f"{pool}, {keep} of the review": dict(recipe="plain", pool=pool, keep=keep)
                for pool, keep in (("last", "start"), ("last", "end"), ("mean", "end"), ("max", "end"))},
    "truncation": {f"{n} words": dict(recipe="plain", max_len=n) for n in (100, 200, 400, 800)},
    "parts": {
        "best": dict(recipe="best"),
        "one direction": dict(recipe="best", bidirectional=False),
        "the last state": dict(recipe="best", pool="last"),
        "no word dropout": dict(recipe="best", word_dropout=0.0),
        "no adversarial training": dict(recipe="best", adversarial=0.0),
    },
}  # fmt: skip


def folder_name(setting, seed):
    """The same name for the same arguments, whichever study wants them."""
    words = [f"{v}" if k == "recipe" else f"{k}{v}" for k, v in setting.items() if train.PLAIN.get(k, "") != v
             or setting["recipe"] != "plain"]  # fmt: skip
    return "-".join([*words, f"s{seed}"])


def jobs_of(args, out):
    """Every run that the studies need."""

    def cost(values):
        recipe = train.RECIPES[values["recipe"]] | values
        return recipe["epochs"] * recipe["max_len"] * (1 + 2 * recipe["bidirectional"])

    def dataset(name, setting):
        return args.data

    return study.plan(train, STUDIES, args, lambda setting, seed: out / folder_name(setting, seed), dataset, cost)


def report(name, rows, out):
    """Write STUDY.json and STUDY.png, and print the table."""
    run.write_json(out / f"{name}.json", {"study": name, "rows": rows})
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    print(f"\n{name}")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        done = [row for row in rows if row["setting"] == setting and row["state"] == "done"]
        if not done:
            print(f"  {setting:32} diverged")
            continue
        curves = [row["val_accuracy"] for row in done]
        (line,) = axes.plot(range(1, len(curves[0]) + 1), np.mean(curves, 0), marker=".", label=setting)
        axes.fill_between(line.get_xdata(), np.min(curves, 0), np.max(curves, 0), alpha=0.15, color=line.get_color())
        values = [[row["final"][f"{part}_accuracy"] for row in done] for part in ("val", "test")]
        print(f"  {setting:32} validation {np.mean(values[0]):.2%}  test {np.mean(values[1]):.2%}  {len(done)} runs")
    axes.set(xlabel="epoch", ylabel="validation accuracy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    run.write_figure(out / f"{name}.png", figure)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study.add_flags(p, STUDIES)
    run.add_flags(p, "data_dir", "limit", data=dict(type=data.dataset_arg, default="imdb", help=data.DATA_HELP),
                  out=dict(default=str(run.ROOT / "out" / "lstm_imdb" / "sweep"), help="folder of the study"),
                  epochs=dict(help="instead of each setting's own, for a quick look"))  # fmt: skip
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    out = Path(args.out)
    if study.run_jobs(train, jobs_of(args, out), args):
        for name in args.study:
            rows = [study.row(name, setting, seed, out / folder_name(values, seed), val_accuracy="val_accuracy")
                    for setting, values in STUDIES[name].items() for seed in range(args.seeds)]  # fmt: skip
            report(name, rows, out)


if __name__ == "__main__":
    run.cli(main)
