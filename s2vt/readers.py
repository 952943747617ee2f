"""The files that hold captions and features, validated.

What cannot be used is noted by reason and name; a file that cannot be read at all is one line.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

from common import run

import numpy as np
import torch

import extractors


def normalize(caption: str) -> str:
    """Lower case, words and numbers alone, one space between them: "A man's dog, running." -> "a man's dog running"."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower().replace("\u2019", "'")))


# ------------------------------------------------------------------------------------------------------ files of labels


class Notes:
    """The clips left out, by reason."""

    def __init__(self):
        self.names = {}

    def add(self, reason: str, name: str):
        self.names.setdefault(reason, []).append(name)

    def counts(self) -> dict[str, int]:
        return {reason: len(names) for reason, names in self.names.items()}

    def print(self, where):
        for reason, names in self.names.items():
            some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            print(f"{run.display_path(where)}: {len(names):,} {reason} ({some})", file=sys.stderr)


def read_json(file: Path):
    """The content of a file of labels. Raises UserError."""
    try:
        if not file.is_file():
            raise OSError(0, "not a regular file" if file.exists() else "no such file")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise run.UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'not JSON'})") from error


def read_labels(file: Path, notes: Notes) -> dict[str, list[str]]:
    """{id: captions} of a file like training_label.json. Clips without captions are noted. Raises UserError."""
    content, labels = read_json(file), {}
    if not isinstance(content, list):
        raise run.UserError(f'{file}: must be a list of {{"id": ..., "caption": [...]}}')
    for i, entry in enumerate(content):
        name, captions = (entry.get(key) if isinstance(entry, dict) else None for key in ("id", "caption"))
        captions = [captions] if isinstance(captions, str) else captions
        if not is_name(name) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise run.UserError(f'{file}: entry {i} has no "id" or no list of texts as "caption"')
        labels.setdefault(name, []).extend(captions)
    return with_captions(labels, notes)


def read_msrvtt(file: Path, notes: Notes) -> dict[str, dict[str, list[str]]]:
    """{part: {id: captions}} for train, validate and test of MSR-VTT's file of labels. Raises UserError."""
    content, parts, split = read_json(file), {"train": {}, "validate": {}, "test": {}}, {}
    try:
        for video in content["videos"]:
            if not is_name(video["video_id"]) or video["split"] not in parts:
                raise ValueError(f"video {str(video['video_id'])[:40]!r} has an invalid split")
            split[video["video_id"]] = video["split"]
            parts[video["split"]][video["video_id"]] = []
        for sentence in content["sentences"]:
            name, caption = sentence["video_id"], sentence["caption"]
            if not isinstance(caption, str) or name not in split:
                raise ValueError(f"sentence of {str(name)[:40]!r} has no text or no video")
            parts[split[name]][name].append(caption)
    except (LookupError, TypeError, ValueError) as error:
        raise run.UserError(f'{file}: is not a file of "videos" and "sentences" ({error})') from error
    return {part: with_captions(labels, notes) for part, labels in parts.items()}


def is_name(name) -> bool:
    """Is it a file name, and no way out of the folder?"""
    return isinstance(name, str) and bool(name) and not re.search(r"[/\\\0]", name) and name not in (".", "..")


def with_captions(labels, notes):
    """The labels without empty captions and without the clips that have no caption."""
    kept = {}
    for name, captions in labels.items():
        words = [caption for caption in captions if normalize(caption)]
        for _ in range(len(captions) - len(words)):
            notes.add("captions without words", name)
        if words:
            kept[name] = words
        else:
            notes.add("clips without captions", name)
    return kept


# --------------------------------------------------------------------------------------------------- files of features


def read_features(folder: Path, ids: list[str], notes: Notes, digest, columns: int | None = None):
    """(ids, float16 (N, T, F)) of the clips whose `folder`/ID.npy can be used; the others are noted.

    All clips must have the same number of frames and columns: as in most files here, or `columns`. digest: a hash
    that takes in names and contents. Raises UserError if no clip is left.
    """
    arrays = {}
    for name in ids:
        file = folder / f"{name}.npy"
        try:
            if not file.is_file():
                notes.add("clips without a file of features", name)
                continue
            array = np.load(file, allow_pickle=False)
        except Exception:  # numpy, ast, tokenize and zipfile each have their own
            notes.add("files of features that are damaged or cut short", name)
            continue
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 2 or not array.size:
            notes.add("files of features that are not a table of decimal numbers", name)
        elif not np.isfinite(array).all() or abs(array).max() > 60_000:
            notes.add("files of features with NaN, infinite or huge numbers", name)
        else:
            arrays[name] = array.astype(np.float16)
    shapes = Counter(array.shape for array in arrays.values())
    if columns and shapes and not any(shape[1] == columns for shape in shapes):
        found = ", ".join(sorted({str(shape[1]) for shape in shapes}))
        raise run.UserError(f"{folder}: holds features of {found} columns, and the model takes {columns}")
    shape = max(shapes, key=lambda s: (not columns or s[1] == columns, shapes[s], s), default=None)
    for name in [name for name, array in arrays.items() if array.shape != shape]:
        notes.add(f"files of features of another shape than {shape[0]} x {shape[1]}", name)
        del arrays[name]
    if not arrays:
        raise run.UserError(f"{folder}: has no usable file of features for {len(ids):,} clips (ID.npy, for example "
                            f"{ids[0] if ids else 'x'}.npy)")  # fmt: skip
    for name, array in arrays.items():
        digest.update(name.encode(errors="surrogatepass"))
        digest.update(array.tobytes())
    return list(arrays), torch.from_numpy(np.stack(list(arrays.values())))


def extractor_of(folder: Path) -> str | None:
    """The extractor that the features in `folder` are from, if extract_features.py made them."""
    file = folder / "extractor.json"
    if not file.exists():
        return None
    name = run.read_json(file).get("extractor")
    if name not in extractors.NAMES:
        raise run.UserError(f"{file}: names no extractor of {', '.join(extractors.NAMES)}")
    return name
