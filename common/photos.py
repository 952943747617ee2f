"""Demos that take photographs: which files are meant, what a network says of each, and a figure of what it saw."""

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from common import image_files
from common.files import plain_text
from common.terminal import UserError, printable

import numpy as np
import torch
from torch import Tensor

LIKELIEST = 5  # classes that are shown
MOST_DRAWN = 24  # images in a figure


def list_images(places: Iterable[str]) -> list[Path]:
    """The image files that `places` name: files, and those in folders. Raises UserError."""
    files = []
    for place in map(Path, places):
        files += image_files.list_images(place) if place.is_dir() else [place]
    return files


def read_images(files: list[Path], read: Callable[[Path], np.ndarray]) -> tuple[list[int], Tensor | None, list[str]]:
    """(rows, images, errors): which of `files` could be read; their pixels, uint8 (N, C, S, S), None if there are none;
    and an error for each of the others. read: gives uint8 (C, S, S), or raises UserError."""
    rows = []
    images = []
    errors = []
    for row, file in enumerate(files):
        try:
            images.append(read(file))
            rows.append(row)
        except UserError as error:
            errors.append(str(error))
    return rows, torch.from_numpy(np.stack(images)) if images else None, errors


def raise_errors(errors: list[str]):
    """Say all of `errors`: the last as a UserError, the others before it on standard error."""
    for line in errors[:-1]:
        print(f"error: {printable(line)}", file=sys.stderr)
    if errors:
        raise UserError(errors[-1])


def describe(classes: list[str], odds: Tensor, unsure_below: float) -> str:
    """The likeliest classes of an image in words. odds: (classes,), calibrated probabilities."""
    best = odds.argsort(descending=True)[:LIKELIEST].tolist()
    words = ", ".join(f"{printable(classes[i].replace('_', ' '))} {odds[i]:.0%}" for i in best)
    return words if odds.max() >= unsure_below else f"unsure: {words}"


def draw_seen(files: list[Path], images: Tensor, classes: list[str], odds: Tensor, unsure_below: float):
    """A matplotlib figure of images as a network saw them, each beside bars of its likeliest classes.

    images: of `files`, uint8 (N, C, S, S); odds: (N, classes). At most 24 images are drawn.
    """
    from matplotlib.figure import Figure

    count = min(len(files), MOST_DRAWN)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * columns, 1.9 * rows), layout="constrained")
    for i, part in enumerate(figure.subfigures(rows, columns, squeeze=False).flat):
        if i == count:
            break
        left, right = part.subplots(1, 2)
        pixels = images[i].permute(1, 2, 0).numpy().squeeze()
        left.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        left.axis("off")
        left.set_title(plain_text(files[i].name[-28:]), fontsize=8)
        best = odds[i].argsort(descending=True)[:LIKELIEST]
        labels = [plain_text(classes[k].replace("_", " ")[:16]) for k in best]
        sure = odds[i].max() >= unsure_below
        right.barh(range(len(labels)), odds[i][best].numpy(), color="tab:blue" if sure else "tab:gray")
        right.set_yticks(range(len(labels)), labels)  # long names may be equal where they are cut
        right.invert_yaxis()
        right.set(xlim=(0, 1), xticks=(0, 0.5, 1), xticklabels=("0", "50%", "100%"))
        right.set_title("" if sure else "unsure", fontsize=8)
        right.tick_params(labelsize=7)
    return figure
