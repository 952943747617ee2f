"""Studies: many runs of train.py, each a named table with a figure.

    python cifar/sweep.py --study lenet              # what batch size, learning rate and epochs do to LeNet-5
    python cifar/sweep.py --study lr bn l1-vs-l2     # several; runs that they share are made once
    python cifar/sweep.py --study best-lenet5 --seeds 5

One process a core, with one thread each, which is faster than one process with all threads. Given again, it continues
where it stopped. Under --out: a run folder for every setting and seed, results.txt with a line for each, and for every
study its record STUDY.json and its figure STUDY.png.
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

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import data
import run
import train

BAR = "sweep {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"
SIMPLE = dict(model="simplenn", bs=128, lr=0.05, epochs=8)
RATES = [0.001, 0.01, 0.05, 0.1, 0.3, 1.0]
LADDER = {
    "plain, 15 epochs": dict(model="simplenn", epochs=15),
    "+ batch size 128, learning rate 0.05": dict(bs=128, lr=0.05),
    "+ one-cycle schedule": dict(decay="onecycle"),
    "+ augmentation": dict(augment=True),
    "+ batch normalization": dict(bn=True),
    "+ Swish": dict(activation="swish"),
    "+ L2 0.0005": dict(l2=5e-4),
}
STUDIES = {  # study: {setting: arguments of train.py}
    "lenet": {
        "defaults": dict(model="lenet5"),
        "batch size 16": dict(model="lenet5", bs=16),
        "batch size 8": dict(model="lenet5", bs=8),
        "learning rate 0.01": dict(model="lenet5", lr=0.01),
        "learning rate 0.05": dict(model="lenet5", lr=0.05),
        "5 epochs": dict(model="lenet5", epochs=5),
        "20 epochs": dict(model="lenet5", epochs=20),
    },
    "augment": {name: SIMPLE | dict(epochs=20, augment=name == "with") for name in ("without", "with")},
    "lr": {f"{lr:g}": SIMPLE | dict(lr=lr) for lr in RATES},
    "bn": {f"{name}, {lr:g}": SIMPLE | dict(lr=lr, bn=name == "with") for name in ("without", "with") for lr in RATES},
    "activation": {name: SIMPLE | dict(activation=name) for name in ("relu", "swish")},
    "l2": {f"{l2:g}": SIMPLE | dict(l2=l2) for l2 in (0.0, 1e-4, 1e-3, 1e-2)},
    "l1-vs-l2": {"neither": SIMPLE, "L2 0.001": SIMPLE | dict(l2=1e-3), "L1 0.0001": SIMPLE | dict(l1=1e-4)},
    "lr-decay": {decay: SIMPLE | dict(decay=decay) for decay in ("none", "step", "cosine", "onecycle")},
    "ladder": {
        name: {k: v for part in list(LADDER.values())[: i + 1] for k, v in part.items()}
        for i, name in enumerate(LADDER)
    },
    "search-lenet5": {
        "recipe best": dict(model="lenet5", recipe="best"),
        "learning rate 0.01": dict(model="lenet5", recipe="best", lr=0.01),
        "learning rate 0.04": dict(model="lenet5", recipe="best", lr=0.04),
    },
    "best-lenet5": {"LeNet-5": dict(model="lenet5", recipe="best")},
    "best-simplenn": {"SimpleNN": dict(model="simplenn", recipe="best")},
}


def arguments(setting):
    """{"bs": 16, "bn": True, "augment": False} -> ["--bs", "16", "--bn", "--no-augment"]"""
    flags = []
    for name, value in setting.items():
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", f"{value}"]
    return flags


def folder_name(setting, seed):
    """The same for the same arguments, whichever study asks for them: options that train.py leaves off are left out."""
    told = {
        k: v
        for k, v in setting.items()
        if not (v is False or (k, v) in {("l2", 0.0), ("activation", "relu"), ("decay", "none")})
    }
    return (
        "-".join(str(v) if k in ("model", "recipe") else k + (f"{v}" if v is not True else "") for k, v in told.items())
        + f"-s{seed}"
    )


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


def start_worker():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others in order


def row_of(study, setting, seed, folder):
    """What the study's record keeps of one run."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    row = {"study": study, "setting": setting, "seed": seed, "folder": folder.name}
    for key in ("state", "args", "final", "diverged_at_step", "wall_s", "parameters", "dataset", "git", "versions"):
        row[key] = record.get(key)
    if (folder / "metrics.csv").exists():
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            row["val_accuracy"] = [round(float(line["val_accuracy"]), 4) for line in csv.DictReader(file)]
    return row


