"""CIFAR-10, MNIST and small images of one's own, whole in memory, augmented a batch at a time. ImageNet and other large
images are in folders.py.

    python resnet/data.py --data cifar10        # prepare it, print the counts

A dataset is one uint8 tensor. Fetching, verifying and splitting it is in common/images.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import image_files, run
from common import images as image_data
from common.crops import crop_and_flip
from common.options import option

import torch
import torch.nn.functional as F
from torch import Tensor

import folders
import model
from folders import examples_per_step

AUGMENT = ("none", "flip", "crop", "crop+flip", "affine")
DATA_HELP = (
    "cifar10, mnist, imagenet, builtin, auto (cifar10), or a folder: with one subfolder of images per class, or with "
    "these in train/ and, if present, val/ and test/, or with idx files like MNIST's"
)
dataset_arg = run.dataset_arg("auto", "builtin", "cifar10", "mnist", "imagenet")


class Images:
    """Labelled images of one size, all in memory.

    images: uint8 (N, C, S, S); labels: int64 (N,); classes: names; mean, std: float32 (1, C, 1, 1), over the
    training images in units of pixel values. Crops for training are moved by up to `margin` pixels (None: an eighth of
    the side) and see the `border` around an image: "zeros", or "mirror", the image itself reflected.
    """

    eval_batch_size = 1000
    margin: int | None = None
    border: str = "zeros"

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str], mean: Tensor, std: Tensor):
        self.images = images
        self.labels = labels
        self.classes = classes
        self.mean = mean
        self.std = std
        self._padded = {}

    def __len__(self):
        return len(self.labels)

    @property
    def size(self) -> int:
        """The side of the images in pixels."""
        return self.images.shape[-1]

    def to(self, device) -> "Images":
        images, labels, mean, std = (t.to(device) for t in (self.images, self.labels, self.mean, self.std))
        return Images(images, labels, self.classes, mean, std)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, C, S, S) -> float32 of mean 0 and standard deviation 1 in each channel, channels last in memory."""
        return images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)

    def margin_at(self, size: int) -> int:
        """By how many pixels a crop of side `size` is moved at most."""
        return size // 8 if self.margin is None else self.margin

    def padded(self, size: int) -> Tensor:
        """All images scaled to `size` pixels and padded by the margin m: uint8 (N, C, size + 2 m, size + 2 m). The
        result for the latest size is cached."""
        if size not in self._padded:
            images = self.images
            if size != self.size:
                scaled = [
                    F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round_()
                    for part in images.split(5000)
                ]
                images = torch.cat([part.clamp_(0, 255).to(torch.uint8) for part in scaled])
            margin = self.margin_at(size)
            if self.border == "mirror":  # F.pad reflects no uint8 images
                places = torch.arange(-margin, size + margin, device=images.device).abs()  # ..., 2, 1, 0, 1, 2, ...
                places = size - 1 - (size - 1 - places).abs()
                padded = images[:, :, places][:, :, :, places]
            else:
                padded = F.pad(images, (margin,) * 4)
            self._padded = {size: padded}
        return self._padded[size]

    def batches(
        self,
        batch_size: int,
        shuffle: tuple[int, int] | None = None,
        augment: str = "none",
        skip: int = 0,
        size: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float32 (B, C, S, S) normalized, labels int64 (B,)).

        shuffle: None: the stored order, with a smaller last batch. (seed, epoch): seeds of the order and the
        augmentation; an incomplete last batch is then dropped, since it would disturb the batch statistics.
        augment: one of AUGMENT. skip: the number of batches to skip. size: of the images in pixels, if not their own.
        shard: (rank, world): the share of one process, of every batch with `shuffle`, else of all images.
        """
        n = len(self)
        device = self.images.device
        rank, world = shard
        if shuffle is None:
            for index in torch.arange(n, device=device)[rank::world].split(batch_size):
                yield self.normalize(self.images.index_select(0, index)), self.labels.index_select(0, index)
            return
        seed, epoch = shuffle
        generator = torch.Generator().manual_seed(run.seed_at(seed, epoch))
        order = torch.randperm(n, generator=generator)
        draws = torch.rand(n, 7, generator=generator)  # for each position in the order
        # Each image is flipped in every second epoch, half of the images in the even ones (Jordan 2024, section 3.6).
        even = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
        flip = (even[order] ^ bool(epoch % 2)) & ("flip" in augment)
        size = size or self.size
        margin = self.margin_at(size)
        shift = torch.full((n, 2), margin)
        if "crop" in augment:
            shift = (draws[:, :2] * (2 * margin + 1)).long()
        order, draws, shift, flip = (t.to(device) for t in (order, draws, shift, flip))
        padded = self.padded(size)
        share = examples_per_step(n, batch_size, world)
        for step in range(skip, steps_per_epoch(n, batch_size)):
            first = step * batch_size
            rows = slice(first + share * rank // world, first + share * (rank + 1) // world)
            images = self.normalize(crop_and_flip(padded, size, order[rows], shift[rows], flip[rows]))
            if augment == "affine":
                images = distort(images, draws[rows])
            yield images, self.labels.index_select(0, order[rows])


def steps_per_epoch(n: int, batch_size: int) -> int:
    """The number of full batches in an epoch of n examples; 1 if there are fewer examples than a batch has."""
    return max(1, n // batch_size)


def distort(images: Tensor, draws: Tensor, angle=0.2, scale=0.12, shear=0.2, shift=0.14) -> Tensor:
    """Rotate, scale, shear and shift float images (B, C, S, S) at random; draws: (B, 7), uniform in [0, 1).

    The maximum of each: `angle` in radians, `shift` in halves of the image. Outside the image its border is repeated.
    """
    u = draws * 2 - 1  # (B, 7), uniform in [-1, 1)
    cos, sin = torch.cos(angle * u[:, 0]), torch.sin(angle * u[:, 0])
    x = 1 + scale * u[:, 1]
    y = 1 + scale * u[:, 2]
    s = shear * u[:, 3]
    rows = [
        torch.stack([x * cos, x * (s * cos - sin), shift * u[:, 4]], 1),
        torch.stack([y * sin, y * (s * sin + cos), shift * u[:, 5]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (B, 2, 3) -> (B, S, S, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def family_of_data(name: str) -> str | None:
    """The family of networks for the data `name`: "cifar", "mnist" or "imagenet"; None for builtin and for a folder of
    images, which all of them take."""
    known = {"auto": "cifar", "cifar10": "cifar", "mnist": "mnist", "imagenet": "imagenet", "builtin": None}
    if name in known:
        return known[name]
    return "mnist" if image_files.holds_idx(Path(name)) else None


def family_of_model(name: str) -> str:
    """The family of the network `name`: "cifar", "mnist" or "imagenet"."""
    if name in model.CIFAR_DEPTHS or name == "airbench":
        return "cifar"
    return "mnist" if name == "mnist" else "imagenet"


def load(name: str, data_dir: str | None = None, limit: int | None = None, family: str = "cifar") -> tuple:
    """(train, validation, test, the dataset's entry in run.json). imagenet has no test set: it is None.

    name: cifar10, mnist, imagenet, builtin, the path of a folder in one of the layouts of common/image_files.py; or
    "auto": CIFAR-10 if its files are there or a mirror delivers them, else builtin, with a warning on standard error.
    family: of the networks that are to take the images of builtin or of a folder: it determines their size, 32 x 32
    ("cifar"), grey 28 x 28 ("mnist") or large, decoded as they are needed ("imagenet"). limit: only the first
    `limit` images of each part. Raises UserError.
    """
    if name == "builtin" and family == "imagenet":
        return folders.builtin(limit)
    if "imagenet" in (name, family):
        return folders.load(name, run.data_dir(data_dir) if name == "imagenet" else name, limit)
    arrays = image_data.load(name, data_dir, limit, shape=(1, 28) if family == "mnist" else (3, 32))
    mean, std = (torch.from_numpy(value).view(1, -1, 1, 1) for value in (arrays.mean, arrays.std))
    train, val, test = (
        Images(torch.from_numpy(images), torch.from_numpy(labels), arrays.classes, mean, std)
        for images, labels in (arrays.train, arrays.val, arrays.test)
    )
    return train, val, test, arrays.facts()


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("cifar10", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N examples of each part", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    *parts, facts = load(args.data, args.data_dir, args.limit, family_of_data(args.data) or "cifar")
    parts = dict(zip(("train", "validation", "test"), parts))
    labels = {name: part.labels for name, part in parts.items() if part is not None}
    image_data.print_counts(facts, labels, len(parts["train"].classes))


if __name__ == "__main__":
    run.cli(main)
