"""How well does a model read short texts? 200 minimal pairs: a negative and a positive text that differ in a few words.

    python lstm_imdb/pairs.py                                            # the newest finished run
    python lstm_imdb/pairs.py RUN lstm_imdb/weights/short.safetensors    # several models

The pairs are in pairs.csv: plain statements, negation, contrast, intensity and sarcasm. Half of them, "choose", are for
choosing a model; the other half, "table", are for the table in the README. A pair is right if both of its texts are.
Writes pairs.json into --out.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.arguments import ROOT, ScriptOptions, parse_options, path_arg
from common.options import option

import torch

import outcome
import predict
import saved

FILE = Path(__file__).resolve().parent / "pairs.csv"
SPLITS = ("choose", "table")
LABELS = ("negative", "positive")
ALL = "all"  # the kinds together


class Pair(NamedTuple):
    kind: str
    split: str
    negative: str
    positive: str


def read_pairs() -> list[Pair]:
    """The pairs of pairs.csv, in its order."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return [Pair(**row) for row in csv.DictReader(file)]


def answer(found: saved.Model, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """(is each text right, is the model sure of it), bool (pairs, 2) each: negative texts, positive ones.

    Raises UserError if the classes of the model are not negative and positive.
    """
    if sorted(found.classes) != sorted(LABELS):
        raise run.UserError(f"{found.path}: its classes are not negative and positive")
    texts = [text for pair in pairs for text in (pair.negative, pair.positive)]
    explained = predict.explain(found, texts)
    for text, given in zip(texts, explained):
        if given is None:
            raise run.UserError(f"{found.path}: of {text!r} it reads no word, so it cannot be compared here")
    probabilities = torch.tensor([given.probabilities for given in explained])  # (2 x pairs, 2)
    confidence, predicted = probabilities.max(1)
    truth = torch.tensor([found.classes.index(label) for label in LABELS]).repeat(len(pairs))
    return (predicted == truth).view(-1, 2), (confidence >= outcome.UNSURE).view(-1, 2)


def score(found: saved.Model, pairs: list[Pair]) -> dict[tuple[str, str], dict]:
    """{(split, kind): {"pairs_right", "texts_right", "sure", "sure_right"}}: how many pairs and texts are right, of how
    many texts the model is sure, and how many of these are right."""
    right, sure = answer(found, pairs)
    scores = {}
    for split, kind in groups(pairs):
        inside = torch.tensor([is_in(pair, split, kind) for pair in pairs])
        scores[split, kind] = {
            "pairs_right": int(right[inside].all(1).sum()),
            "texts_right": int(right[inside].sum()),
            "sure": int(sure[inside].sum()),
            "sure_right": int((sure & right)[inside].sum()),
        }
    return scores


def groups(pairs: list[Pair]) -> list[tuple[str, str]]:
    """(split, kind) of every row of the table, in its order."""
    kinds = [*dict.fromkeys(pair.kind for pair in pairs), ALL]
    return [(split, kind) for split in SPLITS for kind in kinds]


def is_in(pair: Pair, split: str, kind: str) -> bool:
    return pair.split == split and kind in (pair.kind, ALL)


@dataclass(kw_only=True)
class Options(ScriptOptions):
    run: tuple[str, ...] = option(
        (), "run folders, or safetensors files of weights", type=path_arg, metavar="RUN", positional=True
    )
    out: str = option(str(ROOT / "out/lstm_imdb/pairs"), "folder for pairs.json", type=path_arg, metavar="DIR")


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    run.set_threads(auto_threads=predict.AUTO_THREADS)
    pairs = read_pairs()
    scores = {}
    for name in args.run or [None]:
        found = saved.open_model(name)
        print(saved.describe(found), file=sys.stderr)
        short = found.path.name.removesuffix(".safetensors")
        scores[run.display_path(found.path) if short in scores else short] = score(found, pairs)
    rows = []
    for split, kind in groups(pairs):
        count = sum(is_in(pair, split, kind) for pair in pairs)
        row = {"split": split, "kind": kind, "pairs": count, "texts": 2 * count}
        for model, of_model in scores.items():
            row[model] = of_model[split, kind]
            print(f"{split:<6} {kind:<10} {run.printable(model)}: {in_words(row, row[model])}")
        rows.append(row | {"state": "done"})
    out = run.make_folder(args.out)
    machine = run.environment(torch.device("cpu"), __file__, argv)
    run.write_json(out / "pairs.json", {"study": "pairs", **machine, "rows": rows})
    print(run.display_path(out / "pairs.json"))
    return rows


def in_words(row: dict, counts: dict) -> str:
    return (
        f"{counts['pairs_right']} of {row['pairs']} pairs right, {counts['texts_right']} of {row['texts']} texts; "
        f"sure of {counts['sure']}, of which {counts['sure_right']} are right"
    )


if __name__ == "__main__":
    run.cli(main)
