"""MNIST, scikit-learn's handwritten digits, images of your own, and two functions of one variable.

    python simplenn/data.py --data mnist         # prepare it, print the counts
    python simplenn/data.py --data sinc          # sin(5 pi x) / (5 pi x), 300 points on [-1, 1]

Fetching, verifying and splitting MNIST is in common/images.py.
"""

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import image_files, run
from common import images as image_data
from common.options import option
from common.splits import cut, in_order

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

AUGMENT = ("none", "affine")
# the largest: degrees, fraction of the size, pixels
ROTATION = 12.0
SCALE = 0.1
SHIFT = 2.0
TOLERANCE = 0.05  # a point of a function counts as right within it
POINTS = 300
DATA_HELP = "mnist, builtin, auto, a folder of images (one folder per class) or idx files, or a function: sinc, square"
dataset_arg = run.dataset_arg("auto", "builtin", "mnist", "sinc", "square")


class Digits(torch.utils.data.Dataset):
    """Labelled grey images of 28 x 28 pixels, all in memory.

    images: uint8 (N, 1, 28, 28); labels: int64 (N,); classes: names; mean, std: of the training images, in units of
    pixel values. flat: yield vectors (784,). Indexing gives one example for a DataLoader; `batches` is the fast way.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str], mean: float, std: float, flat: bool = False):
        self.images = images
        self.labels = labels
        self.classes = classes
        self.mean = mean
        self.std = std
        self.flat = flat

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.normalize(self.images[i][None])[0], int(self.labels[i])

    @property
    def targets(self) -> Tensor:
        """The labels, int64 (N,)."""
        return self.labels

    @property
    def normalization(self) -> dict:
        """The facts about the training images that predict.py needs."""
        return {"mean": self.mean, "std": self.std}

    def to(self, device) -> "Digits":
        return self.replace(self.images.to(device), self.labels.to(device))

    def replace(self, images: Tensor, labels: Tensor) -> "Digits":
        """Other images and labels, normalized in the same way."""
        return Digits(images, labels, self.classes, self.mean, self.std, self.flat)

    def subset(self, n: int, flat: bool | None = None) -> "Digits":
        """The first n images: a random sample, since the images are in the order of their digests."""
        subset = self.replace(self.images[:n], self.labels[:n])
        subset.flat = self.flat if flat is None else flat
        return subset

    def normalize(self, images: Tensor) -> Tensor:
        """Pixel values (B, 1, 28, 28) -> float32 of zero mean and unit standard deviation, (B, 784) if `flat`."""
        images = (images.float() - self.mean) / self.std
        return images.flatten(1) if self.flat else images

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All examples at once: (inputs, labels)."""
        return self.normalize(self.images), self.labels

    def batches(
        self, batch_size: int, shuffle: tuple[int, int] | None = None, augment: str = "none"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float32 (B, 1, 28, 28) or (B, 784), labels int64 (B,)); the last batch may be smaller.

        shuffle: None: the stored order. (seed, epoch): seeds of the order and the augmentation.
        """
        n, device = len(self), self.images.device
        order = torch.arange(n)
        if shuffle is not None:
            generator = torch.Generator().manual_seed(run.seed_at(*shuffle))
            order = torch.randperm(n, generator=generator)
            if augment == "affine":
                matrices = random_affine(n, generator).to(device)
        order = order.to(device)
        for first in range(0, n, batch_size):
            index = order[first : first + batch_size]
            images = self.images.index_select(0, index)
            if shuffle is not None and augment == "affine":
                images = transform(images.float(), matrices[first : first + batch_size])
            yield self.normalize(images), self.labels.index_select(0, index)

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def uniform_loss(self) -> float:
        """The loss of a uniform prediction."""
        return math.log(len(self.classes))

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How many of the labels have the largest logit."""
        return (logits.argmax(1) == labels).sum()


def random_affine(n: int, generator: torch.Generator) -> Tensor:
    """n matrices (n, 2, 3), in the form of F.affine_grid, of random rotations, scales of each axis, and shifts."""
    u = torch.rand(n, 5, generator=generator) * 2 - 1
    angle, scale = u[:, 0] * np.deg2rad(ROTATION), 1 + SCALE * u[:, 1:3]
    shift = u[:, 3:] * 2 * SHIFT / 28  # affine_grid's image reaches from -1 to 1
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * scale[:, 0], -sin * scale[:, 1], shift[:, 0], sin * scale[:, 0], cos * scale[:, 1], shift[:, 1]]
    return torch.stack(rows, 1).view(n, 2, 3)


def transform(images: Tensor, matrices: Tensor) -> Tensor:
    """float (B, 1, 28, 28): each image sampled bilinearly where its affine matrix (2, 3) says; black outside."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Points:
    """Points of a function of one variable: x and y float32 (N, 1). The interface is the same as Digits'."""

    classes, normalization = ["y"], None

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    @property
    def targets(self) -> Tensor:
        """The values of the function, float32 (N, 1)."""
        return self.y

    def to(self, device) -> "Points":
        return Points(self.x.to(device), self.y.to(device))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All points at once: (x, y)."""
        return self.x, self.y

    def batches(self, batch_size: int, shuffle=None, augment: str = "none") -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, y), each (B, 1); see Digits.batches."""
        order = torch.arange(len(self))
        if shuffle is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(run.seed_at(*shuffle)))
        for index in order.to(self.x.device).split(batch_size):
            yield self.x[index], self.y[index]

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error; there are no labels to smooth."""
        return F.mse_loss(outputs, targets)

    def uniform_loss(self) -> float:
        """The loss of the best prediction that is the same for all x."""
        return self.y.var(correction=0).item()

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How many of the points are within TOLERANCE."""
        return ((outputs - targets).abs() <= TOLERANCE).sum()


