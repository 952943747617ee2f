"""CIFAR-10, MNIST or a folder of images at 32 x 32 pixels, in batches scaled to [-1, 1].

    python gan/data.py --data cifar10        # prepare it, print the counts

A dataset is one uint8 tensor. Fetching, verifying and splitting it is in common/images.py. A fifth of the training
images is held out. Of CIFAR-10, 40,000 images are for training, 10,000 are the reference during training, and 10,000
are for the test.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import image_files, run
from common import images as image_data
from common.options import option
from common.splits import divide, sort_rows

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE, HELD_OUT = 32, 0.2
DATA_HELP = "cifar10, mnist, builtin, auto, or a folder of images (its sub-folders are ACGAN's classes)"
dataset_arg = run.dataset_arg("auto", "builtin", "cifar10", "mnist")


class Images:
    """Images of 32 x 32 pixels, all in memory.

    images: uint8 (N, C, 32, 32); labels: int64 (N,); classes: names.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str]):
        self.images = images
        self.labels = labels
        self.classes = classes
        self.rows = images.permute(0, 2, 3, 1).contiguous()  # (N, 32, 32, C): a batch of it is channels last

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device), self.classes)

    def batches(self, bs: int, place: tuple[int, int], start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (float32 (bs, C, 32, 32) in [-1, 1], int64 (bs,)) in an order that is a function of `place`, (seed,
        epoch), from batch number `start` on. The N mod bs images that fill no batch differ from epoch to epoch."""
        bs = min(bs, len(self))
        generator = torch.Generator().manual_seed(run.seed_at(*place))
        order = torch.randperm(len(self), generator=generator).to(self.rows.device)
        for i in range(start, len(self) // bs):
            index = order[i * bs : (i + 1) * bs]
            yield from_uint8(self.rows.index_select(0, index).permute(0, 3, 1, 2)), self.labels.index_select(0, index)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]; the order in memory stays."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, rounded."""
    return images.float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def load(name: str, data_dir: str | None = None, limit: int | None = None) -> tuple[Images, Images, Images, dict]:
    """(train, held out, test, the dataset's entry in run.json) of the dataset `name`.

    name: cifar10, mnist, builtin, "auto" (CIFAR-10 if it can be had, see common/images.py), or the path of a folder.
    limit: only the first `limit` images of each part. Raises UserError.
    """
    folder = Path(name)
    if name in image_data.NAMES or image_files.holds_idx(folder):
        shape = (3, SIZE) if name in image_data.NAMES else (1, 28)
        arrays = image_data.load(name, data_dir, limit, "cifar10", shape, fraction=HELD_OUT)
        parts = (arrays.train, arrays.val, arrays.test)
        classes = arrays.classes
        facts = arrays.facts()
    else:
        parts, classes, facts = read_folder(folder, limit)
    parts = [to_images(images, labels, classes) for images, labels in parts]
    return *parts, facts | {"classes": len(classes), "channels": parts[0].images.shape[1]}


def to_images(images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Images:
    """The arrays as tensors; images of 28 x 28 pixels get a border of zeros."""
    border = (SIZE - images.shape[-1]) // 2
    return Images(F.pad(torch.from_numpy(images), (border,) * 4), torch.from_numpy(labels), classes)


def read_folder(folder: Path, limit: int | None = None) -> tuple[list, list[str], dict]:
    """The images below `folder`, cropped square and scaled to 32 x 32 pixels: ([train, held out, test] as (images,
    labels), class names, facts). Without folders of classes, all images are one class. Raises UserError."""
    found = image_files.find(folder, at_least=1, classless=True)
    parts = image_files.read_parts(folder, found, 3, SIZE)
    parts, digests, digest = sort_rows(parts)
    count = len(parts[0][1])
    if count < 20:
        raise run.UserError(f"{folder}: has {count} training images; 20 are the least, and hundreds are better")
    parts, copies = divide(str(folder), parts, digests, HELD_OUT)
    parts = [(images[:limit], labels[:limit]) for images, labels in parts]
    facts = {name: len(labels) for name, (_, labels) in zip(("train", "val", "test"), parts)}
    if copies:
        facts["copies"] = copies
    return parts, found.classes, {"name": folder.name, "digest": digest, "builtin": False} | facts


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("cifar10", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N examples of each part", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    *parts, facts = load(args.data, args.data_dir, args.limit)
    labels = {name: part.labels for name, part in zip(("train", "held out", "test"), parts)}
    image_data.print_counts(facts, labels, facts["classes"])


if __name__ == "__main__":
    run.cli(main)
