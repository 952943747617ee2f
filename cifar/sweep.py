"""Studies: many runs of train.py, each study a named table with a figure.

    python cifar/sweep.py --study lenet              # what batch size, learning rate and epochs do to LeNet-5
    python cifar/sweep.py --study lr bn l1-vs-l2     # several; runs that they share are made once
    python cifar/sweep.py --study best-lenet5 --seeds 5
    python cifar/sweep.py --study lenet --list       # only print the commands, for another engine to run

One process per core, with one thread each, which is faster than one process with all threads. Run again, the command
continues where it stopped. Under --out: a run folder for every setting and seed, results.txt with a line for each, and
for every study its record STUDY.json and its figure STUDY.png.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from common import images, run, study
from common.curves import draw_epochs
from common.options import option

import numpy as np
import torch
from matplotlib.figure import Figure

import data
import train

LENET = dict(model="lenet5", recipe="plain")
SIMPLE = dict(model="simplenn", recipe="plain", bs=128, lr=0.05, epochs=8)
LEARNING_RATES = [0.001, 0.01, 0.05, 0.1, 0.3, 1.0]
LADDER = {
    "plain, 15 epochs": dict(model="simplenn", recipe="plain", epochs=15),
    "+ batch size 128, learning rate 0.05": dict(bs=128, lr=0.05),
    "+ one-cycle schedule": dict(decay="onecycle"),
    "+ augmentation": dict(augment="crop+flip"),
    "+ batch normalization": dict(bn=True),
    "+ Swish": dict(activation="swish"),
    "+ L2 0.0005": dict(weight_decay=5e-4),
}
BEST = dict(model="lenet5", recipe="best")
SEARCH = {  # changes to the recipe best, in runs of 30 epochs
    "recipe best, 30 epochs": {},
    "learning rate 0.01": dict(lr=0.01),
    "learning rate 0.04": dict(lr=0.04),
    "learning rate 0.08": dict(lr=0.08),
    "batch size 32, learning rate 0.01": dict(bs=32, lr=0.01),
    "batch size 16, learning rate 0.01, momentum 0.7": dict(bs=16, lr=0.01, momentum=0.7),
    "cosine": dict(decay="cosine"),
    "flip alone": dict(augment="flip"),
    "no label smoothing": dict(label_smoothing=0.0),
    "weight decay 0.0001": dict(weight_decay=1e-4),
}
LONG = ("learning rate 0.04", "batch size 32, learning rate 0.01")  # the two best, 200 epochs; the second also 300


def cumulative(steps: dict[str, dict]) -> dict[str, dict]:
    """{name of a step: the arguments of all steps up to it}"""
    arguments = {}
    settings = {}
    for name, changes in steps.items():
        arguments = dict(arguments, **changes)
        settings[name] = arguments
    return settings


STUDIES = {  # study: {setting: arguments of train.py}
    "lenet": {
        "defaults": LENET,
        "batch size 16": dict(LENET, bs=16),
        "batch size 8": dict(LENET, bs=8),
        "learning rate 0.01": dict(LENET, lr=0.01),
        "learning rate 0.05": dict(LENET, lr=0.05),
        "5 epochs": dict(LENET, epochs=5),
        "20 epochs": dict(LENET, epochs=20),
    },
    "augment": {
        "without": dict(SIMPLE, epochs=20, augment="none"),
        "with": dict(SIMPLE, epochs=20, augment="crop+flip"),
    },
    "lr": {f"{lr:g}": dict(SIMPLE, lr=lr) for lr in LEARNING_RATES},
    "bn": {
        f"{name}, {lr:g}": dict(SIMPLE, lr=lr, bn=name == "with")
        for name in ("without", "with")
        for lr in LEARNING_RATES
    },
    "activation": {name: dict(SIMPLE, activation=name) for name in ("relu", "swish")},
    "l2": {f"{x:g}": dict(SIMPLE, weight_decay=x) for x in (0.0, 1e-4, 1e-3, 1e-2)},
    "l1-vs-l2": {"neither": SIMPLE, "L2 0.001": dict(SIMPLE, weight_decay=1e-3), "L1 0.0001": dict(SIMPLE, l1=1e-4)},
    "lr-decay": {decay: dict(SIMPLE, decay=decay) for decay in ("none", "step", "cosine", "onecycle")},
    "ladder": cumulative(LADDER),
    "search-lenet5": {name: dict(BEST, epochs=30, **change) for name, change in SEARCH.items()},
    "long-lenet5": {name: dict(BEST, epochs=200, **SEARCH[name]) for name in LONG},
    "longest-lenet5": {LONG[1]: dict(BEST, epochs=300, **SEARCH[LONG[1]])},
    "best-lenet5": {"LeNet-5": BEST},
    "best-simplenn": {"SimpleNN": dict(model="simplenn", recipe="best")},
}
OFF = {
    ("recipe", "plain"),
    ("bn", False),
    ("activation", "relu"),
    ("decay", "none"),
    ("augment", "none"),
    ("weight_decay", 0.0),
}


def folder_name(setting, seed):
    """The same name for the same arguments, whichever study wants them; an option that is off is left out."""
    words = []
    for name, value in setting.items():
        if (name, value) in OFF:
            continue
        if name in ("model", "recipe"):
            words.append(value)
        elif value is True:
            words.append(name)
        else:
            words.append(f"{name}{value}")
    return "-".join([*words, f"s{seed}"])


def jobs_of(args, out):
    """Every run that the studies need."""

    def dataset(name, setting):
        if args.data != "auto":
            return args.data
        usual = train.DATASET[setting["model"]]
        return usual if args.list else images.choose_once("auto", run.data_dir(args.data_dir), usual)

    def cost(values):
        options = replace(train.RECIPES[values["recipe"]][values["model"]], **values)
        return options.epochs * (1 + 16 / options.bs)  # small batches are slower

    return study.plan(train, STUDIES, args, lambda setting, seed: out / folder_name(setting, seed), dataset, cost)


# ------------------------------------------------------------------------------------------------------------ figures


def accuracies(rows, setting):
    return [row["final"]["val_accuracy"] for row in rows if row["setting"] == setting and row["state"] == "done"]


def draw_learning_rates(axes, rows):
    """The best epoch's validation accuracy against the learning rate; a cross at zero where seeds diverged."""
    for name, bn in (("without", False), ("with", True)):
        runs = [row for row in rows if bool(row["args"]["bn"]) == bn]
        by_rate = {}
        for row in runs:
            if row["state"] == "done":
                by_rate.setdefault(row["args"]["lr"], []).append(row["final"]["val_accuracy"])
        if by_rate:
            mean = np.array([np.mean(values) for values in by_rate.values()])
            low = np.array([min(values) for values in by_rate.values()])
            high = np.array([max(values) for values in by_rate.values()])
            bars = np.clip([mean - low, high - mean], 0, None)  # of equal values it may be -1e-17
            axes.errorbar(list(by_rate), mean, bars, marker="o", capsize=3, label=f"{name} batch normalization")
    diverged = [row["args"]["lr"] for row in rows if row["state"] == "diverged"]
    if diverged:
        axes.plot(diverged, [0] * len(diverged), "rx", label="diverged")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy of the best epoch")


