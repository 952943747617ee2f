"""CIFAR-10, CIFAR-100 or a folder of images, in batches that are augmented as whole tensors.

    python cifar/data.py --data cifar100        # prepare it, print the counts

A dataset is one uint8 tensor. Fetching, verifying and splitting it is in common/images.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from common import images as image_data
from common import run
from common.crops import crop_and_flip
from common.options import option

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
PADDING = 4  # black pixels around an image before it is cropped back to 32 x 32
AUGMENT = ("none", "flip", "crop+flip")
DATA_HELP = "cifar10, cifar100, builtin, auto, or a folder with one subfolder of images per class"
dataset_arg = run.dataset_arg("auto", "builtin", "cifar10", "cifar100")


class Cifar(torch.utils.data.Dataset):
    """Labelled 32 x 32 colour images, all in memory.

    images: uint8 (N, 3, 32, 32); labels: int64 (N,); classes: names; mean, std: float32 (1, 3, 1, 1), in units of
    pixel values, of the training images. Indexing gives one example, (float32 (3, 32, 32) normalized, int), for use
    with a DataLoader; `batches` is the fast way.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str], mean: Tensor, std: Tensor):
        self.images = images
        self.labels = labels
        self.classes = classes
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.normalize(self.images[i][None])[0], int(self.labels[i])

    def to(self, device) -> "Cifar":
        images, labels, mean, std = (t.to(device) for t in (self.images, self.labels, self.mean, self.std))
        return Cifar(images, labels, self.classes, mean, std)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, 32, 32) -> float32 in channels_last, with mean 0 and standard deviation 1 in each channel."""
        return images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)

    @cached_property
    def padded(self) -> Tensor:
        """uint8 (N, 3, 40, 40)"""
        return F.pad(self.images, (PADDING,) * 4).contiguous()

    def batches(
        self, batch_size: int, shuffle: tuple[int, int] | None = None, augment: str = "none"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float32 (B, 3, 32, 32) normalized, labels int64 (B,)); the last batch may be smaller.

        shuffle: None: the stored order, without augmentation. (seed, epoch): seeds of the order and the augmentation.
        """
        if augment not in AUGMENT or (shuffle is None and augment != "none"):
            raise ValueError(f"augment {augment!r}: one of {', '.join(AUGMENT)}; and it needs shuffle")
        n, device = len(self), self.images.device
        if shuffle is None:
            order = torch.arange(n)
        else:
            generator = torch.Generator().manual_seed(run.seed_at(*shuffle))
            order = torch.randperm(n, generator=generator)
            shift = torch.randint(2 * PADDING + 1, (n, 2), generator=generator).to(device)
            shift = shift if augment == "crop+flip" else torch.full_like(shift, PADDING)  # the image as it is
            flip = (torch.rand(n, generator=generator) < 0.5).to(device)
        order = order.to(device)
        chunk = batch_size * max(1, 1024 // batch_size)  # many small batches are prepared at once
        for first in range(0, n, chunk):
            index = order[first : first + chunk]
            if augment != "none":
                rows = slice(first, first + chunk)
                images = crop_and_flip(self.padded, SIZE, index, shift[rows], flip[rows])
            else:
                images = self.images.index_select(0, index)
            labels = self.labels.index_select(0, index)
            for i in range(0, len(index), batch_size):
                yield self.normalize(images[i : i + batch_size]), labels[i : i + batch_size]


def load(
    name: str, data_dir: str | None = None, limit: int | None = None, auto: str = "cifar100"
) -> tuple[Cifar, Cifar, Cifar, dict]:
    """(train, validation, test, the dataset's entry in run.json) of the dataset `name`: see common/images.py.

    "auto" is the dataset `auto` if it can be had. limit: only the first `limit` images of each part. Raises UserError.
    """
    arrays = image_data.load(name, data_dir, limit, auto, by_colour=True)
    mean, std = (torch.from_numpy(value).view(1, 3, 1, 1) for value in (arrays.mean, arrays.std))
    train, val, test = (
        Cifar(torch.from_numpy(images), torch.from_numpy(labels), arrays.classes, mean, std)
        for images, labels in (arrays.train, arrays.val, arrays.test)
    )
    return train, val, test, arrays.facts()


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("cifar100", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N examples of each part", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    train, val, test, facts = load(args.data, args.data_dir, args.limit)
    image_data.print_counts(
        facts, {"train": train.labels, "validation": val.labels, "test": test.labels}, len(train.classes)
    )


if __name__ == "__main__":
    run.cli(main)
