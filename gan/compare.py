"""The four models under the same budget: FID against epochs and against seconds, samples side by side, one table.

    python gan/compare.py --study losses --seeds 3     # the four losses on one network, CIFAR-10
    python gan/compare.py --study digits --seeds 3     # the four losses on MNIST: an hour on one core
    python gan/compare.py --study papers --seeds 1     # each paper's own network
    python gan/compare.py --study epochs --seeds 3     # 50 epochs of twice the width: hours
    python gan/compare.py --study losses --list        # only print the commands, for another engine to run
    python gan/compare.py --data mnist --epochs 2      # a quick look

One process per core, with one thread each. Run again, the command continues where it stopped. Under --out: a run
folder for every setting and seed, results.txt with a line for each, and for every study its record STUDY.json, its
curves STUDY.png and the samples of seed 0, STUDY-samples.png.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from common import images, run, study
from common.options import option

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

import fid
import train
from data import DATA_HELP, dataset_arg
from features import NAMES as FEATURES

BUDGET = dict(width=16, epochs=10, eval_every=3, features="efficientnet-lite0")
LONG = dict(width=32, epochs=50, eval_every=5, features="efficientnet-lite0")
RATES = {  # learning rates that the study "rates" compares on the held-out images
    "dcgan": (1e-4, 2e-4, 5e-4),
    "wgan": (5e-5, 2e-4, 5e-4, 1e-3),
    "wgan-gp": (1e-4, 2e-4, 5e-4),
    "acgan": (1e-4, 2e-4, 5e-4),
}
NAMES = {"dcgan": "DCGAN", "wgan": "WGAN", "wgan-gp": "WGAN-GP", "acgan": "ACGAN"}
STUDIES = {  # study: {setting: arguments of train.py}
    "losses": {NAMES[m]: dict(BUDGET, model=m, recipe="plain") for m in NAMES},
    "digits": {NAMES[m]: dict(model=m, recipe="digits", data="mnist") for m in NAMES},
    "rates": {
        f"{NAMES[m]}, learning rate {lr:g}": dict(LONG, model=m, recipe="plain", epochs=5, lr=lr)
        for m, rates in RATES.items()
        for lr in rates
    },
    "epochs": {  # with the rate that the study "rates" chose for all four
        NAMES[m]: dict(LONG, model=m, recipe="plain", lr=5e-4) for m in NAMES
    },
    "papers": {f"{NAMES[m]}, own network": dict(BUDGET, model=m, recipe="paper") for m in NAMES},
    "wgan-lr": {
        f"learning rate {lr:g}": dict(model="wgan", recipe="plain", width=16, epochs=3, lr=lr, eval_every=3)
        for lr in (5e-5, 2e-4, 5e-4)
    },
    "beyond": {
        "DCGAN": dict(BUDGET, model="dcgan", recipe="plain"),
        "spectral normalization": dict(BUDGET, model="dcgan", recipe="plain", spectral_norm=True),
        "without the average": dict(BUDGET, model="dcgan", recipe="plain", ema=0.0),
    },
}


MEASURES = {  # on the held-out images, with a panel of the figure each
    "val_fid": "FID",
    "val_kid": "KID",
    "val_precision": "precision",
    "val_recall": "recall",
    "val_confident": "share of sure samples",
}
CURVES = {  # name in the record: column of metrics.csv
    "epoch": "epoch",
    "seconds": "training_seconds",
    **{name: name for name in MEASURES},
    "generator_steps": "generator_steps",
    "estimate": "train_estimate",
}


def override(values, args):
    """The arguments of a setting, with the features that --features names."""
    return values | {"features": args.features} if args.features else values


def folder_name(setting, seed):
    """The same name for the same arguments, whichever study wants them."""
    rest = {k: v for k, v in setting.items() if k not in ("model", "recipe") and BUDGET.get(k) != v}
    words = [f"{k}-{v}".replace("_", "-").lower() for k, v in rest.items()]
    return "-".join([setting["model"], setting["recipe"], *words, f"s{seed}"])


def jobs_of(args, out):
    """Every run that the studies need."""

    def dataset(name, setting):
        if args.data != "auto":
            return args.data
        if "data" in setting:
            return setting["data"]
        return "cifar10" if args.list else images.choose_once("auto", run.data_dir(args.data_dir), "cifar10")

    def cost(values):
        epochs = values.get("epochs", train.RECIPES[values["recipe"]][values["model"]].epochs)
        if values["recipe"] != "paper":
            return epochs
        return epochs * {"wgan-gp": 10, "acgan": 4}.get(values["model"], 1.5)

    studies = {
        name: {setting: override(values, args) for setting, values in settings.items()}
        for name, settings in STUDIES.items()
    }
    return study.plan(train, studies, args, lambda setting, seed: out / folder_name(setting, seed), dataset, cost)


def draw(record):
    """The measures on the held-out images against epochs and against seconds of training. Older records have FID alone,
    in two panels side by side; others have a column for each measure."""
    rows = [row for row in record["rows"] if row["state"] == "done"]
    measures = [name for name in MEASURES if all(name in row for row in rows)]
    if len(measures) == 1:
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        columns = [figure.subplots(1, 2, sharey=True)]
    else:
        figure = Figure(figsize=(3 * len(measures), 5.4), layout="constrained")
        columns = figure.subplots(2, len(measures), sharey="col").T
    for (by_epoch, by_seconds), measure in zip(columns, measures):
        draw_measure(by_epoch, by_seconds, rows, measure)
        by_epoch.set(xlabel="epoch of the discriminator", ylabel=MEASURES[measure])
        by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_seconds.set(xlabel="seconds of training", xscale="log")
        by_seconds.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        by_seconds.xaxis.set_major_formatter("{x:,.0f}")
        by_seconds.xaxis.set_minor_formatter(NullFormatter())
        for axes in (by_epoch, by_seconds):
            axes.grid(alpha=0.3)
    if len(measures) == 1:
        columns[0][0].set_ylabel(f"FID to {rows[0]['reference']}")
    figure.legend(*columns[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def draw_measure(by_epoch, by_seconds, rows, measure):
    """For each setting a line for the mean over seeds, from the lowest to the highest a band or bars."""
    for setting in dict.fromkeys(row["setting"] for row in rows):
        runs = [row for row in rows if row["setting"] == setting]
        values = np.array([row[measure] for row in runs])  # (seeds, evaluations)
        mean = values.mean(0)
        lowest = values.min(0)
        highest = values.max(0)
        seconds = np.mean([row["seconds"] for row in runs], 0)
        (line,) = by_epoch.plot(runs[0]["epoch"], mean, marker=".", label=setting)
        by_epoch.fill_between(runs[0]["epoch"], lowest, highest, alpha=0.15, color=line.get_color())
        by_seconds.errorbar(
            seconds, mean, (mean - lowest, highest - mean), marker=".", capsize=2, color=line.get_color()
        )


def draw_samples(name, rows, out):
    """The last samples of the first seed, half of a grid for each setting."""
    shown = [row for row in rows if row["seed"] == 0 and (out / row["folder"] / "samples.png").exists()]
    if not shown:
        return
    lines = math.ceil(len(shown) / 2)
    figure = Figure(figsize=(9, 2.15 * lines), layout="constrained")
    for axes, row in zip(figure.subplots(lines, 2, squeeze=False).flat, shown):
        with Image.open(out / row["folder"] / "samples.png") as image:
            axes.imshow(image.convert("RGB").crop((0, 0, image.width, image.height // 2)))
        title = row["setting"]
        if row["final"]:
            distance = row["final"]["last_fid"]
            title += f": FID {distance:.2f}" if distance < 100 else f": FID {distance:,.0f}"
        axes.set_title(title, size=9)
    for axes in figure.axes:
        axes.axis("off")
    run.write_figure(out / f"{name}-samples.png", figure)


def at_equal_seconds(rows):
    """Add to every row its FID after as many seconds of training as the fastest run took, between two evaluations a
    straight line; None before the first one."""
    done = [row for row in rows if row["state"] == "done"]
    for seed in {row["seed"] for row in done}:
        rivals = [row for row in done if row["seed"] == seed]
        budget = min(row["seconds"][-1] for row in rivals)
        for row in rivals:
            row["equal_seconds"] = budget
            fid_then = float(np.interp(budget, row["seconds"], row["val_fid"]))
            row["fid_at_equal_seconds"] = fid_then if row["seconds"][0] <= budget else None


def collect(name, args, out):
    """The rows of a study: the measures of each run, with its curves."""
    rows = []
    for setting, values in STUDIES[name].items():
        for seed in range(args.seeds):
            folder = out / folder_name(override(values, args), seed)
            row = study.row(name, setting, seed, folder, **CURVES)
            row["reference"] = "10,000 held-out images" if row["args"]["data"] == "cifar10" else "held-out images"
            if row["state"] == "done":
                row["protocol"] = fid.describe(row["final"]["protocol"])
                row["last_generator_steps"] = row["generator_steps"][-1]
                row["train_seconds"] = row["seconds"][-1]
                row["val_fid_end"] = row["val_fid"][-1]
            rows.append(row)
    at_equal_seconds(rows)
    return rows


def report(name, rows, out):
    """Write STUDY.json and its figures, and print the table."""
    record = {"study": name, "rows": rows}
    run.write_json(out / f"{name}.json", record)
    run.write_figure(out / f"{name}.png", draw(record))
    draw_samples(name, rows, out)
    print(f"\n{name}")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        done = [row for row in rows if row["setting"] == setting and row["state"] == "done"]
        if done:
            last, best = (np.mean([row["final"][key] for row in done]) for key in ("last_fid", "best_fid"))
            steps = done[0]["generator_steps"][-1]
            distances = f"FID {last:7.2f} last {best:7.2f} best"
            print(f"  {setting:28} {distances}   {steps:,.0f} steps of the generator   ({len(done)} runs)")


@dataclass(kw_only=True)
class Options(study.StudyOptions):
    study: tuple[str, ...] = study.study_option(STUDIES, ("losses",))
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N examples of each part", above=0)
    epochs: int | None = option(None, "epochs instead of the study's own, for a quick look", above=0)
    features: str | None = option(None, "the features, instead of the study's own", choices=list(FEATURES))
    out: str = option(str(run.ROOT / "out/gan/compare"), "folder of the study", type=run.path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    out = Path(args.out)
    if study.run_jobs(train, jobs_of(args, out), args):
        for name in args.study:
            report(name, collect(name, args, out), out)


if __name__ == "__main__":
    run.cli(main)
