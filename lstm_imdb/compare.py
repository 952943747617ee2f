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

RESULTS = Path(__file__).resolve().parent / "results"


def read_models(paths) -> dict[str, dict]:
    """{recipe or setting: {"correct": mean over seeds (N,), "accuracies": [...], "dataset"}}. Raises UserError."""
    models = {}
    for path in paths:
        content = run.read_json(Path(path))
        for row in content.get("rows", [content]):
            final, dataset = row.get("final") or {}, row.get("dataset") or {}
            if "test_correct" not in final or not isinstance(dataset.get("test"), int):
                continue
            recipe = row["args"]["recipe"]
            name = recipe if recipe.startswith("TF-IDF") else row.get("setting", recipe)  # the setting of a study
            found = models.setdefault(name, {"correct": [], "dataset": dataset})
            if any(found["dataset"].get(key) != dataset.get(key) for key in ("digest", "split", "test")):
                raise run.UserError(f"{path}: was tested on other reviews than the rest")
            found["correct"].append(outcome.unpack(final["test_correct"], dataset["test"]))
    for found in models.values():
        found["accuracies"] = [float(correct.mean()) for correct in found["correct"]]
        found["correct"] = np.mean(found["correct"], 0)
    return models


def compare(models: dict[str, dict]) -> list[dict]:
    """Rows: every model against every baseline (a recipe whose name begins with TF-IDF)."""
    rows = []
    for name, ours in models.items():
        for bar, theirs in models.items():
            if name.startswith("TF-IDF") or not bar.startswith("TF-IDF"):
                continue
            if len(ours["correct"]) != len(theirs["correct"]):
                raise run.UserError(f"{name} and {bar} were tested on other reviews")
            difference, half = outcome.paired_difference(ours["correct"], theirs["correct"])
            verdict = "passes" if difference > half else "fails" if difference < -half else "undecided"
            rows.append({"state": "done", "model": name, "bar": bar, "seeds": len(ours["accuracies"]),
                         "accuracy": float(np.mean(ours["accuracies"])), "difference": difference, "half": half,
                         "low": difference - half, "high": difference + half, "verdict": verdict,
                         "dataset": ours["dataset"]})  # fmt: skip
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
        print(f"{row['model']:>16} ({row['seeds']} seeds, {row['accuracy']:.2%}) less {row['bar']}: "
              f"{100 * row['difference']:+.2f} points, 95% interval {100 * row['low']:+.2f} to "
              f"{100 * row['high']:+.2f}: {row['verdict']}")  # fmt: skip
    out, machine = run.make_folder(args.out), run.environment(torch.device("cpu"), __file__, argv)
    run.write_json(out / "compare.json", {"study": "compare", **machine, "rows": rows})
    return rows


if __name__ == "__main__":
    run.cli(main)