def draw_weights(axes, rows, out):
    """Histograms of all weights, side by side: L1 puts them at zero, L2 only near it."""
    done = {row["setting"]: row for row in reversed(rows) if row["state"] == "done"}  # the first seed of each
    settings = [setting for setting in dict.fromkeys(row["setting"] for row in rows) if setting in done]
    axes.axis("off")
    for i, setting in enumerate(settings):
        row = done[setting]
        weights = run.read_checkpoint(out / row["folder"] / "best.pt")["model"]
        values = torch.cat([w.flatten() for name, w in weights.items() if name.endswith("weight")])
        small = (values.abs() < 1e-3).float().mean().item()
        panel = axes.inset_axes([i / len(settings), 0, 0.93 / len(settings), 0.9])
        panel.hist(values.clamp(-0.2, 0.2).numpy(), bins=101, log=True)
        panel.set(title=f"{setting}\n{small:.0%} of the weights below 0.001", xlabel="weight", ylim=(1, len(values)))
        if i == 0:
            panel.set(ylabel="count")
        else:
            panel.tick_params(labelleft=False)


DRAW = {"lr": draw_learning_rates, "bn": draw_learning_rates}


def draw(record, out=None):
    """The figure of a study. Those of all but l1-vs-l2, which shows the weights of the runs in `out`, are drawn from
    the record alone."""
    name = record["study"]
    figure = Figure(figsize=(9 if name == "l1-vs-l2" else 6.5, 4), layout="constrained")
    axes = figure.subplots()
    if name == "l1-vs-l2":
        draw_weights(axes, record["rows"], out)
    else:
        DRAW.get(name, draw_epochs)(axes, record["rows"])
    if axes.get_legend_handles_labels()[0]:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def report(name, rows, out):
    """Write STUDY.json and STUDY.png, and print the table."""
    record = {"study": name, "rows": rows}
    run.write_json(out / f"{name}.json", record)
    run.write_figure(out / f"{name}.png", draw(record, out))
    print(f"\n{name}")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        states = [row["state"] for row in rows if row["setting"] == setting]
        values = accuracies(rows, setting)
        result = ""
        if values:
            result = study.mean_and_deviation(values)
        if "diverged" in states:
            result += f" ({states.count('diverged')} of {len(states)} diverged)"
        print(f"  {setting:40} validation {result}")


# --------------------------------------------------------------------------------------------------------------- main


@dataclass(kw_only=True)
class Options(study.StudyOptions):
    study: tuple[str, ...] = study.study_option(STUDIES)
    data: str = option("auto", data.DATA_HELP, type=data.dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    out: str = option(str(run.ROOT / "out/cifar/sweep"), "folder of the study", type=run.path_arg, metavar="DIR")
    epochs: int | None = option(None, "epochs instead of each setting's own, for a quick look", above=0)
    limit: int | None = option(None, "only the first N examples of each part", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    out = Path(args.out)
    if study.run_jobs(train, jobs_of(args, out), args):
        for name in args.study:
            rows = []
            for setting, values in STUDIES[name].items():
                for seed in range(args.seeds):
                    folder = out / folder_name(values, seed)
                    rows.append(study.row(name, setting, seed, folder, val_accuracy="val_accuracy"))
            report(name, rows, out)


if __name__ == "__main__":
    run.cli(main)