# ------------------------------------------------------------------------------------------------------------ figures


def accuracies(rows, setting):
    return [row["final"]["val_accuracy"] for row in rows if row["setting"] == setting and row["state"] == "done"]


def draw_epochs(axes, rows, out):
    """Validation accuracy against epochs: a line for the mean over seeds, a band from the least to the most."""
    for setting in dict.fromkeys(row["setting"] for row in rows):
        curves = [row["val_accuracy"] for row in rows if row["setting"] == setting and row["state"] == "done"]
        if curves:
            x = range(1, len(curves[0]) + 1)
            (line,) = axes.plot(x, np.mean(curves, 0), label=setting, zorder=3 - len(x) / 1000)  # short ones on top
            axes.fill_between(x, np.min(curves, 0), np.max(curves, 0), alpha=0.15, color=line.get_color())
    axes.set(xlabel="epoch", ylabel="validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_rates(axes, rows, out):
    """The best epoch's validation accuracy against the learning rate; a cross on the ground where seeds diverged."""
    for name, part in (("without", False), ("with", True)):
        mine = [row for row in rows if bool(row["args"]["bn"]) == part]
        rates = sorted({row["args"]["lr"] for row in mine})
        points = [
            (lr, [r["final"]["val_accuracy"] for r in mine if r["args"]["lr"] == lr and r["state"] == "done"])
            for lr in rates
        ]
        points = [(lr, values) for lr, values in points if values]
        if points:
            mean = np.array([np.mean(values) for _, values in points])
            spread = np.array([[m - min(v), max(v) - m] for m, (_, v) in zip(mean, points)]).T.clip(0)  # equal: -1e-17
            axes.errorbar(
                [lr for lr, _ in points], mean, spread, marker="o", capsize=3, label=f"{name} batch normalization"
            )
        lost = [row["args"]["lr"] for row in mine if row["state"] == "diverged"]
        axes.plot(lost, [0.1] * len(lost), "rx", label="diverged" if lost else None)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy of the best epoch")


def draw_weights(axes, rows, out):
    """Histograms of all weights, side by side: L1 puts them at zero, L2 only near it."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    axes.axis("off")
    for i, setting in enumerate(settings):
        row = next(r for r in rows if r["setting"] == setting)
        weights = run.read_checkpoint(out / row["folder"] / "best.pt")["model"]
        values = torch.cat([w.flatten() for name, w in weights.items() if name.endswith("weight")])
        small = (values.abs() < 1e-3).float().mean().item()
        panel = axes.inset_axes([i / len(settings), 0, 0.93 / len(settings), 0.9])
        panel.hist(values.clamp(-0.2, 0.2).numpy(), bins=101, log=True)
        panel.set(title=f"{setting}\n{small:.0%} of the weights below 0.001", xlabel="weight", ylim=(1, len(values)))
        panel.set(ylabel="count") if i == 0 else panel.tick_params(labelleft=False)


def list_results(out):
    """results.txt: a line for every run that has ended."""
    lines = []
    for file in sorted(out.glob("*/run.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["state"] == "done":
            final = record["final"]
            lines.append(
                f"{file.parent.name:50} validation {final['val_accuracy']:.4f}  epoch {final['best_epoch']:3} "
                f" {run.shown(file.parent / 'best.pt')}"
            )
        elif record["state"] == "diverged":
            lines.append(f"{file.parent.name:50} diverged at step {record['diverged_at_step']}")
    run.write(out / "results.txt", "\n".join(lines) + "\n")


DRAW = {"lr": draw_rates, "bn": draw_rates, "l1-vs-l2": draw_weights}


def report(study, rows, out):
    """Write STUDY.json and STUDY.png, and print the table."""
    run.write_json(out / f"{study}.json", {"study": study, "rows": rows})
    figure = Figure(figsize=(9 if study == "l1-vs-l2" else 6.5, 4), layout="constrained")
    axes = figure.subplots()
    DRAW.get(study, draw_epochs)(axes, rows, out)
    if axes.get_legend_handles_labels()[0]:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    run.write_figure(out / f"{study}.png", figure)
    print(f"\n{study}")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine, values = [r for r in rows if r["setting"] == setting], accuracies(rows, setting)
        diverged = len([r for r in mine if r["state"] == "diverged"])
        result = f"{np.mean(values):.2%} +- {np.std(values, ddof=1) if len(values) > 1 else 0:.2%}" if values else ""
        print(f"  {setting:40} validation {result}" + (f" ({diverged} of {len(mine)} diverged)" if diverged else ""))


# --------------------------------------------------------------------------------------------------------------- main


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES), help="(default: all of them)")
    p.add_argument("--seeds", type=run.positive_int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    p.add_argument("--jobs", type=run.positive_int, default=os.cpu_count(), metavar="N", help="(default: one a core)")
    run.add_flags(
        p,
        "data_dir",
        "limit",
        out=dict(default=str(run.ROOT / "out" / "cifar" / "sweep"), help="where to"),
        data=dict(type=data.known, default="auto", help=data.DATA_HELP),
        epochs=dict(help="instead of each setting's own, for a quick look"),
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    out = run.make_folder(args.out)
    common = {name: value for name, value in (("limit", args.limit), ("epochs", args.epochs)) if value is not None}
    models = {setting["model"] for study in args.study for setting in STUDIES[study].values()}
    named = {m: data.choose(args.data, run.data_dir(args.data_dir), train.DATASET[m]) for m in sorted(models)}
    jobs = {}
    for seed in range(args.seeds):  # seed by seed: stopped early, every setting has as many
        for study in args.study:
            for setting in STUDIES[study].values():
                folder = out / folder_name(setting, seed)
                recipe = train.RECIPES[setting.get("recipe", "plain")][setting["model"]] | setting
                cost = (args.epochs or recipe["epochs"]) * (1 + 16 / recipe["bs"])  # small batches are slower
                jobs[folder] = cost, setting | dict(data=named[setting["model"]], seed=seed) | common
    todo = {folder: told for folder, (_, told) in jobs.items() if not run.ended(folder, train.parse(arguments(told)))}
    lock = run.hold(out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    done = sum(cost for folder, (cost, _) in jobs.items() if folder not in todo)
    bar = tqdm(total=sum(cost for cost, _ in jobs.values()), initial=done, bar_format=BAR)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), start_worker) as pool:
        pending = {pool.submit(one_run, folder, told, args.data_dir) for folder, told in todo.items()}
        try:
            while pending:  # waking up now and then: a signal that another thread took is seen only then
                finished, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for folder, error in (future.result() for future in finished):
                    if error:
                        raise run.UserError(error)
                    bar.update(jobs[folder][0])
                    list_results(out)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # whose runs then end in order
            if isinstance(error, KeyboardInterrupt | BrokenProcessPool):
                raise run.UserError("the sweep was stopped; the same command continues where it was") from None
            raise
    bar.close()
    for study in args.study:
        rows = [
            row_of(study, name, seed, out / folder_name(setting, seed))
            for name, setting in STUDIES[study].items()
            for seed in range(args.seeds)
        ]
        report(study, rows, out)
    lock.close()


if __name__ == "__main__":
    run.cli(main)
