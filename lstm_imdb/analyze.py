"""Where is a trained model wrong? By length, by stars, and when it reads less of a review. Short texts: pairs.py.

    python lstm_imdb/analyze.py                                          # the newest finished run
    python lstm_imdb/analyze.py --run out/lstm_imdb/imdb-plain-s0-1 --data-dir DIR

Writes into --out: analysis.json, analysis.png and mistakes.txt, the most confident mistakes on the test set. Stars are
known if the files are named after them, as in aclImdb.
"""

import sys
from dataclasses import dataclass

from common import run
from common.arguments import (
    ROOT,
    ScriptOptions,
    data_dir_option,
    device_option,
    parse_options,
    path_arg,
    threads_option,
)
from common.options import option

import torch
from matplotlib.figure import Figure

import outcome
import saved
import train
from data import dataset_arg

AUTO_THREADS = 1

EDGES = (0, 50, 100, 150, 200, 300, 400, 600, 1000, 10**9)  # words
TRUNCATIONS = (50, 100, 200, 400, 800)


def groups(values: torch.Tensor, correct: torch.Tensor, edges) -> list[dict]:
    """Reviews and errors for each interval [edge, next edge) of `values`."""
    rows = []
    for low, high in zip(edges, edges[1:]):
        inside = (values >= low) & (values < high)
        if inside.any():
            rows.append(
                {
                    "from": low,
                    "to": high - 1,
                    "reviews": int(inside.sum()),
                    "error": 1 - correct[inside].float().mean().item(),
                }
            )
    return rows


def draw(record):
    """Panels: error by length, by stars if known, and accuracy against truncation."""
    analysis = record["analysis"]
    panels = ["length", "truncation"]
    if analysis["stars"]:
        panels.append("stars")
    figure = Figure(figsize=(4.4 * len(panels), 3.3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels)), panels):
        rows = analysis[name]
        if name == "truncation":
            for keep in ("start", "end"):
                points = [(row["words"], row["test_accuracy"]) for row in rows if row["keep"] == keep]
                axes.plot(*zip(*points), marker="o", label=f"the {keep} of the review")
            axes.set(xscale="log", xlabel="words that are read", ylabel="test accuracy")
            axes.set_xticks(TRUNCATIONS, map(str, TRUNCATIONS))
            axes.minorticks_off()
            axes.legend()
        else:
            labels = [
                f"{row['from']}" + (f"-{row['to']}" if row["to"] < 1e8 else "+") * (name == "length") for row in rows
            ]
            bars = axes.bar(labels, [row["error"] for row in rows], color="tab:blue")
            axes.bar_label(bars, [f"{row['reviews']:,}" for row in rows], fontsize=7)
            axes.margins(y=0.1)
            axes.tick_params(axis="x", rotation=45 if name == "length" else 0)
            axes.set(xlabel="words of the review" if name == "length" else "stars", ylabel="test error")
        axes.grid(alpha=0.3)
    return figure


@dataclass(kw_only=True)
class Options(ScriptOptions):
    run: str | None = option(None, "a run folder or a safetensors file of weights", type=path_arg, metavar="RUN")
    data: str | None = option(None, "(default: the dataset of the run)", type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = data_dir_option()
    device: str = device_option()
    threads: int | str = threads_option()
    out: str = option(str(ROOT / "out/lstm_imdb/analysis"), "folder of the results", type=path_arg, metavar="DIR")


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    out, device = run.make_folder(args.out), run.pick_device(args.device)
    found = saved.open_model(args.run, device)
    print(saved.describe(found), file=sys.stderr)
    values = found.args
    for name in ("data", "data_dir"):
        setattr(values, name, getattr(args, name) or getattr(values, name))
    loaded = train.load_data(values)
    if loaded.vocabulary.words != found.vocabulary.words or len(loaded.corpus.classes) != 2:
        raise run.UserError(
            f"--data {values.data}: is not the dataset of this model's training, or does not have two classes"
        )
    evaluator = Evaluator(device)
    _, accuracy, logits = train.evaluate(found.net, loaded.test, evaluator)
    correct = logits.argmax(1) == loaded.test.labels
    analysis = {"accuracy": accuracy, "length": groups(loaded.test.starts.diff(), correct, EDGES), "stars": None}
    if loaded.corpus.ratings:
        stars = torch.tensor([loaded.corpus.ratings[i] for i in loaded.test.rows.tolist()])
        analysis["stars"] = groups(stars, correct, range(1, 12))
    analysis["truncation"] = []
    for keep in ("start", "end"):
        for words in TRUNCATIONS:
            loaded.test.max_len, loaded.test.keep = words, keep
            score = train.evaluate(found.net, loaded.test, evaluator)[1]
            analysis["truncation"].append({"keep": keep, "words": words, "test_accuracy": score})
    run.write(out / "mistakes.txt", outcome.mistakes(loaded, (logits / found.temperature).softmax(1)))
    recorded = {name: value for name, value in vars(values).items() if name in ("recipe", "seed", "max_len", "keep")}
    common = {"state": "done", "args": recorded, "dataset": loaded.facts}
    rows = [common | {"study": "truncation"} | row for row in analysis["truncation"]]
    record = {
        "study": "analysis",
        **run.environment(device, __file__, argv),
        "args": recorded,
        "analysis": analysis,
        "rows": rows,
    }
    run.write_json(out / "analysis.json", record)
    run.write_figure(out / "analysis.png", draw(record))
    print(f"test accuracy {accuracy:.2%} on {len(loaded.test):,} reviews")
    for row in analysis["truncation"]:
        print(f"the {row['keep']:5} of a review, {row['words']:>3} words: {row['test_accuracy']:.2%}")
    print(run.display_path(out))
    return analysis


class Evaluator:
    """The part of a run that train.evaluate needs: the device, and float32."""

    def __init__(self, device):
        self.device = device

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=False)


if __name__ == "__main__":
    run.cli(main)
