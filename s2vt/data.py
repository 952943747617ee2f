"""Clips as frame features with their captions: MSVD in the form that courses use, MSR-VTT, or the built-in videos.

    python s2vt/data.py --data msvd        # read it, print the counts

Where the data lie (DIR is --data-dir/msvd, or the folder that --data names):

    DIR/training_label.json, DIR/testing_label.json      [{"id": "x.avi", "caption": ["A man sings.", ...]}, ...]
    DIR/training_data/feat/x.avi.npy, DIR/testing_data/feat/...   float32 or float64 (frames, columns)
    DIR/*videodatainfo*.json, DIR/feat/video0.npy        MSR-VTT: its files of labels, features (or video0.mp4.npy)

msvd-clips are the 468 clips that msvd_clips.txt names, with their part in MSVD's own split of 1,970. They are read from
--data-dir/msvd_clips, in the form above; DIR/feat, if it is there, holds the features of all of them:

    python s2vt/extract_features.py YouTubeClips --only s2vt/msvd_clips.txt --out data/msvd_clips/feat \\
        --extractor efficientnet_lite0 --frames 28

What cannot be used is named and counted on standard error, and counted in the record.
"""

import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.options import option

import numpy as np
import torch
from torch import Tensor

import extractors
import videos
from model import BOS, EOS, PAD, UNK
from readers import Notes, extractor_of, normalize, read_features, read_labels, read_msrvtt

DATA_HELP = "msvd, msvd-clips (468 of its clips), msvd40 (40, a demonstration), builtin, auto, or a folder of that form"
NAMED = ("builtin", "msvd", "msvd-clips", "msvd40")
dataset_arg = run.dataset_arg("auto", *NAMED)
MSVD_CLIPS = Path(__file__).resolve().with_name("msvd_clips.txt")  # lines "PART ID"
FOLDS = 5
SPLITS = ("train", "train+val", *(f"fold{k + 1}" for k in range(FOLDS)))
VAL_SHARE = {"msvd40": 0.25}  # else 7%: about 100 of MSVD's 1,450 clips


class Vocabulary:
    """Words and their ids; the first four are <pad>, <bos>, <eos> and <unk>."""

    SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]

    def __init__(self, words: list[str]):
        self.words = words
        self.ids = {word: i for i, word in enumerate(words)}

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def build(cls, captions: list[str], min_count: int) -> "Vocabulary":
        """The words that occur at least `min_count` times in normalized captions, in the order of the alphabet."""
        counts = Counter(word for caption in captions for word in caption.split())
        return cls(cls.SPECIAL + sorted(word for word, count in counts.items() if count >= min_count))

    def encode(self, caption: str) -> list[int]:
        """The ids of a normalized caption, and <eos>."""
        return [self.ids.get(word, UNK) for word in caption.split()] + [EOS]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


class Batch(NamedTuple):
    """Clips with all their captions. features: (B, T, F); words: int64 (N, L), which begin with <bos>; targets:
    int64 (N, L), the same one step later, with <eos> and then padding; clip: int64 (N,), whose caption it is."""

    features: Tensor
    words: Tensor
    targets: Tensor
    clip: Tensor


