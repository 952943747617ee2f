"""Studies: several runs of train.py, each study a named table with a figure.

    python lstm_imdb/sweep.py --study plain                # three seeds of the plain recipe
    python lstm_imdb/sweep.py --study stop-words --jobs 2  # does it help to leave out stop words?
    python lstm_imdb/sweep.py --study pooling --list       # only print the commands

One process per core. Run again, the command continues where it stopped. Under --out: a run folder for every setting
and seed, results.txt, and for every study its record STUDY.json and its figure STUDY.png.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from common import run, study
from common.curves import draw_epochs
from common.options import option

import numpy as np
from matplotlib.figure import Figure

import data
import train

STUDIES = {  # study: {setting: arguments of train.py}
    "plain": {"plain": dict(recipe="plain")},
    "best": {"best": dict(recipe="best")},
    "buckets": {"by length": dict(recipe="plain"), "in random order": dict(recipe="plain", bucket=1)},
    "vectors": {
        "standard deviation 1": dict(recipe="plain", embed_std=1.0),
        "standard deviation 0.1": dict(recipe="plain"),
    },
    "stop-words": {"all words": dict(recipe="plain"), "no stop words": dict(recipe="plain", stop_words=True)},
    "pooling": {
        f"{pool}, {keep} of the review": dict(recipe="plain", pool=pool, keep=keep)
        for pool, keep in (("last", "start"), ("last", "end"), ("mean", "end"), ("max", "end"))
    },
    "truncation": {f"{n} words": dict(recipe="plain", max_len=n) for n in (100, 200, 400, 800)},
    "parts": {
        "best": dict(recipe="best"),
        "one direction": dict(recipe="best", bidirectional=False),
        "the last state": dict(recipe="best", pool="last"),
        "no word dropout": dict(recipe="best", word_dropout=0.0),
        "no adversarial training": dict(recipe="best", adversarial=0.0),
    },
}


def folder_name(setting, seed):
    """The same name for the same arguments, whichever study wants them."""
    words = [setting["recipe"]]
    for name, value in setting.items():
        is_default = setting["recipe"] == "plain" and getattr(train.PLAIN, name) == value
        if name != "recipe" and not is_default:
            words.append(f"{name}{value}")
    return "-".join([*words, f"s{seed}"])


def jobs_of(args, out):
    """Every run that the studies need."""

    def cost(values):
        options = replace(train.RECIPES[values["recipe"]], **values)
        directions = 3 if options.bidirectional else 1  # the second one costs more: reviews are reversed
        return options.epochs * options.max_len * directions

    def dataset(name, setting):
        return args.data

    return study.plan(train, STUDIES, args, lambda setting, seed: out / folder_name(setting, seed), dataset, cost)


def draw(record):
    """The figure of a study, from its record alone."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    draw_epochs(axes, record["rows"])
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


def report(name, rows, out):
    """Write STUDY.json and STUDY.png, and print the table."""
    record = {"study": name, "rows": rows}
    run.write_json(out / f"{name}.json", record)
    run.write_figure(out / f"{name}.png", draw(record))
    print(f"\n{name}")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        done = [row for row in rows if row["setting"] == setting and row["state"] == "done"]
        if not done:
            print(f"  {setting:32} diverged")
            continue
        val_accuracy = np.mean([row["final"]["val_accuracy"] for row in done])
        test_accuracy = np.mean([row["final"]["test_accuracy"] for row in done])
        print(f"  {setting:32} validation {val_accuracy:.2%}  test {test_accuracy:.2%}  {len(done)} runs")


@dataclass(kw_only=True)
class Options(study.StudyOptions):
    study: tuple[str, ...] = study.study_option(STUDIES)
    data: str = option("imdb", data.DATA_HELP, type=data.dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    out: str = option(str(run.ROOT / "out/lstm_imdb/sweep"), "folder of the study", type=run.path_arg, metavar="DIR")
    epochs: int | None = option(None, "epochs instead of each setting's own, for a quick look", above=0)
    limit: int | None = option(None, "only the first N examples of each part", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    out = Path(args.out)
    if study.run_jobs(train, jobs_of(args, out), args):
        for name in args.study:
            rows = [
                study.row(name, setting, seed, out / folder_name(values, seed), val_accuracy="val_accuracy")
                for setting, values in STUDIES[name].items()
                for seed in range(args.seeds)
            ]
            report(name, rows, out)


if __name__ == "__main__":
    run.cli(main)
