"""The files that hold captions and features, validated.

What cannot be used is noted by reason and name; a file that cannot be read at all is one line.
"""

import json
import sys
import unicodedata
from collections import Counter
from pathlib import Path

from common import run
from common.words import EMOJI, WORD

import numpy as np
import regex
import torch

import extractors

TOKEN = regex.compile(rf"{WORD}(?:'{WORD})*+|{EMOJI}")
LONGEST_NAME = 251  # bytes of an id: with .npy, the longest file name of most file systems
LARGEST_FEATURE = 60_000  # float16 ends at 65,504


def normalize(caption: str) -> str:
    """Words, numbers and emoji alone, in lower case, one space between them: "A man's dog, running." -> "a man's dog
    running". Letters keep their combining marks, composed where Unicode has such a letter (NFC)."""
    caption = unicodedata.normalize("NFC", caption.replace("İ", "i"))  # lower() would give that letter a second dot
    return " ".join(TOKEN.findall(caption.lower().replace("\u2019", "'")))


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
            examples = ", ".join(names[:10])
            if len(names) > 10:
                examples += ", ..."
            print(run.printable(f"{run.display_path(where)}: {len(names):,} {reason} ({examples})"), file=sys.stderr)


def read_json(file: Path):
    """The content of a file of labels. Raises UserError."""
    try:
        if not file.is_file():
            raise OSError(0, "not a regular file" if file.exists() else "no such file")
        return json.loads(file.read_text(encoding="utf-8-sig"))  # without a byte order mark
    except (OSError, ValueError, RecursionError) as error:
        raise run.UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'not JSON'})") from error


def read_labels(file: Path, notes: Notes) -> dict[str, list[str]]:
    """{id: captions} of a file like training_label.json. Clips without captions are noted. Raises UserError."""
    content = read_json(file)
    if not isinstance(content, list):
        raise run.UserError(f'{file}: must be a list of {{"id": ..., "caption": [...]}}')
    labels = {}
    for i, entry in enumerate(content):
        if not isinstance(entry, dict):
            raise run.UserError(f'{file}: entry {i} is not {{"id": ..., "caption": [...]}}')
        problem = problem_of_id(entry.get("id"))
        if problem:
            raise run.UserError(f'{file}: entry {i} has an "id" that {problem}')
        captions = entry.get("caption")
        if isinstance(captions, str):
            captions = [captions]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise run.UserError(f'{file}: entry {i} has no list of texts as "caption"')
        labels.setdefault(entry["id"], []).extend(captions)
    return with_captions(labels, notes)


def read_msrvtt(file: Path, notes: Notes) -> dict[str, dict[str, list[str]]]:
    """{part: {id: captions}} for train, validate and test of MSR-VTT's file of labels. Raises UserError."""
    content = read_json(file)
    parts = {"train": {}, "validate": {}, "test": {}}
    part_of = {}  # {id: part}
    try:
        for video in content["videos"]:
            name, part = video["video_id"], video["split"]
            problem = problem_of_id(name)
            if problem:
                raise ValueError(f'a "video_id" {problem}')
            if part not in parts:
                raise ValueError(f"video {name[:40]!r} has an invalid split")
            part_of[name] = part
            parts[part][name] = []
        for sentence in content["sentences"]:
            name, caption = sentence["video_id"], sentence["caption"]
            if not isinstance(caption, str) or name not in part_of:
                raise ValueError(f"sentence of {str(name)[:40]!r} has no text or no video")
            parts[part_of[name]][name].append(caption)
    except (LookupError, TypeError, ValueError) as error:
        raise run.UserError(f'{file}: is not a file of "videos" and "sentences" ({error})') from error
    return {part: with_captions(labels, notes) for part, labels in parts.items()}


def problem_of_id(name) -> str | None:
    """Why an id cannot be the name of a file in a folder; None if it can."""
    if not isinstance(name, str) or not name:
        return "is missing or no text"
    length = len(name.encode(errors="surrogatepass"))
    if length > LONGEST_NAME:
        return f"has {length:,} bytes, more than a file name can have"
    if regex.search(r"[/\\\0]", name) or name in (".", ".."):  # a way out of the folder
        return "cannot be the name of a file"
    return None


def with_captions(labels, notes):
    """The labels without empty captions and without the clips that have no caption."""
    kept = {}
    for name, captions in labels.items():
        with_words = [caption for caption in captions if normalize(caption)]
        for _ in range(len(captions) - len(with_words)):
            notes.add("captions without words", name)
        if with_words:
            kept[name] = with_words
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
        array, problem = read_array(folder / f"{name}.npy")
        if problem:
            notes.add(problem, name)
        else:
            arrays[name] = array
    shapes = Counter(array.shape for array in arrays.values())
    if columns and shapes and not any(shape[1] == columns for shape in shapes):
        numbers = ", ".join(sorted({str(shape[1]) for shape in shapes}))
        raise run.UserError(f"{folder}: holds features of {numbers} columns, and the model takes {columns}")
    shape = max(shapes, key=lambda s: (not columns or s[1] == columns, shapes[s], s), default=None)
    for name in [name for name, array in arrays.items() if array.shape != shape]:
        notes.add(f"files of features of another shape than {shape[0]} x {shape[1]}", name)
        del arrays[name]
    if not arrays:
        example = ids[0] if ids else "x"
        raise run.UserError(
            f"{folder}: has no usable file of features for {len(ids):,} clips (ID.npy, for example {example}.npy)"
        )
    for name, array in arrays.items():
        digest.update(name.encode(errors="surrogatepass"))
        digest.update(array.tobytes())
    return list(arrays), torch.from_numpy(np.stack(list(arrays.values())))


def read_array(file: Path) -> tuple[np.ndarray | None, str | None]:
    """(float16 (T, F), None) of a file of features, or (None, why it cannot be used)."""
    if not file.is_file():
        return None, "clips without a file of features"
    try:
        array = np.load(file, allow_pickle=False)
    except Exception:  # numpy, ast, tokenize and zipfile each have their own
        return None, "files of features that are damaged or cut short"
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 2 or not array.size:
        return None, "files of features that are not a table of decimal numbers"
    if not np.isfinite(array).all() or abs(array).max() > LARGEST_FEATURE:
        return None, "files of features with NaN, infinite or huge numbers"
    return array.astype(np.float16), None


def extractor_of(folder: Path, columns: int) -> str | None:
    """The extractor that the features in `folder` are from, if extract_features.py made them. columns: those that the
    features have. Raises UserError."""
    file = folder / "extractor.json"
    if not file.exists():
        return None
    name = run.read_json(file).get("extractor")
    if not isinstance(name, str) or name not in extractors.NAMES:
        raise run.UserError(f"{file}: names no extractor of {', '.join(extractors.NAMES)}")
    expected = extractors.EXTRACTORS[name].columns
    if columns != expected:
        raise run.UserError(f"{file}: names {name}, whose features have {expected:,} columns; these have {columns:,}")
    return name