@dataclass
class Clips:
    """features: float16 (N, T, F); captions: normalized, several a clip; raw: as they were published; tokens: ids of
    the captions, cut at the maximum length; events: of built-in clips, what happens in them."""

    ids: list[str]
    features: Tensor
    raw: list[list[str]]
    captions: list[list[str]]
    tokens: list[list[list[int]]]
    events: list | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int | None) -> "Clips":
        """The first `count` clips; all of them for None."""
        return Clips(
            self.ids[:count],
            self.features[:count],
            self.raw[:count],
            self.captions[:count],
            self.tokens[:count],
            None if self.events is None else self.events[:count],
        )

    def batches(
        self, bs: int, shuffle: tuple[int, int], first_step: int = 0, device="cpu", each: int | None = None
    ) -> Iterator[Batch]:
        """Batches of `bs` clips, the last one smaller, from step `first_step` on. each: how many captions of a clip are
        drawn; None: all of them. Order and captions are a function of shuffle = (seed, epoch)."""
        generator = torch.Generator().manual_seed(run.seed_at(*shuffle))
        order = torch.randperm(len(self), generator=generator)
        draw = torch.rand(len(self), generator=generator)
        for index in order.split(bs)[first_step:]:
            yield self.batch(index, device, each, draw)

    def batch(self, index: Tensor, device="cpu", each: int | None = None, draw: Tensor | None = None) -> Batch:
        """The batch of the clips `index` (B,), with all captions, or `each` of a clip from its place draw[clip] on."""
        rows = []  # the tokens of each caption
        clip = []  # whose caption it is
        for i, k in enumerate(index.tolist()):
            captions = self.tokens[k]
            if each is not None and each < len(captions):
                first = int(draw[k] * len(captions))
                captions = (captions + captions)[first : first + each]
            rows += captions
            clip += [i] * len(captions)
        targets = torch.full((len(rows), max(map(len, rows))), PAD)
        for target, ids in zip(targets, rows):
            target[: len(ids)] = torch.tensor(ids)
        words = targets.roll(1, 1)
        words[:, 0] = BOS
        words = words.masked_fill(words == EOS, PAD)  # <eos> is never read
        batch = (self.features[index], words, targets, torch.tensor(clip))
        return Batch(*(run.to_device(part, device) for part in batch))


def split_off(ids: list[str], share: float) -> tuple[list[str], list[str]]:
    """(training, validation) ids: the share whose names have the smallest hash validates, in any order of the file."""
    by_hash = sorted(ids, key=lambda name: hashlib.sha256(name.encode(errors="surrogatepass")).digest())
    count = max(1, round(share * len(ids)))
    return sorted(by_hash[count:]), sorted(by_hash[:count])


def split_off_groups(groups: list[list[str]], share: float, notes: Notes) -> tuple[list[str], list[str]]:
    """(training, validation) ids: as `split_off`, but the clips of a group stay together."""
    members = {group[0]: group for group in groups}
    for group in groups:
        for name in group[1:]:
            notes.add("copies of other clips, on the same side of the split", name)

    def with_copies(names):
        return sorted(name for first in names for name in members[first])

    train, val = split_off(list(members), share)
    return with_copies(train), with_copies(val)


def copies(folder: Path, ids: list[str]) -> list[list[str]]:
    """The clips in groups of equal files of features, which come of copies of a video; a clip without a copy is a group
    of its own."""
    groups = {}
    for name in sorted(ids):
        file = folder / f"{name}.npy"
        content = hashlib.sha256(file.read_bytes()).digest() if file.is_file() else name
        groups.setdefault(content, []).append(name)
    return list(groups.values())


def note_copies(parts: list[Clips | None], notes: Notes):
    """Note the validation and test clips whose features equal the features of a training clip."""
    train, val, test = parts
    known = {array.tobytes() for array in train.features.numpy()}
    names = set(train.ids)  # some splits validate on training clips
    for part, what in ((val, "validation"), (test, "test")):
        if part is None:
            continue
        for name, array in zip(part.ids, part.features.numpy()):
            if name not in names and array.tobytes() in known:
                notes.add(f"{what} clips with the features of a training clip", name)


# -------------------------------------------------------------------------------------------------------------- load


def is_there(folder: Path) -> bool:
    """Does the folder have the files of --data msvd?"""
    return (folder / "training_label.json").is_file() and (folder / "training_data" / "feat").is_dir()


