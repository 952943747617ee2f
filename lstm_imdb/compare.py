"""Is one model better than another? The paired difference of accuracies on the same test reviews, from records alone.

    python lstm_imdb/compare.py                        # the committed records: every recipe against the baselines
    python lstm_imdb/compare.py RUN.json BASELINE.json

A record keeps a bit for each test review: right or wrong. With several seeds, each review
counts with its mean. The 95% interval is for the mean difference; if it excludes zero, the models differ.
Writes compare.json into --out.
"""

from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option

import numpy as np
import torch

import outcome

SAME = {"digest": "dataset", "split": "split", "test": "number of test reviews"}  # of records that are compared
RESULTS = Path(__file__).resolve().parent / "results"


def read_models(paths) -> dict[str, dict]:
    """{recipe or setting: {"correct": mean over seeds (N,), "accuracies": [...], "dataset"}}. Raises UserError."""
    models, tested_on = {}, None
    seen = set()  # (model, seed)
    for path in paths:
        content = run.read_json(Path(path))
        rows = content.get("rows", [content])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise run.UserError(f"{path}: is damaged: its rows are not a list of objects")
        predictions = []
        for row in rows:
            if row.get("state") == "diverged":
                continue
            predictions.append(read_row(path, row))
            model = predictions[-1][0], row.get("seed", row["args"].get("seed"))
            if model in seen:
                raise run.UserError(
                    f"{path}: holds another record of {model[0]} with seed {model[1]}; give one of them"
                )
            seen.add(model)
        if not predictions:
            raise run.UserError(f"{path}: has no finished run")
        for name, correct, dataset in predictions:
            tested_on = tested_on or dataset
            for key, what in SAME.items():
                if dataset.get(key) != tested_on.get(key):
                    raise run.UserError(f"{path}: has another {what} than {paths[0]}")
            model = models.setdefault(name, {"correct": [], "dataset": dataset})
            model["correct"].append(correct)
    for model in models.values():
        model["accuracies"] = [float(correct.mean()) for correct in model["correct"]]
        model["correct"] = np.mean(model["correct"], 0)
    return models


def read_row(path, row: dict) -> tuple[str, np.ndarray, dict]:
    """(name of the model, which test reviews it has right (N,), dataset) of a record. Raises UserError."""
    for name in ("final", "dataset", "args"):
        if not isinstance(row.get(name), dict):
            raise run.UserError(f"{path}: is not a record of a model on test reviews: it has no {name!r}")
    count = row["dataset"].get("test")
    digits = row["final"].get("test_correct")
    recipe = row["args"].get("recipe")
    name = row.get("setting", recipe)  # the setting of a study
    if not isinstance(recipe, str) or not isinstance(name, str):
        raise run.UserError(f"{path}: is not a record of a model on test reviews: it names no recipe")
    try:
        correct = outcome.unpack(digits, count)
    except (TypeError, ValueError) as error:
        raise run.UserError(f"{path}: has no valid test_correct: a bit for each of the test reviews") from error
    return recipe if recipe.startswith("TF-IDF") else name, correct, row["dataset"]


def compare(models: dict[str, dict]) -> list[dict]:
    """Rows: every model against every baseline (a recipe whose name begins with TF-IDF)."""
    rows = []
    for name, ours in models.items():
        for bar, theirs in models.items():
            if name.startswith("TF-IDF") or not bar.startswith("TF-IDF"):
                continue
            difference, half = outcome.paired_difference(ours["correct"], theirs["correct"])
            verdict = "undecided"
            if abs(difference) > half:
                verdict = "passes" if difference > 0 else "fails"
            rows.append(
                {
                    "state": "done",
                    "model": name,
                    "bar": bar,
                    "seeds": len(ours["accuracies"]),
                    "accuracy": float(np.mean(ours["accuracies"])),
                    "difference": difference,
                    "half": half,
                    "low": difference - half,
                    "high": difference + half,
                    "verdict": verdict,
                    "dataset": ours["dataset"],
                }
            )
    return rows


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    records: tuple[str, ...] = option(
        (), "run.json files, records of sweeps, baseline.json", type=run.path_arg, positional=True
    )
    out: str = option(str(run.ROOT / "out/lstm_imdb/compare"), "folder of the record", type=run.path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    models = read_models(args.records or [RESULTS / "baseline.json", *sorted(RESULTS.glob("*-s[0-9].json"))])
    rows = compare(models)
    if not rows:
        raise run.UserError("nothing to compare: name a record of a run and one of baseline.py")
    for row in rows:
        print(
            f"{row['model']:>16} ({row['seeds']} seeds, {row['accuracy']:.2%}) less {row['bar']}: "
            f"{100 * row['difference']:+.2f} points, 95% interval {100 * row['low']:+.2f} to "
            f"{100 * row['high']:+.2f}: {row['verdict']}"
        )
    out, machine = run.make_folder(args.out), run.environment(torch.device("cpu"), __file__, argv)
    run.write_json(out / "compare.json", {"study": "compare", **machine, "rows": rows})
    return rows


if __name__ == "__main__":
    run.cli(main)
