"""The order of images and their split into training, validation and test. Copies of an image stay together.

Rows are sorted by the digest of their pixels, then label, before anything else. So every copy of a dataset, in whatever
row order, gives the same split and the same runs.
"""

import hashlib
from pathlib import Path

from common import image_files
from common.terminal import UserError

import numpy as np


def in_order(parts: list) -> tuple[list, str]:
    """Rows of every (images, labels) sorted by the digest of their pixels, then label; and the digest of it all."""
    ordered, _, digest = sort_rows(parts)
    return ordered, digest


def sort_rows(parts: list) -> tuple[list, list, str]:
    """(the parts as `in_order` returns them, the digests of the rows of each, the digest of it all)."""
    ordered = []
    sorted_digests = []
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        if part is None:  # a folder without that part
            ordered.append(None)
            sorted_digests.append(None)
            continue
        images, labels = part
        digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in images]
        order = sorted(range(len(digests)), key=lambda i: (digests[i], labels[i]))
        for i in order:
            whole.update(digests[i] + (int(labels[i]) % 2**32).to_bytes(4, "little"))
        ordered.append((images[order], labels[order]))
        sorted_digests.append([digests[i] for i in order])
    return ordered, sorted_digests, whole.hexdigest()


def cut(part, fraction):
    """(images, labels) in two: without the last `fraction` of every class, and those."""
    return [(part[0][rows], part[1][rows]) for rows in split(part[1], fraction)]


def divide(name: str, parts: list, keys: list, fraction: float = 0.1, as_published: bool = False) -> tuple[list, dict]:
    """([train, val, test], copies): a missing test part is a tenth of the training images of each class, then a missing
    validation part is `fraction` of them. Equal images stay together in a split that is made here.

    name: the dataset, or the path of the user's folder. parts: (images, labels) of train, val and test, or None;
    images: any array of N rows. keys: for each part, what is equal for equal images alone, such as their digests.
    copies: {part: number of its images that are also in an earlier part, or for train more than once in it}, without
    zeros; of a folder it is said on standard error. as_published: copies do not change the split of rows. Raises
    UserError.
    """
    parts = list(parts)
    numbers = {}  # key: number of its group
    groups = []
    for part_keys in keys:
        numbered = [numbers.setdefault(key, len(numbers)) for key in part_keys or []]
        groups.append(np.array(numbered, dtype=np.int64))
    repeated = len(groups[0]) - len(np.unique(groups[0]))  # before a part of it is split off
    for k, share in ((2, 0.1), (1, fraction)):
        if parts[k] is None:
            labels, kept_together = parts[0][1], None if as_published else groups[0]
            first, last = split(labels, share, kept_together)
            if not len(first) or not len(last):
                raise UserError(f"{name}: has too few different images for training, validation and test")
            parts[k], groups[k] = tuple(array[last] for array in parts[0]), groups[0][last]
            parts[0], groups[0] = tuple(array[first] for array in parts[0]), groups[0][first]
    copies = {
        "train": repeated,
        "val": int(np.isin(groups[1], groups[0]).sum()),
        "test": int(np.isin(groups[2], np.concatenate(groups[:2])).sum()),
    }
    copies = {part: count for part, count in copies.items() if count}
    if not as_published:
        say_copies(name, copies, [len(part[1]) for part in parts])
    return parts, copies


def say_copies(name, copies, counts):
    """Say which images are copies."""
    if "train" in copies:
        text = f"{copies['train']:,} images repeat another training image; a split keeps equal images together"
        image_files.say(Path(name), text)
    for part, count in zip(("val", "test"), counts[1:]):
        if part in copies:
            text = f"{copies[part]:,} of the {count:,} images of {part} are in another part, too: its score is too good"
            image_files.say(Path(name), f"warning: {text}; remove them")


def split(labels: np.ndarray, fraction: float = 0.1, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows without the last `fraction` of every class, and those: two index arrays.

    Rows come in the order of their digests, so this is a random stratified split that is the same for everyone. groups:
    equal numbers for rows that stay together; a group that would be divided stays with the first rows.
    """
    last = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        last[rows[len(rows) - max(1, round(fraction * len(rows))) :]] = True
    if groups is not None:
        last &= ~np.isin(groups, groups[~last])
    return np.flatnonzero(~last), np.flatnonzero(last)
