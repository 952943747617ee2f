"""From a bigram to a Transformer, one idea at a time, and what classic mistakes look like: all recipes of stage.py.

    python nanogpt/stages.py                                    # both studies on WikiText-2, three seeds: 13 minutes
    python nanogpt/stages.py --study mistakes --seeds 1
    python nanogpt/stages.py --data builtin --iters 100 --seeds 1           # a quick look without any download
    python nanogpt/stages.py --list                             # only print the commands, for another engine to run

Run again, the same command continues where it stopped. Under --out: a run folder for every stage and seed, and for
every study STUDY.json, STUDY.png, and STUDY-samples.txt with the texts that the models of seed 0 generate.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from common import run, study
from common.options import option

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import data
import stage
from data import DATA_HELP, TOKENS, dataset_arg

MISTAKES = ["none", *stage.MISTAKES]
OLD_NAMES = {  # in records that were made before these were renamed
    "head tied to embeddings of deviation 1": "head tied to embeddings with std 1",
    "targets not moved on": "targets not shifted",
}
STUDIES = {"stages": [name for name in stage.RECIPES if name not in MISTAKES], "mistakes": MISTAKES}


def folder_of(out, name, seed):
    return out / f"{stage.file_name(name)}-s{seed}"


def jobs_of(args, out):
    """The runs of the studies, seed by seed: a study that is stopped early has all stages with fewer seeds."""
    dataset = args.data if args.list else data.choose(args.data, run.data_dir(args.data_dir))
    changes = {name: getattr(args, name) for name in ("tokens", "limit", "iters") if getattr(args, name) is not None}
    where = ["--data-dir", args.data_dir] if args.data_dir else []
    jobs = []
    for seed in range(args.seeds):
        for chosen in args.study:
            for name in STUDIES[chosen]:
                argv = study.argv_of(stage, {"recipe": name, "data": dataset, "seed": seed} | changes)
                cost = 1 + stage.RECIPES[name].n_layer
                jobs.append(study.Job(folder_of(out, name, seed), argv + where, cost))
    return jobs


def row_of(name, setting, seed, out):
    """The row of the record: the values of study.row, the first loss, the sample, and the curve [[step, loss], ...]."""
    folder = folder_of(out, setting, seed)
    row = study.row(name, setting, seed, folder, iter="iter", val_loss="val_loss")
    record = run.read_record(folder / "run.json")
    curve = [[int(step), loss] for step, loss in zip(row.pop("iter", []), row.pop("val_loss", []))]
    row["initial_loss"] = record["initial_loss"]
    row["sample"] = record.get("sample")
    row["curve"] = curve
    return row


def draw(record) -> Figure:
    """Left the validation loss against the step; right the final loss, which is also the legend. Means over seeds."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4, 3))
    colours = matplotlib.colormaps["tab20"]
    uniform = math.log(record["rows"][0]["dataset"]["vocabulary"])
    runs = {}  # setting: its rows
    for row in record["rows"]:
        if row["state"] == "done":
            name = row["setting"]
            runs.setdefault(OLD_NAMES.get(name, name), []).append(row)
    final = {name: np.mean([row["final"]["val_loss"] for row in rows]) for name, rows in runs.items()}
    for i, (name, rows) in enumerate(runs.items()):
        steps, _ = zip(*rows[0]["curve"])
        losses = np.array([[loss for _, loss in row["curve"]] for row in rows])  # (seeds, evaluations)
        left.plot(steps, losses.mean(0), color=colours(i))
        length = min(final[name], uniform)  # the bar of a run that exploded would hide all others
        right.barh(name, length, color=colours(i))
        label = f"{final[name]:.3f}" if final[name] < 1e3 else "exploded"
        right.annotate(label, (length, i), (3, 0), textcoords="offset points", va="center", fontsize=9)
    left.axhline(uniform, color="grey", ls=":", lw=1)
    left.annotate(
        "ln V: a uniform prediction",
        (0.98, uniform),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color="grey",
        fontsize=9,
    )
    left.set(xlabel="step", ylabel="validation loss (nats per token)")
    left.set_ylim(min(final.values(), default=0) - 0.2, uniform + 0.6)
    right.set(xlabel="final validation loss", xlim=(0, 1.35 * min(max(final.values(), default=1), uniform)))
    right.invert_yaxis()
    left.grid(alpha=0.3)
    return figure


@dataclass(kw_only=True)
class Options(study.StudyOptions):
    study: tuple[str, ...] = study.study_option(STUDIES)
    data: str = option("wikitext2", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    out: str = option(str(run.ROOT / "out/nanogpt/stages"), "folder of the studies", type=run.path_arg, metavar="DIR")
    tokens: str | None = option(None, "what a token is (default: char)", choices=TOKENS)
    limit: int | None = option(None, "only the first N tokens of each part, for a quick look", above=0)
    iters: int | None = option(None, "training steps (default: 600 for a stage, 500 for a mistake)", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    out = Path(args.out)
    if not study.run_jobs(stage, jobs_of(args, out), args):
        return
    for name in args.study:
        rows = [row_of(name, setting, seed, out) for seed in range(args.seeds) for setting in STUDIES[name]]
        record = {"study": name, "rows": rows}
        run.write_json(out / f"{name}.json", record)
        run.write_figure(out / f"{name}.png", draw(record))
        samples = [f"--- {row['setting']}\n{row['sample']}\n" for row in rows if row["seed"] == 0 and row["sample"]]
        run.write(out / f"{name}-samples.txt", "\n".join(samples))
        for row in rows:
            end = f"{row['final']['val_loss']:.4f}" if row["state"] == "done" else "diverged"
            print(f"{name:8} {row['setting']:40} seed {row['seed']}   loss {row['initial_loss']:.3f} -> {end}")
        print(f"{run.display_path(out)}: {name}.json, {name}.png, {name}-samples.txt")


if __name__ == "__main__":
    run.cli(main)
