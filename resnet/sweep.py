"""Studies: many runs of train.py, each study a record, a figure and a table.

    python resnet/sweep.py --study augment decay lr weight-decay     # on CIFAR-10, short recipes
    python resnet/sweep.py --study shortcut                          # 20 and 56 layers, with and without
    python resnet/sweep.py --study gradients                         # the same before the first step, in seconds
    python resnet/sweep.py --study fast --seeds 3 --jobs 1           # the fast recipe over seeds
    python resnet/sweep.py --study lr --list                         # only print the commands, for another engine

One process per core, with one thread each; use --jobs 1 if the seconds matter. Run again, the command continues
where it stopped. Under --out: a run folder for every setting and seed, results.txt with a line for each, and for every
study its record STUDY.json and its figure STUDY.png.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from common import images as image_data
from common import run, study
from common.curves import draw_epochs
from common.options import option

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import data
import model
import train
from data import dataset_arg, family_of_data

SHORT = dict(recipe="paper", epochs=4, decay="onecycle")  # long enough to tell settings apart
STUDIES = {  # study: {setting: arguments of train.py}
    "augment": {name: dict(SHORT, epochs=8, augment=name) for name in ("none", "flip", "crop", "crop+flip")},
    "decay": {name: dict(SHORT, decay=name) for name in ("none", "step", "cosine", "onecycle")},
    "lr": {f"{lr:g}": dict(SHORT, lr=lr) for lr in (0.01, 0.03, 0.1, 0.3, 1.0)},
    "weight-decay": {f"{x:g}": dict(SHORT, weight_decay=x) for x in (0.0, 1e-4, 5e-4, 2e-3)},
    "shortcut": {
        f"{depth} layers, {name}": dict(SHORT, model=f"resnet{depth}", shortcut=shortcut)
        for depth in (20, 56)
        for shortcut, name in (("A", "with shortcuts"), ("none", "without"))
    },
    "gradients": {},  # of the same networks before the first step: nothing is trained
    "options": {f"option {option}": dict(SHORT, shortcut=option) for option in "AB"},
    "parts": {name: dict(recipe=name, epochs=8) for name in train.RECIPES if name.startswith("fast")},
    "fast": {"ResNet-20, fast": dict(recipe="fast")},
    "paper": {"ResNet-20, paper": dict(recipe="paper")},
    "clock": {
        "ResNet-20, fast": dict(recipe="fast"),
        "ResNet-20, fast, half as long": dict(recipe="fast", epochs=20),
        "ResNet-20, paper": dict(recipe="paper"),
    },
    "mnist": {"small ResNet": dict(recipe="mnist", model="mnist")},
}


def folder_name(setting, seed):
    """The same name for the same arguments, whichever study wants them; values of the recipe are left out."""
    recipe = train.RECIPES[setting["recipe"]]
    words = []
    for name, value in setting.items():
        if name == "recipe":
            words.append(value)
        elif name == "model":
            words += [value] if value not in ("resnet20", "mnist") else []
        elif value != getattr(recipe, name):
            words.append(f"{name.replace('_', '-')}{value}")
    return "-".join([*words, f"s{seed}"])


def jobs_of(args, out):
    """Every run that the studies need."""

    def cost(values):
        depth = model.CIFAR_DEPTHS.get(values.get("model"), 20)
        return replace(train.RECIPES[values["recipe"]], **values).epochs * depth

    def dataset(name, setting):
        return dataset_of(args, name)

    return study.plan(train, STUDIES, args, lambda setting, seed: out / folder_name(setting, seed), dataset, cost)


def dataset_of(args, name):
    """The dataset of the study `name`. With --data auto it is the built-in one if the real one cannot be had."""
    if args.data != "auto":
        return args.data
    dataset = "mnist" if name == "mnist" else "cifar10"
    return dataset if args.list else image_data.choose_once("auto", run.data_dir(args.data_dir), dataset)


def row_of(name, setting, seed, folder):
    """The row of one run in the record of a study."""
    columns = dict(train_accuracy="train_accuracy", val_accuracy="val_accuracy", seconds="epoch_seconds")
    row = study.row(name, setting, seed, folder, **columns)
    if "seconds" in row:
        row["train_accuracy"] = row["train_accuracy"][-1]  # of the last epoch, while the weights changed
        row["seconds"] = [round(s, 1) for s in np.cumsum(row["seconds"]).tolist()]
        seconds_of_90 = [s for s, accuracy in zip(row["seconds"], row["val_accuracy"]) if accuracy >= 0.9]
        row["seconds_to_90"] = min(seconds_of_90, default=None)
    return row


# ---------------------------------------------------------------------------------------------------- shortcut study


def gradient_norms(name, shortcut, images, labels, classes=10):
    """The gradient norm of each 3 x 3 convolution in turn, relative to the norm of its weights, before the first step.

    One forward and backward pass over `images` (N, 3, 32, 32) in float32, with batch statistics.
    """
    torch.manual_seed(0)
    net = model.build(name, classes, shortcut).train()
    F.cross_entropy(net(images), labels).backward()
    weights = [m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    return [(w.grad.norm() / w.norm()).item() for w in weights]


def gradient_rows(args):
    """A row for each network of the study "shortcut" with its gradient norms, for one batch of 256 training images."""
    train_set, _, _, facts = data.load(dataset_of(args, "shortcut"), args.data_dir, args.limit)
    images, labels = next(train_set.batches(256, shuffle=(0, 0)))
    rows = []
    for setting, values in STUDIES["shortcut"].items():
        norms = gradient_norms(values["model"], values["shortcut"], images, labels, len(train_set.classes))
        final = {"first": norms[0], "last": norms[-1], "spread": max(norms) / min(norms)}
        norms = [float(f"{norm:.4g}") for norm in norms]
        row = {"study": "gradients", "setting": setting, "gradient_norms": norms, "final": final, "dataset": facts}
        rows.append(row | run.environment(torch.device("cpu"), __file__))
    return rows


def draw_gradients(axes, rows):
    for row in rows:
        x = np.linspace(0, 1, len(row["gradient_norms"]))
        axes.plot(x, row["gradient_norms"], marker=".", label=row["setting"])
    axes.set(
        xlabel="place in the network, from the first layer to the last",
        yscale="log",
        ylabel="gradient norm over weight norm, at the start",
    )


# ------------------------------------------------------------------------------------------------------------ figures


def finished(rows, setting):
    return [row for row in rows if row["setting"] == setting and row["state"] == "done"]


def draw_clock(axes, rows):
    """Validation accuracy against the seconds of training, one line per run; also the paper's recipe the usual way."""
    bench = Path(__file__).parent / "results" / "bench.json"
    for row in (row for row in rows if row["state"] == "done"):
        label = f"{row['setting']}, seed {row['seed']}"
        (line,) = axes.plot(row["seconds"], row["val_accuracy"], label=label)
        if "paper" in row["setting"] and bench.exists():  # the same epochs, slower by the factor that bench.py measured
            factor = next(r["times_usual"] for r in json.loads(bench.read_text())["rows"] if r["way"] == "ours")
            axes.plot(
                np.array(row["seconds"]) * factor,
                row["val_accuracy"],
                ":",
                color=line.get_color(),
                label=f"{label}, at the usual way's speed",
            )
    axes.set(xlabel="seconds of training", ylabel="validation accuracy")
    if rows[0]["study"] != "mnist":
        axes.set(xscale="log" if rows[0]["study"] == "clock" else "linear", ylim=(0.6, 0.95))
        axes.axhline(0.9, color="gray", linewidth=0.8)


