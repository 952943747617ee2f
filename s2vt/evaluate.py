"""Score a trained network on clips, and write its captions.

    python s2vt/evaluate.py --beam 1 2 5 10                       # the test clips, several widths of the beam
    python s2vt/evaluate.py --data DATA --captions OUT            # the course's `hw2_seq2seq.sh DATA OUT`
    python s2vt/evaluate.py --data DATA --run out/s2vt/msvd-gru-s0-1 --beam 5

DATA: a folder with feat/ID.npy or testing_data/feat/ID.npy and, for scores, testing_label.json; or the name of a
dataset; auto is the dataset that the network was trained on. OUT gets one line `id,caption` per clip, by the last of
the --beam widths. scores.json goes into --out.
"""

import csv
import hashlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.arguments import (
    ScriptOptions,
    data_dir_option,
    device_option,
    parse_options,
    path_arg,
    threads_option,
)
from common.options import option

import checkpoint
import data
import readers
import scores
from data import DATA_HELP, dataset_arg
from decode import MAX_WIDTH, caption_all
from retrieve import best_constant

AUTO_THREADS = 1

COLUMNS = ("bleu1", "bleu2", "bleu3", "bleu4", "cider", "course_bleu1", "log_likelihood")
TITLES = {"log_likelihood": "log p", "order_precision": "precision"}
COCO_COLUMNS = ("bleu1", "bleu2", "bleu3", "bleu4", "cider", "rouge_l", "meteor")


def data_of(trained) -> str:
    """The dataset that a network was trained on: its name, or the path of its folder. Raises UserError."""
    name = trained.config["dataset"]
    folder = None  # of the user's own
    if trained.folder and (trained.folder / "local.json").exists():
        folder = run.read_json(trained.folder / "local.json").get("data")
    if folder is None and name in data.NAMED:
        return name
    if folder is None or not os.path.isdir(str(folder)):
        where = f", and {folder} is gone" if folder else ""
        raise run.UserError(f"{trained.name}: was trained on a folder named {name}{where}; say where it is with --data")
    return str(folder)


def test_clips(name: str, data_dir: str | None, trained) -> tuple[data.Clips, dict]:
    """(clips, their entry in the record): the test clips of a dataset, its validation clips if it has none, or all
    clips of a folder of features. Clips of a folder without labels have no captions. Raises UserError."""
    folder = run.data_dir(data_dir) / "msvd" if name == "msvd" else Path(name)
    feat = next((f for f in (folder / "testing_data" / "feat", folder / "feat") if f.is_dir()), None)
    named = name in ("builtin", "msvd-clips", "msvd40") or any(folder.glob("*videodatainfo*.json"))
    if feat and not named:
        clips, facts, extractor = folder_clips(folder, feat, trained.config["features"])
    elif named or data.is_there(folder):
        _, val, test, _, facts = data.load(name, data_dir)
        clips = val if test is None else test
        extractor = facts["extractor"]
        facts["scored_on"] = "validation" if test is None else "test"
    else:
        raise run.UserError(f"{folder}: holds neither feat/ nor testing_data/feat/")
    known = trained.config["extractor"]
    if extractor and known and extractor != known:
        raise run.UserError(f"{name}: holds features of {extractor}; {trained.name} was trained on features of {known}")
    columns = clips.features.shape[2]
    if columns != trained.config["features"]:
        raise run.UserError(
            f"{name}: holds features of {columns:,} columns, and {trained.name} takes {trained.config['features']:,}"
        )
    if trained.config["dataset"] == "msvd40":
        facts["demonstration"] = True
        why = "was trained on clips of MSVD's test part; these scores are a demonstration, no result"
        print(f"{trained.name}: {why}", file=sys.stderr)
    return clips, facts


def folder_clips(folder, feat, columns):
    """(clips, facts, extractor) of all files of features in `feat`, with the captions of testing_label.json."""
    notes = readers.Notes()
    digest = hashlib.sha256()
    file = folder / "testing_label.json"
    labels = readers.read_labels(file, notes) if file.exists() else {}
    there = sorted(f.name.removesuffix(".npy") for f in feat.glob("*.npy"))
    if labels:
        for name in there:
            if name not in labels:
                notes.add("files of features without captions, left out", name)
    ids, features = readers.read_features(feat, list(labels) or there, notes, digest, columns)
    notes.print(folder)
    raw = [labels.get(name, []) for name in ids]
    captions = [[readers.normalize(caption) for caption in of_clip] for of_clip in raw]
    facts = {
        "name": folder.name,
        "builtin": False,
        "digest": digest.hexdigest()[:32],
        "clips": len(ids),
        "left_out": notes.counts(),
        "scored_on": "test",
    }
    extractor = readers.extractor_of(feat, features.shape[2])
    return data.Clips(ids, features, raw, captions, []), facts, extractor