def sinc(x: np.ndarray) -> np.ndarray:
    """sin(5 pi x) / (5 pi x), which is 1 at x = 0."""
    return np.sinc(5 * x)


def square(x: np.ndarray) -> np.ndarray:
    """sgn(sin(5 pi x)), which is 0 at multiples of 1/5, where sin(5 pi x) is not exactly 0 in floating point."""
    wave = np.sin(5 * np.pi * x)
    return np.sign(np.where(abs(wave) < 1e-9, 0, wave))


FUNCTIONS = {"sinc": sinc, "square": square}


def load_function(name: str, limit: int | None = None) -> tuple[Points, Points, Points, dict]:
    """The function `name`: 300 training points evenly on [-1, 1], 300 random points each for validation and test; or
    `limit` of each kind."""
    rng = np.random.default_rng(0)
    parts, digest = [], hashlib.blake2b(digest_size=16)
    for x in (np.linspace(-1, 1, min(limit or POINTS, POINTS)), rng.uniform(-1, 1, POINTS), rng.uniform(-1, 1, POINTS)):
        xy = np.stack([x, FUNCTIONS[name](x)])[:, : limit or None].astype(np.float32)
        digest.update(xy.tobytes())
        parts.append(Points(*(torch.from_numpy(values)[:, None].clone() for values in xy)))
    facts = {"name": name, "digest": digest.hexdigest(), "builtin": False}
    return *parts, facts | {part: len(points) for part, points in zip(("train", "val", "test"), parts)}


def as_mnist(name: str, images: Tensor | None = None) -> bool:
    """Are the images of the dataset `name` light strokes on black, each in the middle, as MNIST's are?

    Those of idx files of one's own are if the edge of most training `images` (N, 1, 28, 28) is empty: it is in MNIST
    and EMNIST, and it is not in Fashion-MNIST, whose files have the same names.
    """
    if name in ("mnist", "builtin"):
        return True
    if images is None or not image_files.holds_idx(Path(name)):
        return False
    edges = torch.cat([images[:, 0, [0, -1]].flatten(1), images[:, 0, :, [0, -1]].flatten(1)], 1)  # (N, 112)
    empty = (edges == 0).all(1).float().mean().item()
    return empty > 0.9  # 0.99 in MNIST


@functools.cache
def read_sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits (8 x 8, 16 grey levels), scaled to 20 x 20 in the middle of 28 x 28, as
    MNIST's are: (uint8 (N, 1, 28, 28), labels int64 (N,))."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.zeros((len(digits.images), 1, 28, 28), dtype=np.uint8)
    for i, image in enumerate((digits.images * 255 / 16).round().astype(np.uint8)):
        images[i, 0, 4:24, 4:24] = Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR)
    return images, digits.target.astype(np.int64)


def load_arrays(name: str, data_dir: str | None = None, limit: int | None = None) -> image_data.ImageArrays:
    """The images of the dataset `name`, see common/images.py; "builtin" are scikit-learn's digits. Raises UserError."""
    name = image_data.choose(name, run.data_dir(data_dir), "mnist")
    if name != "builtin":
        return image_data.load(name, data_dir, limit, "mnist", shape=(1, 28))
    (part,), digest = in_order([read_sklearn_digits()])
    train, test = cut(part, 0.2)
    train, val = cut(train, 0.1)
    train, val, test = ((images[:limit], labels[:limit]) for images, labels in (train, val, test))
    classes = [str(i) for i in range(10)]
    return image_data.ImageArrays(name, classes, digest, train, val, test, *image_data.statistics(train[0]))


def load(name: str, data_dir: str | None = None, limit: int | None = None, flat: bool = False) -> tuple:
    """(train, validation, test, the dataset's entry in run.json): Digits, or Points of a function.

    "auto" is MNIST if it can be had, else "builtin". limit: only the first `limit` examples of each part; flat: images
    as vectors. Raises UserError.
    """
    if name in FUNCTIONS:
        return load_function(name, limit)
    arrays = load_arrays(name, data_dir, limit)
    train, val, test = (
        Digits(
            torch.from_numpy(images),
            torch.from_numpy(labels),
            arrays.classes,
            float(arrays.mean[0]),
            float(arrays.std[0]),
            flat,
        )
        for images, labels in (arrays.train, arrays.val, arrays.test)
    )
    return train, val, test, arrays.facts()


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("mnist", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N examples of each part", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    if args.data in FUNCTIONS:
        print(", ".join(f"{k} {v}" for k, v in load_function(args.data, args.limit)[3].items()))
    else:
        train, val, test, facts = load(args.data, args.data_dir, args.limit)
        image_data.print_counts(
            facts, {"train": train.labels, "validation": val.labels, "test": test.labels}, len(train.classes)
        )


if __name__ == "__main__":
    run.cli(main)