def load(
    name: str,
    data_dir: str | None = None,
    limit: int | None = None,
    min_count: int = 1,
    max_words: int = 30,
    split: str = "train",
    train_clips: int | None = None,
) -> tuple[Clips, Clips, Clips | None, Vocabulary, dict]:
    """(train, validation, test or None, vocabulary of the training captions, the dataset's entry in run.json).

    limit: only the first `limit` clips of each part. max_words: longer training captions are cut. split: see
    `msvd_clips_parts`, for msvd-clips alone. train_clips: how many training clips, drawn by their names. Raises
    UserError.
    """
    if name == "auto":
        name = choose(data_dir)
    notes = Notes()
    digest = hashlib.sha256()
    folder = folder_of(name, data_dir)
    parts = read_parts(name, folder, notes, digest, limit, split, train_clips)
    train = parts[0]
    extractor = "small" if name == "builtin" else extractor_of(feature_folder(name, folder), train.features.shape[2])
    vocabulary = Vocabulary.build([c for captions in train.captions for c in captions], min_count)
    if len(vocabulary) == len(Vocabulary.SPECIAL):
        raise run.UserError(f"--min-count {min_count}: no word of the training captions occurs that often; lower it")
    for part in parts:
        if part is not None:
            encode(part, vocabulary, max_words, notes)
    note_copies(parts, notes)
    notes.print(folder or name)
    facts = {
        "name": name if name in NAMED else Path(name).name,
        "builtin": name == "builtin",
        "digest": digest.hexdigest()[:32],
        "clips": [len(part) if part is not None else 0 for part in parts],
        "captions": sum(len(captions) for captions in train.captions),
        "vocabulary": len(vocabulary),
        "frames": train.features.shape[1],
        "features": train.features.shape[2],
        "extractor": extractor,
        "left_out": notes.counts(),
    }
    return *parts, vocabulary, facts


def choose(data_dir: str | None) -> str:
    """What the dataset "auto" stands for."""
    folder = folder_of("msvd", data_dir)
    if is_there(folder):
        return "msvd"
    print(f"{folder}: holds no MSVD features; training on the BUILT-IN videos instead", file=sys.stderr)
    return "builtin"


def folder_of(name: str, data_dir: str | None) -> Path | None:
    """The folder of a dataset; None for the built-in one."""
    if name == "builtin":
        return None
    folders = {"msvd": "msvd", "msvd40": "msvd", "msvd-clips": "msvd_clips"}
    return run.data_dir(data_dir) / folders[name] if name in folders else Path(name)


def read_parts(name: str, folder: Path | None, notes: Notes, digest, limit, split, train_clips):
    """(training, validation, test or None) of a dataset, without their tokens. Raises UserError."""
    if name == "builtin":
        return builtin_parts(limit, digest)
    if name == "msvd40":
        print("msvd40: clips of MSVD's test part; a demonstration, never a result", file=sys.stderr)
        return course_parts(folder, notes, digest, limit, published=True, only_test=True)
    if name == "msvd-clips":
        return msvd_clips_parts(folder, notes, digest, limit, split, train_clips)
    labels = msrvtt_labels(folder)
    if labels:
        return msrvtt_parts(folder, labels, notes, digest, limit)
    return course_parts(folder, notes, digest, limit, published=name == "msvd")


def msrvtt_labels(folder: Path) -> list[Path]:
    """The files of labels of a folder in the form of MSR-VTT, if it is one: one of all parts, or several."""
    return sorted(folder.glob("*videodatainfo*.json"))


def feature_folder(name: str, folder: Path) -> Path:
    """Where the features of the training clips lie."""
    if name == "msvd-clips":
        return feature_folders(folder)[0]
    if name not in NAMED and msrvtt_labels(folder):
        return folder / "feat"
    return folder / "training_data" / "feat"


def encode(part: Clips, vocabulary: Vocabulary, max_words: int, notes: Notes):
    """Fill in the tokens of a part."""
    for name, captions in zip(part.ids, part.captions):
        ids = [vocabulary.encode(caption) for caption in captions]
        for row in ids:
            if len(row) > max_words:
                notes.add(f"captions of {max_words} words or more, cut there for the loss", name)
        part.tokens.append([row if len(row) <= max_words else row[: max_words - 1] + [EOS] for row in ids])


def make_part(folder, labels, notes, digest, limit):
    """The clips of `labels` {id: captions} that have features in `folder`."""
    ids, features = read_features(folder, list(labels)[:limit], notes, digest)
    digest.update(json.dumps([labels[name] for name in ids]).encode())
    raw = [labels[name] for name in ids]
    return Clips(ids, features, raw, [[normalize(c) for c in captions] for captions in raw], [])