def score(captions: list[str], clips: data.Clips, coco: bool = False) -> dict:
    """All scores of captions against the references of their clips, and for built-in clips the scores of order."""
    row = {f"bleu{n}": value for n, value in enumerate(scores.bleu(captions, clips.captions), 1)}
    row["cider"] = scores.cider(captions, clips.captions)
    row["course_bleu1"] = scores.course_bleu1(captions, clips.raw)
    if coco:
        row["coco"] = scores.coco_scores(captions, clips.raw)
    if clips.events is not None:
        row |= scores.order_scores(captions, clips.events)
        row["kinds"] = scores.order_by_kind(captions, clips.events)
    return row


def print_rows(rows):
    """All scores with our tokenization, right directions by kind of event, and the scores of --coco, as tables."""
    first = rows[0]
    print_table(rows, [*COLUMNS, *(key for key in ("order", "order_precision") if key in first)])
    print(f"bleu, cider: {scores.TOKENIZATION}; published scores use PTB's tokenization")
    print("course_bleu1: the score of the course, of each clip by itself; log p: mean log-likelihood")
    if "kinds" in first:
        print("\nright directions by kind of event")
        print_table([row["kinds"] | {"captions": row["captions"]} for row in rows], list(first["kinds"]))
    if "coco" in first:
        print()
        print_table([row["coco"] | {"captions": row["captions"]} for row in rows], COCO_COLUMNS)
        tokenization = "our tokenization, since there is no Java"
        if first["coco"]["tokenization"] == "PTB":
            tokenization = "PTB's tokenization (Java), as published scores"
        print(f"pycocoevalcap, on captions of {tokenization}")


def print_table(rows, names):
    """A line for each row: its captions, and a column for each of `names`."""
    titles = [TITLES.get(name, name) for name in names]
    print(f"{'':24}" + "".join(f"{title:>13}" for title in titles))
    for row in rows:
        cells = ["" if row.get(name) is None else f"{row[name]:.3f}" for name in names]
        print(f"{row['captions']:24}" + "".join(f"{cell:>13}" for cell in cells))


@dataclass(kw_only=True)
class Options(ScriptOptions):
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = data_dir_option()
    run: str | None = option(None, checkpoint.HELP, type=path_arg, metavar="RUN")
    captions: str | None = option(None, "file for the lines id,caption", type=path_arg, metavar="OUT")
    beam: tuple[int, ...] = option((1, 5), "beam widths; 1 is greedy search", above=0, at_most=MAX_WIDTH, nargs="+")
    coco: bool = option(False, "also the scores of pycocoevalcap; METEOR needs Java")
    device: str = device_option()
    threads: int | str = threads_option()
    out: str | None = option(None, "folder for scores.json (default: the run folder)", type=path_arg, metavar="DIR")


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    if args.captions and Path(args.captions).exists() and not Path(args.captions).is_file():
        raise run.UserError(f"{args.captions}: is not a regular file")  # a device would be replaced by a file
    trained = checkpoint.load(args.run, device)
    args.data = data_of(trained) if args.data == "auto" else args.data
    clips, facts = test_clips(args.data, args.data_dir, trained)
    print(f"{len(clips):,} {facts['scored_on']} clips of {facts['name']}")
    has_labels = any(clips.captions)
    if has_labels and not all(clips.captions):
        raise run.UserError(f"{args.data}: some clips have no captions")
    if not has_labels and not args.captions:
        raise run.UserError(f"{args.data}: has no captions to compare with; --captions OUT writes ours")
    rows = []
    for width in args.beam:
        captions = caption_all(trained.net, clips.features, width, trained.config["max_words"])
        texts = [trained.vocabulary.decode(caption.words) for caption in captions]
        mean = sum(caption.log_likelihood for caption in captions) / len(captions)
        row = {"captions": "greedy" if width == 1 else f"beam {width}", "width": width, "log_likelihood": mean}
        if has_labels:
            row |= score(texts, clips, args.coco)
        rows.append(row)
    if args.captions:
        write_captions(Path(args.captions), clips.ids, texts)
        print(f"{len(texts):,} captions in {run.display_path(args.captions)}")
    if not has_labels:
        return
    if clips.events is not None:
        train, val, *_ = data.load("builtin")
        constant = best_constant(train, val)
        row = {"captions": "best constant caption", "text": constant}
        rows.append(row | score([constant] * len(clips), clips, args.coco))
    print_rows(rows)
    is_run = args.run is None or Path(args.run).is_dir()
    folder = args.out or (trained.folder if is_run else None)
    if folder:
        record = {
            "scores": "s2vt",
            "run": trained.folder.resolve().name if trained.folder else Path(trained.name).name,
            **run.environment(device, __file__),
            "dataset": facts,
            "tokenization": scores.TOKENIZATION,
            "rows": rows,
        }
        run.write_json(run.make_folder(folder) / "scores.json", record)


def write_captions(path: Path, ids: list[str], texts: list[str]):
    """Write a line `id,caption` per clip. An id with a comma, a quotation mark or a line end is quoted, as in CSV."""
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows(zip(ids, texts))
    run.write(path, content.getvalue())


if __name__ == "__main__":
    run.cli(main)
