"""Studies: many runs of train.py, each study a record, a figure and a table.

    python resnet/sweep.py --study augment decay lr weight-decay     # on CIFAR-10, short recipes
    python resnet/sweep.py --study shortcut                          # 20 and 56 layers, with and without
    python resnet/sweep.py --study gradients                         # the same before the first step, in seconds
    python resnet/sweep.py --study fast --seeds 3                    # the fast recipe over seeds

One process a core, with one thread each; --jobs 1, one after the other, where seconds are to mean something. Given
again, it continues where it stopped. Under --out: a run folder for every setting and seed, and for every study its
record STUDY.json and its figure STUDY.png.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import signal
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import data
import model
import run
import train

SHORT = dict(recipe="paper", epochs=4, decay="onecycle")  # short enough for many, long enough to tell them apart
STUDIES = {  # study: {setting: arguments of train.py}
    "augment": {name: SHORT | dict(epochs=8, augment=name) for name in ("none", "flip", "crop", "crop+flip")},
    "decay": {name: SHORT | dict(decay=name) for name in ("none", "step", "cosine", "onecycle")},
    "lr": {f"{lr:g}": SHORT | dict(lr=lr) for lr in (0.01, 0.03, 0.1, 0.3, 1.0)},
    "weight-decay": {f"{x:g}": SHORT | {"weight-decay": x} for x in (0.0, 1e-4, 5e-4, 2e-3)},
    "shortcut": {
        f"{depth} layers, {name}": SHORT | dict(model=f"resnet{depth}", shortcut=shortcut)
        for depth in (20, 56)
        for shortcut, name in (("A", "with shortcuts"), ("none", "without"))
    },
    "gradients": {},  # of the same networks as they are initialized: nothing is trained
    "options": {f"option {option}": SHORT | dict(shortcut=option) for option in "AB"},
    "parts": {name: dict(recipe=name, epochs=8) for name in train.RECIPES if name.startswith("fast")},
    "fast": {"ResNet-20, fast": dict(recipe="fast")},
    "paper": {"ResNet-20, paper": dict(recipe="paper")},
    "clock": {
        "ResNet-20, fast": dict(recipe="fast"),
        "ResNet-20, fast, half as long": dict(recipe="fast", epochs=20),
        "ResNet-20, paper": dict(recipe="paper"),
    },
    "mnist": {"small ResNet": dict(recipe="mnist", data="mnist")},
}
BAR = "sweep {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"


def arguments(setting):
    """{"bs": 16, "lr": 0.1} -> ["--bs", "16", "--lr", "0.1"]"""
    return [word for name, value in setting.items() for word in (f"--{name}", str(value))]


def folder_name(setting, seed):
    """The same for the same arguments, whichever study asks for them; what the recipe says anyway is left out."""
    recipe = train.RECIPES[setting["recipe"]]
    told = [
        str(v) if k in ("recipe", "model", "data") else f"{k}{v}"
        for k, v in setting.items()
        if recipe.get(k.replace("-", "_")) != v and (k, v) not in {("shortcut", "A"), ("model", "resnet20")}
    ]
    return "-".join([*told, f"s{seed}"])


def one_run(folder, told, data_dir):
    """Train one setting with one seed in `folder`, or continue it. Returns (folder, what went wrong or None)."""
    flags = arguments(told) + (["--data-dir", data_dir] if data_dir else [])
    where = ["--resume" if (folder / "run.json").exists() else "--out", str(folder)]
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            train.main([*flags, *where])
    except run.Diverged:
        pass  # a result like any other: run.json has it
    except SystemExit as error:
        if isinstance(error.code, int) and error.code >= 128:
            os._exit(error.code)  # told to stop, and the run is saved: take no other
        return folder, f"{folder.name}: {str(error).removeprefix('error: ')}"
    return folder, None


def start_worker(threads):
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others in order


def row_of(study, setting, seed, folder):
    """What the study's record keeps of one run."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    row = {"study": study, "setting": setting, "seed": seed, "folder": folder.name}
    for key in (
        "state",
        "args",
        "final",
        "diverged_at_step",
        "wall_s",
        "parameters",
        "precision",
        "device",
        "dataset",
        "git",
        "versions",
    ):
        row[key] = record.get(key)
    if (folder / "metrics.csv").exists():
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        row["train_accuracy"] = float(lines[-1]["train_accuracy"])  # of the last epoch, while the weights changed
        row["val_accuracy"] = [round(float(line["val_accuracy"]), 4) for line in lines]
        row["seconds"] = [round(s, 1) for s in np.cumsum([float(line["seconds"]) for line in lines]).tolist()]
        row["seconds_to_90"] = next((s for s, a in zip(row["seconds"], row["val_accuracy"]) if a >= 0.9), None)
    return row