def same_columns(parts, folder):
    """`parts`, if their features have one shape. Raises UserError."""
    shapes = {tuple(part.features.shape[1:]) for part in parts if part is not None}
    if len(shapes) > 1:
        raise run.UserError(f"{folder}: its parts have features of different shapes: {sorted(shapes)}")
    return parts


def course_parts(folder, notes, digest, limit, published, only_test=False):
    """Training, validation and test clips of a folder in the form of courses; with `only_test` its test clips alone,
    as 30 training and 10 validation clips. published: of a known dataset, whose split stays as it is; else copies of a
    clip stay together."""
    which = "testing" if only_test else "training"
    file, feat = folder / f"{which}_label.json", folder / f"{which}_data" / "feat"
    for path in (file, feat):
        if not path.exists():
            raise run.UserError(f"{path}: is missing; `python s2vt/data.py --help` names the folder of the data")
    labels = read_labels(file, notes)
    there = {name: captions for name, captions in labels.items() if (feat / f"{name}.npy").exists()}
    for name in sorted(labels.keys() - there.keys()):
        notes.add("clips without a file of features", name)
    for name in sorted({f.name.removesuffix(".npy") for f in feat.glob("*.npy")} - labels.keys()):
        notes.add("files of features without captions", name)
    if len(there) < 2:
        raise run.UserError(
            f"{feat}: has features of {len(there)} of the {len(labels):,} clips; two or more are needed"
        )
    if published:
        train, val = split_off(list(there), VAL_SHARE["msvd40"] if only_test else 0.07)
    else:
        groups = copies(feat, list(there))
        if len(groups) < 2:
            raise run.UserError(f"{feat}: all {len(there):,} clips have the same features; two or more are needed")
        train, val = split_off_groups(groups, 0.07, notes)
    parts = [make_part(feat, {n: there[n] for n in names}, notes, digest, limit) for names in (train, val)]
    test_feat = folder / "testing_data" / "feat"
    if only_test or not test_feat.is_dir() or not (folder / "testing_label.json").exists():
        return same_columns([*parts, None], folder)
    test = make_part(test_feat, read_labels(folder / "testing_label.json", notes), notes, digest, limit)
    return same_columns([*parts, test], folder)


def feature_folders(folder: Path) -> tuple[Path, Path]:
    """Where the features of the training and of the test clips of msvd-clips lie."""
    both = folder / "feat"
    return (both, both) if both.is_dir() else (folder / "training_data" / "feat", folder / "testing_data" / "feat")


def read_split(file: Path = MSVD_CLIPS) -> dict[str, list[str]]:
    """{"train", "val", "test": ids} of msvd-clips."""
    split = {"train": [], "val": [], "test": []}
    for line in file.read_text(encoding="utf-8").splitlines():
        part, name = line.split()
        split[part].append(name)
    return split


def fold_of(name: str) -> int:
    """The fold, from 1 on, of a clip ID_FIRST_LAST.avi: clips of one video, whose ID has eleven letters, share it."""
    return hashlib.sha256(name[:11].encode()).digest()[0] * FOLDS // 256 + 1


