"""Folders of images, one for each class, as ImageNet has them: DataLoader workers decode them, a batch at a time.

The order of images and the augmentation of each are functions of (seed, epoch, position). The number of workers and of
processes changes neither. An image that cannot be decoded is named and counted; it never ends the run.
"""

import collections
import hashlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

from common import image_files, run, shapes
from common.cores import usable_cores
from common.splits import divide

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in units of 255, as published weights expect
SIZE, RESIZE = 224, 256  # pixels of the center crop, and of the shorter side before it


class LazyImageFolder:
    """Labelled images of any size, decoded when they are needed.

    sources: paths, or encoded images as bytes; names: one for each source; labels: int64 (N,); classes: names.
    size: side of the crops in pixels. `undecodable` collects the names of images that could not be decoded, `remarks`
    what image_files.decode says of others. Raises UserError if none can be decoded.
    """

    eval_batch_size = 100

    def __init__(self, sources: list, names: list[str], labels: Tensor, classes: list[str], size: int = SIZE):
        self.sources = sources
        self.names = names
        self.labels = labels
        self.classes = classes
        self.size = size
        self.undecodable = set()
        self.remarks = set()
        self.mean, self.std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        self.device, self._loaders = torch.device("cpu"), {}
        if not any(map(is_decodable, sources)):
            raise run.UserError(
                f"{sources[0]}: cannot be decoded, nor can any other of the {len(sources):,} images of "
                "its part; replace them"
            )

    def __len__(self):
        return len(self.labels)

    def to(self, device) -> "LazyImageFolder":
        """Batches go to `device` from now on; images are decoded on the CPU."""
        self.device = torch.device(device)
        self.labels, self.mean, self.std = (t.to(device) for t in (self.labels, self.mean, self.std))
        return self

    def batches(
        self,
        batch_size: int,
        shuffle: tuple[int, int] | None = None,
        augment: str = "none",
        skip: int = 0,
        size: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float32 (B, 3, S, S) normalized, labels int64 (B,)); see data.Images.batches.

        augment: "crop" takes a random box of 8 % to 100 % of the area (Szegedy et al. 2014, section 6); "flip" flips
        half of the images. With `shuffle`, the next image that can be decoded takes the place of one that cannot, so
        all processes take the same number of steps. Without, such an image is black and has the label -1.
        """
        n, (rank, world) = len(self), shard
        if shuffle is None:
            batches = [
                [(i, None) for i in part.tolist()]
                for part in torch.arange(n)[rank::world].split(batch_size)
                if len(part)
            ]
        else:
            seed, epoch = shuffle
            order = torch.randperm(n, generator=torch.Generator().manual_seed(run.seed_at(seed, epoch))).tolist()
            batches, share = [], examples_per_step(n, batch_size, world)
            for step in range(skip, max(1, n // batch_size)):
                positions = range(*(step * batch_size + share * k // world for k in (rank, rank + 1)))
                batches.append([(order[k], ((seed << 24) + epoch, k)) for k in positions])
        size = size or self.size
        for images, labels, undecodable, remarks in self._loader(batches, augment, size, training=shuffle is not None):
            for name in undecodable:
                if name not in self.undecodable:
                    tqdm.write(f"cannot be decoded: {name}")
                self.undecodable.add(name)
            for remark, name in remarks:
                if remark not in self.remarks:
                    tqdm.write(f"{remark} ({name}, perhaps others)")
                self.remarks.add(remark)
            images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # (B, S, S, 3) -> (B, 3, S, S)
            yield images.float().sub_(self.mean).div_(self.std), labels.to(self.device, non_blocking=True)

    def _loader(self, batches, augment, size, training):
        """The loader of `batches`. Its workers stay alive from epoch to epoch unless augmentation or size change."""
        key = augment, size, training
        if key not in self._loaders:
            decoder = Decoder(self.sources, self.names, self.labels.cpu(), augment, size, training)
            workers = num_workers(len(self))
            self._loaders = {k: v for k, v in self._loaders.items() if k[2] != training}
            self._loaders[key] = DataLoader(
                decoder,
                batch_sampler=ListSampler(),
                num_workers=workers,
                collate_fn=collate,
                persistent_workers=workers > 0,
                pin_memory=self.device.type == "cuda",
            )
        self._loaders[key].batch_sampler.batches = batches
        return self._loaders[key]


def examples_per_step(n: int, batch_size: int, world: int = 1) -> int:
    """Examples of one step: `batch_size`, or of n < batch_size as many as `world` processes can share equally."""
    return min(batch_size, n // world * world)


def num_workers(n: int) -> int:
    """How many workers decode n images for one training process. For few images, starting workers takes longer."""
    return max(1, min(16, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) if n > 1000 else 0


class ListSampler:
    """A batch sampler whose batches, lists of indices into the dataset, are set before each epoch."""

    batches = ()

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Decoder(torch.utils.data.Dataset):
    """The work of a worker: (index, seed of the augmentation) -> (uint8 (S, S, 3), label, undecodable names,
    [(remark, name), ...])."""

    def __init__(self, sources, names, labels, augment, size, training):
        self.sources = sources
        self.names = names
        self.labels = labels
        self.augment = augment
        self.size = size
        self.training = training

    def __getitem__(self, index):
        first, seed = index
        n = len(self.sources)
        undecodable = []
        for k in range(n):
            i = (first + k) % n
            try:
                image, remarks = image_files.decode(self.sources[i])
                image = random_crop(image, self.size, self.augment, seed) if seed else center_crop(image, self.size)
                remarks = [(remark, self.names[i]) for remark in remarks]
                return torch.from_numpy(np.array(image)), int(self.labels[i]), undecodable, remarks
            except image_files.UNREADABLE:
                undecodable.append(self.names[i])
            if not self.training:
                return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), -1, undecodable, []
        name = self.sources[first]
        raise run.UserError(f"{name}: cannot be decoded any more, nor can any other image; are the files still there?")


def is_decodable(source: Path | bytes) -> bool:
    """Can the image in a file or in bytes be decoded?"""
    try:
        return bool(image_files.open_image(source))
    except image_files.UNREADABLE:
        return False


def collate(examples: list) -> tuple[Tensor, Tensor, list[str], list]:
    """[(image, label, names, remarks), ...] -> images uint8 (B, S, S, 3), labels int64 (B,), all names, all remarks"""
    images, labels, names, remarks = zip(*examples)
    return torch.stack(images), torch.tensor(labels), sum(names, []), sum(remarks, [])


def center_crop(image: Image.Image, size: int = SIZE) -> Image.Image:
    """The usual evaluation: scale the shorter side to 8/7 of `size` pixels, then take the square in the middle.

    The far ends of a very long image are cropped first: scaled as a whole, 20,000 x 2 pixels would take gigabytes.
    """
    short, (width, height) = size * RESIZE // SIZE, image.size
    longest = 4 * min(width, height)
    if max(width, height) > longest:
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        width, height = min(width, longest), min(height, longest)
        image = image.crop((left, top, left + width, top + height))
    wide, high = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
    image = image.resize((wide, high), Image.BILINEAR)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, augment: str, seed: tuple[int, int]) -> Image.Image:
    """The usual augmentation: a random box of 8 % to 100 % of the area and an aspect ratio of 3:4 to 4:3, scaled to a
    square of `size` pixels, and a flip with probability 1/2. A function of `seed`."""
    rng = np.random.default_rng(seed)
    flip = rng.random() < 0.5
    if "crop" in augment:
        width, height = image.size
        for _ in range(10):
            area = width * height * rng.uniform(0.08, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left, top = rng.integers(width - wide + 1), rng.integers(height - high + 1)
                break
        else:  # no such box fits: the largest one in the middle
            wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
            left, top = (width - wide) // 2, (height - high) // 2
        image = image.resize((size, size), Image.BILINEAR, (left, top, left + wide, top + high))
    else:
        image = center_crop(image, size)
    return image.transpose(Image.FLIP_LEFT_RIGHT) if flip and "flip" in augment else image


# -------------------------------------------------------------------------------------------------------------- reading


def load(name: str, folder: Path, limit: int | None = None) -> tuple:
    """(train, validation, test, facts for the record) of a folder in one of the layouts of common/image_files.py.

    A missing validation or test part is a tenth of the training images of each class. "imagenet" has no test part: it
    is folder/train and folder/val, or those in folder/imagenet. limit: only the first `limit` images of each part.
    Raises UserError.
    """
    if name == "imagenet":
        root = imagenet_root(Path(folder))
        found = image_files.find(root, parts=("train", "val"))
    else:
        root = Path(folder)
        found = image_files.find(root)
    hashed = hashlib.blake2b(digest_size=16)
    found_parts = [found.train, found.val, found.test]
    keys = file_keys(found_parts) if name != "imagenet" else {}  # its parts stay as published
    parts = [None if part is None else in_order(part, root, hashed, keys) for part in found_parts]
    copies = {}
    if keys:
        part_keys = [None if part is None else [keys[file] for file in part[0]] for part in parts]
        parts, copies = divide(str(root), parts, part_keys)
    datasets = []
    for part in parts:
        if part is None:
            datasets.append(None)
            continue
        files, labels = part[0][:limit].tolist(), torch.from_numpy(part[1][:limit])
        names = [str(file.relative_to(root)) for file in files]
        datasets.append(LazyImageFolder(files, names, labels, found.classes))
    record = facts(Path(name).name, hashed, *(dataset for dataset in datasets if dataset))
    if copies:
        record["copies"] = copies
    return *datasets, record


def imagenet_root(folder: Path) -> Path:
    """`folder` or folder/imagenet, whichever has train/ and val/. Raises UserError."""
    for root in (folder, folder / "imagenet"):
        if (root / "train").is_dir() and (root / "val").is_dir():
            return root
    raise run.UserError(
        f"{folder}: has no train/ and val/ with one subfolder of images per class (ImageNet must be downloaded by hand "
        "from image-net.org: then name its folder with --data-dir)"
    )


def in_order(part: list[tuple[Path, int]], root: Path, hashed, keys: dict) -> tuple[np.ndarray, np.ndarray]:
    """(files, labels) sorted by the digest of the names, so that a split is the same for everyone; copies, which have
    equal `keys`, follow each other. Names and sizes go into `hashed`. Raises UserError."""
    try:
        entries = [(os.fsencode(file.relative_to(root).as_posix()), file.stat().st_size) for file, _ in part]
    except OSError as error:
        raise run.UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    digests = [hashlib.blake2b(name, digest_size=16).digest() for name, _ in entries]
    order = sorted(range(len(part)), key=digests.__getitem__)
    for i in order:
        hashed.update(b"%s %d\n" % entries[i])
    if keys:
        first = {}  # key: the place of the first file that has it
        for place, i in enumerate(order):
            first.setdefault(keys[part[i][0]], place)
        order.sort(key=lambda i: first[keys[part[i][0]]])
    return np.array([part[i][0] for i in order], object), np.array([part[i][1] for i in order], np.int64)


def file_keys(parts: list) -> dict[Path, tuple]:
    """{file: a key that it shares with its copies alone}: the size and, where another file has this size, a digest.

    parts: lists of (file, label), or None. Most files of equal size differ in their last bytes, so few are read as a
    whole. Raises UserError.
    """
    files = [file for part in parts for file, _ in part or []]
    try:
        keys = {file: (file.stat().st_size,) for file in files}
        for end in (4096, None):  # bytes from the end of the file; None: the whole file
            counts = collections.Counter(keys.values())
            for file in files:
                if counts[keys[file]] > 1:
                    keys[file] += (digest_of(file, end),)
    except OSError as error:
        raise run.UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return keys


def digest_of(file: Path, end: int | None) -> bytes:
    """The digest of the last `end` bytes of a file, or of all of it."""
    with open(file, "rb") as content:
        if end is None:
            return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).digest()
        content.seek(max(0, file.stat().st_size - end))
        return hashlib.blake2b(content.read(), digest_size=16).digest()


def facts(name, hashed, *datasets) -> dict:
    """The dataset's entry in run.json."""
    counts = {part: len(dataset) for part, dataset in zip(("train", "val", "test"), datasets)}
    return {"name": name, "digest": hashed.hexdigest(), "builtin": name == "builtin"} | counts


def builtin(limit: int | None = None, size: int = 64) -> tuple[LazyImageFolder, LazyImageFolder, None, dict]:
    """(train, validation, None, facts for the record): 600 + 100 of the built-in images as JPEGs of different sizes, in
    memory. size: side of the crops in pixels."""
    arrays, classes = shapes.draw_builtin()
    rng = np.random.default_rng(0)
    datasets = []
    digest = hashlib.blake2b(digest_size=16)
    for part, n, (images, labels) in zip(("train", "val"), (600, 100), arrays):
        sources, n = [], min(n, limit or n)
        for image in images[:n]:
            file, shape = io.BytesIO(), rng.integers(size * 9 // 8, size * 3 // 2, 2, endpoint=True).tolist()
            Image.fromarray(image.transpose(1, 2, 0)).resize(shape).save(file, "jpeg", quality=90)
            sources.append(file.getvalue())
            digest.update(sources[-1])
        names = [f"{part}/{i}.jpeg" for i in range(n)]
        datasets.append(LazyImageFolder(sources, names, torch.from_numpy(labels[:n]), classes, size))
    return *datasets, None, facts("builtin", digest, *datasets)