# ---------------------------------------------------------------------------------------------------- shortcut study


def gradient_norms(name, shortcut, images, labels):
    """The norm of the loss's gradient at every 3 x 3 convolution in turn, relative to the norm of its weights, for a
    network as it is initialized: one pass over `images` (N, 3, 32, 32), float32, training's batch statistics."""
    torch.manual_seed(0)
    net = model.build(name, 10, shortcut).train()
    F.cross_entropy(net(images), labels).backward()
    weights = [m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    return [(w.grad.norm() / w.norm()).item() for w in weights]


def gradient_rows(train_set):
    """A row for each network of the study "shortcut" with its gradient norms, for the first 256 training pictures."""
    images, labels = next(train_set.batches(256, shuffle=(0, 0)))
    rows = []
    for setting, told in STUDIES["shortcut"].items():
        norms = gradient_norms(told["model"], told["shortcut"], images, labels)
        rows.append(
            {
                "study": "gradients",
                "setting": setting,
                "gradient_norms": [float(f"{n:.4g}") for n in norms],
                "final": {"first": norms[0], "last": norms[-1], "spread": max(norms) / min(norms)},
                "git": run.git_state(Path(__file__).parent),
                "dataset": train_set.facts(),
                "versions": run.versions(),
            }
        )
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


def done(rows, setting):
    return [row for row in rows if row["setting"] == setting and row["state"] == "done"]


def draw_epochs(axes, rows):
    """Validation accuracy against epochs: a line for the mean over seeds, a band from the least to the most."""
    for setting in dict.fromkeys(row["setting"] for row in rows):
        curves = [row["val_accuracy"] for row in done(rows, setting)]
        if curves:
            x = range(1, len(curves[0]) + 1)
            (line,) = axes.plot(x, np.mean(curves, 0), label=setting)
            axes.fill_between(x, np.min(curves, 0), np.max(curves, 0), alpha=0.15, color=line.get_color())
    axes.set(xlabel="epoch", ylabel="validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_clock(axes, rows):
    """Validation accuracy against the seconds of training, a line a run; the paper's recipe the usual way as well."""
    bench = run.ROOT / "resnet" / "results" / "bench.json"
    for row in (row for row in rows if row["state"] == "done"):
        label = f"{row['setting']}, seed {row['seed']}"
        (line,) = axes.plot(row["seconds"], row["val_accuracy"], label=label)
        if "paper" in row["setting"] and bench.exists():  # the same epochs, each as much longer as bench.py measured
            times = next(r["times_usual"] for r in json.loads(bench.read_text())["rows"] if r["way"] == "ours")
            axes.plot(
                np.array(row["seconds"]) * times,
                row["val_accuracy"],
                ":",
                color=line.get_color(),
                label=f"{label}, at the usual way's speed",
            )
    axes.set(xlabel="seconds of training", ylabel="validation accuracy")
    if rows[0]["study"] != "mnist":
        axes.set(xscale="log" if rows[0]["study"] == "clock" else "linear", ylim=(0.6, 0.95))
        axes.axhline(0.9, color="gray", linewidth=0.8)


def draw_rates(axes, rows):
    """The best epoch's validation accuracy, every seed, against what was varied; diverged ones at chance."""
    key = "lr" if rows[0]["study"] == "lr" else "weight_decay"
    for row in rows:
        right = row["final"]["val_accuracy"] if row["state"] == "done" else 0.1
        axes.plot(max(row["args"][key], 1e-5), right, "o" if row["state"] == "done" else "rx", color="tab:blue")
    axes.set(xscale="log", xlabel=key.replace("_", " "), ylabel="validation accuracy of the best epoch")


def report(study, rows, out, train_set):
    """Write STUDY.json and STUDY.png, and print the table."""
    gradients = gradient_rows(train_set) if study in ("shortcut", "gradients") else []
    figure = Figure(figsize=(11 if study == "shortcut" else 6.5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if study == "shortcut" else 1)
    if study == "shortcut":
        draw_epochs(axes[0], rows)
        draw_gradients(axes[1], gradients)
    elif study == "gradients":
        draw_gradients(axes, gradients)
    else:
        {
            "lr": draw_rates,
            "weight-decay": draw_rates,
            "fast": draw_clock,
            "paper": draw_clock,
            "clock": draw_clock,
            "mnist": draw_clock,
        }.get(study, draw_epochs)(axes, rows)
    for part in np.atleast_1d(axes):
        part.grid(alpha=0.3)
        if part.get_legend_handles_labels()[0]:
            part.legend(fontsize=8)
    run.write_figure(out / f"{study}.png", figure)
    run.write_json(out / f"{study}.json", {"study": study, "rows": rows + gradients})
    print(f"\n{study}")
    for row in gradients:
        print(f"  {row['setting']:40} largest gradient over smallest {row['final']['spread']:.3g}")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        values = [row["final"].get("test_accuracy", row["final"]["val_accuracy"]) for row in done(rows, setting)]
        diverged = len([r for r in rows if r["setting"] == setting and r["state"] == "diverged"])
        result = f"{np.mean(values):.2%} +- {np.std(values, ddof=1) if len(values) > 1 else 0:.2%}" if values else ""
        print(f"  {setting:40} test {result}" + (f" ({diverged} diverged)" if diverged else ""))


# --------------------------------------------------------------------------------------------------------------- main


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES), help="(default: all of them)")
    p.add_argument("--seeds", type=run.positive_int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    p.add_argument(
        "--jobs",
        type=run.positive_int,
        metavar="N",
        default=os.cpu_count(),
        help="processes, which share the cores (default: one a core); 1 for seconds that mean something",
    )
    run.add_flags(
        p,
        "data_dir",
        "limit",
        out=dict(default=str(run.ROOT / "out" / "resnet" / "sweep"), help="where to"),
        data=dict(type=data.dataset_arg, default="auto", help="instead of what the study is about"),
        epochs=dict(help="instead of each setting's own, for a quick look"),
    )
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if data.family_of_data(args.data) == "imagenet":
        p.error(f"--data {args.data}: the studies are of CIFAR-10 and MNIST")
    if args.data in ("mnist", "cifar10") and (args.data == "mnist") != (set(args.study) == {"mnist"}):
        p.error(f"--data {args.data}: not all of these studies are of it")
    out = run.make_folder(args.out)
    common = {name: value for name, value in (("limit", args.limit), ("epochs", args.epochs)) if value is not None}
    chosen = args.data
    if chosen == "auto":
        chosen = "cifar10" if data.reachable(run.data_dir(args.data_dir)) else "builtin"
    settings = {}  # study: {setting: what train.py is told}
    for study in args.study:
        settings[study] = {}
        for name, setting in STUDIES[study].items():
            which = "mnist" if study == "mnist" and chosen != "builtin" else chosen
            extra = {"model": "mnist"} if study == "mnist" else {}
            settings[study][name] = setting | extra | {"data": which} | common
    jobs = {
        out / folder_name(STUDIES[study][name], seed): told | {"seed": seed}  # seed by seed: stopped early,
        for seed in range(args.seeds)
        for study in args.study  # every setting has as many
        for name, told in settings[study].items()
    }
    todo = {folder: told for folder, told in jobs.items() if not run.ended(folder, train.parse(arguments(told)))}
    lock = run.hold(out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), bar_format=BAR)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), start_worker, (threads,)) as pool:
        pending = {pool.submit(one_run, folder, told, args.data_dir) for folder, told in todo.items()}
        try:
            while pending:  # waking up now and then: a signal that another thread took is seen only then
                finished, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for _, error in (future.result() for future in finished):
                    if error:
                        raise run.UserError(error)
                    bar.update(1)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # whose runs then end in order
            if isinstance(error, KeyboardInterrupt | BrokenProcessPool):
                raise run.UserError("the sweep was stopped; the same command continues where it was") from None
            raise
    bar.close()
    train_set = None
    if {"shortcut", "gradients"} & set(args.study):
        train_set = data.load(chosen, args.data_dir, args.limit)[0]
    for study, named in settings.items():
        rows = [
            row_of(study, name, seed, out / folder_name(STUDIES[study][name], seed))
            for name in named
            for seed in range(args.seeds)
        ]
        report(study, rows, out, train_set)
    lock.close()


if __name__ == "__main__":
    run.cli(main)