def draw_best(axes, rows):
    """The best epoch's validation accuracy of each run against the varied option; a cross at zero if it diverged."""
    key = "lr" if rows[0]["study"] == "lr" else "weight_decay"
    for row in rows:
        done = row["state"] == "done"
        accuracy = row["final"]["val_accuracy"] if done else 0.0
        axes.plot(max(row["args"][key], 1e-5), accuracy, "o" if done else "rx", color="tab:blue")
    axes.set(xscale="log", xlabel=key.replace("_", " "), ylabel="validation accuracy of the best epoch")


DRAW = {"lr": draw_best, "weight-decay": draw_best, "gradients": draw_gradients}
DRAW |= dict.fromkeys(("fast", "paper", "clock", "mnist"), draw_clock)


def draw(record):
    """The figure of a study, from its record alone."""
    name = record["study"]
    rows = [row for row in record["rows"] if row["study"] != "gradients"]
    gradients = [row for row in record["rows"] if row["study"] == "gradients"]
    figure = Figure(figsize=(11 if name == "shortcut" else 6.5, 4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 2 if name == "shortcut" else 1))
    DRAW.get(name, draw_epochs)(axes[0], rows or gradients)
    if name == "shortcut":
        draw_gradients(axes[1], gradients)
    for panel in axes:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    return figure


def report(name, rows, gradients, out):
    """Write STUDY.json and STUDY.png, and print the table."""
    record = {"study": name, "rows": rows + gradients}
    run.write_json(out / f"{name}.json", record)
    run.write_figure(out / f"{name}.png", draw(record))
    print(f"\n{name}")
    for row in gradients:
        print(f"  {row['setting']:40} largest gradient over smallest {row['final']['spread']:.3g}")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        values = [row["final"]["test_accuracy"] for row in finished(rows, setting)]
        diverged = len([r for r in rows if r["setting"] == setting and r["state"] == "diverged"])
        result = ""
        if values:
            result = study.mean_and_deviation(values)
        if diverged:
            result += f" ({diverged} diverged)"
        print(f"  {setting:40} test {result}")


# --------------------------------------------------------------------------------------------------------------- main


@dataclass(kw_only=True)
class Options(study.StudyOptions):
    study: tuple[str, ...] = study.study_option(STUDIES)
    data: str = option("auto", "the dataset, instead of the study's own", type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    out: str = option(str(run.ROOT / "out/resnet/sweep"), "folder of the studies", type=run.path_arg, metavar="DIR")
    epochs: int | None = option(None, "epochs instead of each setting's own, for a quick look", above=0)
    limit: int | None = option(None, "only the first N examples of each part", above=0)

    def check(self):
        family = family_of_data(self.data)
        if family == "imagenet":
            raise run.UserError(f"--data {self.data}: the studies are of CIFAR-10 and MNIST, or of a folder of images")
        if family and self.data != "auto" and (family == "mnist") != (set(self.study) == {"mnist"}):
            raise run.UserError(f"--data {self.data}: not all of these studies are of it")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    out = Path(args.out) if args.list else run.make_folder(args.out)
    if not study.run_jobs(train, jobs_of(args, out), args):  # no jobs for the study "gradients"
        return
    about_gradients = {"shortcut", "gradients"} & set(args.study)
    gradients = gradient_rows(args) if about_gradients else []
    for name in args.study:
        rows = []
        for setting, values in STUDIES[name].items():
            for seed in range(args.seeds):
                rows.append(row_of(name, setting, seed, out / folder_name(values, seed)))
        report(name, rows, gradients if name in about_gradients else [], out)


if __name__ == "__main__":
    run.cli(main)
