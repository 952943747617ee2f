"""Compare captions of msvd-clips: networks, the captions of similar clips, and one caption for all.

    python s2vt/sweep.py --study folds --seeds 1 --out RUNS && python s2vt/compare.py folds --runs RUNS
    python s2vt/sweep.py --study clips sizes --out RUNS && python s2vt/compare.py test --runs RUNS

`folds` describes each of the 301 training clips by what was made without its fold: choice.json, which chooses decoding
and neighbours (the curves in folds.json choose the epoch). `test` describes the 167 test clips: scores-clips.json has
the scores, scores-sizes.json the scores with fewer training clips, intervals.json how far each captioner is ahead of
others, captions.json what they say.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.options import option

import numpy as np

import checkpoint
import data
import scores
from decode import MAX_WIDTH
from evaluate import score
from retrieve import Neighbours, best_constant
from sweep import DROPOUTS, MODELS, SIZES, STUDIES, folder_name

WIDTHS = (1, 2, 3, 5, 10)  # of the beam; 1 is greedy search
NEIGHBOURS = (1, 2, 3, 5, 10, 20, 40)
RESAMPLES = 4000
BASES = ("mean of the frames", "nearest neighbours")


def captions_of(folder: Path, features, width: int) -> list[str]:
    """The captions of clips (N, T, F) by the network of a run. Raises UserError."""
    return checkpoint.load(str(folder)).captions(features, width)


def is_done(folder: Path) -> bool:
    """Has the run in `folder` ended?"""
    file = folder / "run.json"
    return file.exists() and run.read_record(file)["state"] == "done"


def chosen_by(row: dict) -> float:
    """What the folds choose by, as validation does in train.py."""
    return row["bleu4"] + row["cider"]


# ----------------------------------------------------------------------------------------------------------- the folds


def join(parts: list[data.Clips]) -> data.Clips:
    """The validation clips of all folds, one after the other."""
    lists = [[item for part in parts for item in getattr(part, name)] for name in ("ids", "raw", "captions")]
    return data.Clips(lists[0], None, lists[1], lists[2], [])


def fold_rows(args) -> list[dict]:
    """A row for every way to describe the 301 clips that the folds compare."""
    folds = [data.load("msvd-clips", args.data_dir, split=split)[:2] for split in data.SPLITS[2:]]
    everything = join([val for _, val in folds])

    def row(captioner, captions_of_folds, **facts):
        captions = [text for captions in captions_of_folds for text in captions]
        return {"captioner": captioner} | facts | score(captions, everything)

    rows = [row("best constant caption", [[best_constant(train, train)] * len(val) for train, val in folds])]
    known = [(Neighbours(train), val) for train, val in folds]
    for standardized, count in itertools.product((False, True), NEIGHBOURS):
        captions = [neighbours.captions(val.features, count, standardized) for neighbours, val in known]
        rows.append(row("nearest neighbours", captions, neighbours=count, standardized=standardized))
    for name, dropout in itertools.product(MODELS, DROPOUTS):
        settings = [STUDIES["folds"].get(f"{name}, dropout {dropout}, {split}") for split in data.SPLITS[2:]]
        folders = [Path(args.runs) / folder_name(setting, 0) for setting in settings if setting]
        if not folders or not all(map(is_done, folders)):
            if any(folder.exists() for folder in folders):
                print(f"{name}, dropout {dropout}: a fold is missing or has not ended, and it is left out")
            continue
        for width in WIDTHS:
            captions = [captions_of(folder, val.features, width) for folder, (_, val) in zip(folders, folds)]
            rows.append(row(name, captions, dropout=dropout, width=width))
    return rows


def print_choice(rows):
    """For every captioner its rows, the best first."""
    for name in dict.fromkeys(row["captioner"] for row in rows):
        for row in sorted((row for row in rows if row["captioner"] == name), key=chosen_by, reverse=True):
            setting = "  ".join(f"{k} {row[k]}" for k in ("dropout", "width", "neighbours", "standardized") if k in row)
            print(f"{name:24} {setting:32} BLEU-4 {row['bleu4']:.3f}   CIDEr-D {row['cider']:.3f}")


# ------------------------------------------------------------------------------------------------------- the test clips


def test_captions(args) -> tuple[data.Clips, dict, list, list]:
    """(the test clips, their entry in the record, what is said of them). The last are two lists of (facts of a row, its
    captions): by captioners that learned from all training clips, and by networks that learned from a part."""
    train, _, test, _, facts = data.load("msvd-clips", args.data_dir, split="train+val")
    found = [({"captioner": "best constant caption"}, [best_constant(train, train)] * len(test))]
    neighbours = Neighbours(train)
    standardized = not args.raw
    for count in dict.fromkeys((1, args.neighbours)):
        captioner = "nearest clip" if count == 1 else "nearest neighbours"
        row = {"captioner": captioner, "neighbours": count, "standardized": standardized}
        found.append((row, neighbours.captions(test.features, count, standardized)))
    from_part = []
    runs = [(found, name, len(train), setting) for name, setting in STUDIES["clips"].items()]
    runs += [(from_part, "S2VT, GRU", count, setting) for count, setting in zip(SIZES, STUDIES["sizes"].values())]
    for seed in range(args.seeds):
        for rows, name, count, setting in runs:
            folder = Path(args.runs) / folder_name(setting, seed)
            if not is_done(folder):
                print(f"{run.display_path(folder)}: has not ended, and is left out")
                continue
            for width in dict.fromkeys((1, args.beam)):
                decoding = "greedy" if width == 1 else f"beam {width}"
                row = {"captioner": name, "decoding": decoding, "width": width, "train_clips": count, "seed": seed}
                rows.append((row, captions_of(folder, test.features, width)))
    return test, facts, found, from_part


def resample(texts, test: data.Clips, drawn, rng) -> dict[str, tuple]:
    """{score: (its value, (R,) values of R samples)} of a captioner, as a mean over its seeds.

    texts: the captions by each seed; seeds are drawn too. drawn: (R, N), how often a sample has each of the N clips.
    """
    S, R = len(texts), len(drawn)
    seeds = np.stack([np.bincount(rng.integers(S, size=S), minlength=S) for _ in range(R)]) / S  # (R, S)
    counts = np.stack([scores.bleu_counts(captions, test.captions) for captions in texts])  # (S, N, 10)
    bleu4 = scores.bleu4_of(np.stack([drawn @ of_seed for of_seed in counts], 1))  # (R, S)
    each = np.array([scores.cider_each(captions, test.captions) for captions in texts])  # (S, N)
    cider = drawn @ each.T / len(test)  # (R, S)
    return {
        "BLEU-4": (scores.bleu4_of(counts.sum(1)).mean(), (seeds * bleu4).sum(1)),
        "CIDEr-D": (each.mean(), (seeds * cider).sum(1)),
    }


def intervals(test: data.Clips, found, width: int) -> list[dict]:
    """By how much each captioner is ahead of each of BASES, with a 95% interval.

    Clips are drawn with replacement, the same ones for both, and of each captioner its seeds, so that an interval has
    both kinds of chance. BLEU-4 takes the drawn clips as a corpus, CIDEr-D is the mean over them.
    """
    rng, N = np.random.default_rng(0), len(test)
    drawn = np.stack([np.bincount(rng.integers(N, size=N), minlength=N) for _ in range(RESAMPLES)])  # (R, N)
    texts = {}
    for row, captions in found:
        if row.get("width", width) == width:
            texts.setdefault(row["captioner"], []).append(captions)
    samples = {name: resample(by_seed, test, drawn, rng) for name, by_seed in texts.items()}
    rows = []
    for base, name, measure in itertools.product(BASES, samples, ("BLEU-4", "CIDEr-D")):
        if base not in samples or name == base:
            continue
        (value, values), (base_value, base_values) = samples[name][measure], samples[base][measure]
        low, high = np.quantile(values - base_values, (0.025, 0.975))
        lead = {"difference": float(value - base_value), "low": float(low), "high": float(high)}
        rows.append({"captioner": name, "against": base, "score": measure, "seeds": len(texts[name])} | lead)
    return rows


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    part: str = option("", "the 301 clips by folds, or the test clips", choices=["folds", "test"], positional=True)
    runs: str = option("", "the runs of sweep.py", type=run.path_arg, metavar="DIR", required=True)
    seeds: int = option(3, "seeds of the runs", above=0)
    beam: int = option(3, "beam width that the folds chose", above=0, at_most=MAX_WIDTH)
    neighbours: int = option(10, "number of neighbours that the folds chose", above=0)
    raw: bool = option(False, "compare features as they are; the folds chose standardized ones")
    coco: bool = option(False, "also the scores of pycocoevalcap; METEOR needs Java")
    data_dir: str | None = run.data_dir_option()
    out: str | None = option(
        None, "folder of the records (default: the folder of the runs)", type=run.path_arg, metavar="DIR"
    )


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    if not Path(args.runs).is_dir():
        raise run.UserError(f"--runs {args.runs}: is not a folder; python s2vt/sweep.py --out DIR makes one")
    out = run.make_folder(args.out or args.runs)
    common = {"scores": "s2vt", "tokenization": scores.TOKENIZATION}
    common |= run.environment(run.pick_device("cpu"), __file__)
    if args.part == "folds":
        rows = fold_rows(args)
        print_choice(rows)
        run.write_json(out / "choice.json", common | {"rows": rows})
        return
    test, facts, found, from_part = test_captions(args)
    common["dataset"] = facts
    rows = [captioner | score(captions, test, coco=args.coco) for captioner, captions in found]
    part_rows = [captioner | score(captions, test) for captioner, captions in from_part]
    texts = [captioner | {"captions": captions} for captioner, captions in found]
    run.write_json(out / "scores-clips.json", common | {"rows": rows})
    run.write_json(out / "scores-sizes.json", common | {"rows": part_rows})
    run.write_json(out / "intervals.json", common | {"rows": intervals(test, found, args.beam)})
    run.write_json(out / "captions.json", common | {"ids": test.ids, "rows": texts})
    for row in rows + part_rows:
        setting = "  ".join(f"{k} {row[k]}" for k in ("width", "neighbours", "train_clips", "seed") if k in row)
        print(f"{row['captioner']:24} {setting:40} BLEU-4 {row['bleu4']:.3f}   CIDEr-D {row['cider']:.3f}")


if __name__ == "__main__":
    run.cli(main)