def msvd_clips_parts(folder, notes, digest, limit, split, train_clips):
    """Training, validation and test clips of the 468 of msvd-clips, by one of SPLITS.

    "train" is MSVD's own: 279, 22 and 167 clips. "train+val" trains on 301, so that validation can choose nothing; its
    test clips are the same. "fold1" to "fold5" take a fifth of the 301 for validation, and read no test clip.
    """
    official = read_split()
    known = official["train"] + official["val"]
    val = official["val"]
    test = official["test"]
    if split == "train":
        train = official["train"]
    elif split == "train+val":
        train = known
    else:
        fold = SPLITS.index(split) - 1
        train = [name for name in known if fold_of(name) != fold]
        val = [name for name in known if fold_of(name) == fold]
        test = []
    if train_clips is not None and train_clips < len(train):
        train, _ = split_off(train, 1 - train_clips / len(train))
    labels = {}
    for file in (folder / "training_label.json", folder / "testing_label.json"):
        if not file.exists():
            raise run.UserError(f"{file}: is missing; `python s2vt/data.py --help` says where the data belong")
        labels |= read_labels(file, notes)
    train_feat, test_feat = feature_folders(folder)
    parts = []
    for names, feat in ((train, train_feat), (val, train_feat), (test, test_feat)):
        for name in [name for name in names if name not in labels]:
            notes.add("clips of msvd_clips.txt without captions", name)
        there = {name: labels[name] for name in names if name in labels}
        parts.append(make_part(feat, there, notes, digest, limit) if names else None)
    return same_columns(parts, folder)


def msrvtt_parts(folder, files, notes, digest, limit):
    """Training, validation and test clips of a folder in the form of MSR-VTT; a part without clips is None."""
    feat = folder / "feat"
    labels = {"train": {}, "validate": {}, "test": {}}
    for file in files:
        for part, captions_of in read_msrvtt(file, notes).items():
            for name, captions in captions_of.items():
                is_video = (feat / f"{name}.mp4.npy").exists()  # as extract_features.py names the features of a file
                labels[part][f"{name}.mp4" if is_video else name] = captions
    if not labels["train"] or not labels["validate"]:
        names = ", ".join(file.name for file in files)
        raise run.UserError(f"{folder}: has no clips of the splits train and validate in {names}")
    train, val = (make_part(feat, labels[name], notes, digest, limit) for name in ("train", "validate"))
    test = make_part(feat, labels["test"], notes, digest, limit) if labels["test"] else None
    return same_columns([train, val, test], folder)


def builtin_features(clips: list[videos.Clip]) -> Tensor:
    """float16 (N, T, 288): the features of built-in clips, by the extractor `small`."""
    frames = np.concatenate([clip.frames for clip in clips])
    return extractors.extract("small", frames).view(len(clips), videos.FRAMES, -1).half()


@functools.lru_cache(maxsize=6)
def builtin_part(part: str, count: int) -> tuple[Tensor, list[list[str]], list, bytes]:
    """(features, captions, events, digest) of the first `count` clips of a part of the built-in videos."""
    features = []
    captions = []
    events = []
    digest = hashlib.sha256()
    for first in range(0, count, 200):  # the frames themselves would take ten times the memory
        clips = videos.draw(part, min(200, count - first), first)
        features.append(builtin_features(clips))
        captions += [clip.captions for clip in clips]
        events += [clip.events for clip in clips]
        for clip in clips:
            digest.update(clip.frames.tobytes() + json.dumps(clip.captions).encode())
    return torch.cat(features), captions, events, digest.digest()


def builtin_parts(limit, digest):
    """The rendered clips with the features of the extractor `small`."""
    parts = []
    for part in ("train", "val", "test"):
        clips, own_digest = builtin_clips(part, limit)
        digest.update(own_digest)
        parts.append(clips)
    return parts


def builtin_clips(part: str, limit: int | None = None) -> tuple[Clips, bytes]:
    """(clips, digest) of a part of the built-in videos, of videos.PARTS; `limit` clips at most."""
    count = videos.PARTS[part]
    features, captions, events, digest = builtin_part(part, min(count, limit or count))
    ids = [f"{part}{i}" for i in range(len(captions))]
    return Clips(ids, features, captions, captions, [], events), digest


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("msvd", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N clips of each part, for a quick look", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    train, val, test, _, facts = load(args.data, args.data_dir, args.limit)
    shape = f"{facts['frames']} frames of {facts['features']:,} features"
    print(f"{facts['name']}: {shape}, content digest {facts['digest']}")
    for name, part in (("training", train), ("validation", val), ("test", test)):
        if part is not None:
            print(f"{name:>10}: {len(part):,} clips, {sum(map(len, part.captions)):,} captions")


if __name__ == "__main__":
    run.cli(main)
