"""Studies: many runs of train.py on the built-in videos or on msvd-clips, each study a named table.

    python s2vt/sweep.py --study order               # S2VT, and the same network on the mean of the frames
    python s2vt/sweep.py --study folds --seeds 1     # real clips: the runs that choose, and then
    python s2vt/sweep.py --study clips sizes         # those that are tested; compare.py scores both
    python s2vt/sweep.py --study dropout             # validation chooses, other clips than the test clips judge
    python s2vt/sweep.py --study parts --seeds 3     # one change at a time
    python s2vt/sweep.py --study parts --list        # only print the commands, for another engine to run

One process per core, with one thread each. Run again, the command continues where it stopped. Under --out: a run
folder for every setting and seed, results.txt with a line for each, and for every study its record STUDY.json and
STUDY.png.
"""

from dataclasses import dataclass
from pathlib import Path

from common import run, study
from common.curves import draw_epochs
from common.options import option

import numpy as np
from matplotlib.figure import Figure

import checkpoint
import data
import train
from evaluate import score

MODELS = {
    "S2VT, GRU": {},
    "S2VT, LSTM": dict(cell="lstm"),
    "S2VT, GRU, attention": dict(attention=True),
    "mean of the frames": dict(pooled=True),
}
DROPOUTS = (0.3, 0.5)
BUILTIN_DROPOUTS = (0.0, 0.1, 0.2)
SIZES = {35: 28, 70: 20, 140: 14, 279: 10}  # training clips: epochs, in proportion to 1 / sqrt(clips)


def on_clips(models, **values):
    """{setting: arguments of train.py} of `models` on msvd-clips."""
    return {name: dict(data="msvd-clips", **values, **model) for name, model in models.items()}


def folds_of(models):
    """Every model with every dropout on each fold. The name of a setting is MODEL, dropout X, foldK."""
    return {
        f"{name}, dropout {dropout}, {fold}": setting
        for dropout in DROPOUTS
        for fold in data.SPLITS[2:]
        for name, setting in on_clips(models, dropout=dropout, split=fold).items()
    }


STUDIES = {  # study: {setting: arguments of train.py}
    "order": {"S2VT": {}, "mean of the frames": dict(pooled=True)},
    "parts": {
        "S2VT": {},
        "LSTM cells": dict(cell="lstm"),
        "attention": dict(attention=True),
        "scheduled sampling 0.5": dict(scheduled_sampling=0.5),
        "a constant learning rate": dict(decay="none"),
        "dropout 0.1": dict(dropout=0.1),
    },
    "dropout": {f"dropout {dropout}": dict(dropout=dropout) for dropout in BUILTIN_DROPOUTS},
    "folds": folds_of({name: MODELS[name] for name in ("S2VT, GRU", "mean of the frames")}),
    "clips": on_clips(MODELS, split="train+val"),
    "sizes": {
        f"{count} clips": on_clips(MODELS, train_clips=count, epochs=epochs)["S2VT, GRU"]
        for count, epochs in SIZES.items()
    },
}


def folder_name(setting, seed):
    """The same name for the same arguments, whichever study wants them."""
    words = [f"{k}-{v}".lower().replace("_", "-") for k, v in setting.items()] or ["s2vt"]
    return "-".join([*words, f"s{seed}"])


def jobs_of(args, out):
    """Every run that the studies need, on the built-in videos if a setting names no other data."""

    def folder(setting, seed):
        return out / folder_name(setting, seed)

    def dataset(_, setting):
        return setting.get("data", "builtin")

    return study.plan(train, STUDIES, args, folder, dataset, cost=lambda values: 1.0)


def report(name, rows, out):
    """Write STUDY.json and STUDY.png, and print the table."""
    run.write_json(out / f"{name}.json", {"study": name, "rows": rows})
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    print(f"\n{name}")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        done = [row for row in rows if row["setting"] == setting and row["state"] == "done"]
        if not done:
            continue
        bleu4 = np.mean([row["final"]["test_bleu4"] for row in done])
        order = [row["final"]["order"] for row in done if "order" in row["final"]]
        order_text = f"order right in {np.mean(order):.1%}   " if order else ""
        print(f"  {setting:40} BLEU-4 {bleu4:.3f}   {order_text}({len(done)} runs)")
    draw_epochs(axes, rows, "val_bleu4", "validation BLEU-4")
    axes.set(ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    run.write_figure(out / f"{name}.png", figure)


def score_fresh_clips(folder: Path) -> dict:
    """The scores of the greedy captions of the part "fresh" of the rendered videos, by the network of a run."""
    clips, _ = data.builtin_clips("fresh")
    captions = checkpoint.load(str(folder)).captions(clips.features)
    return score(captions, clips)


@dataclass(kw_only=True)
class Options(study.StudyOptions):
    study: tuple[str, ...] = study.study_option(STUDIES)
    data_dir: str | None = run.data_dir_option()
    out: str = option(str(run.ROOT / "out/s2vt/sweep"), "folder of the study", type=run.path_arg, metavar="DIR")
    epochs: int | None = option(None, "epochs instead of each setting's own, for a quick look", above=0)
    limit: int | None = option(None, "only the first N clips of each part", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    out = Path(args.out)
    if not study.run_jobs(train, jobs_of(args, out), args):
        return
    curves = {name: name for name in ("val_bleu4", "val_cider", "val_loss")}
    for name in args.study:
        rows = []
        for setting, values in STUDIES[name].items():
            for seed in range(args.seeds):
                folder = out / folder_name(values, seed)
                row = study.row(name, setting, seed, folder, **curves)
                if name == "dropout" and row["state"] == "done":
                    epochs = zip(row["val_bleu4"], row["val_cider"])
                    row["val_score"] = max(bleu4 + cider for bleu4, cider in epochs)  # as train.py chooses the epoch
                    row["fresh"] = score_fresh_clips(folder)
                rows.append(row)
        report(name, rows, out)


if __name__ == "__main__":
    run.cli(main)
