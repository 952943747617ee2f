"""Folders of pictures, one a class, as ImageNet's are: decoded by DataLoader workers, a batch at a time.

Which picture comes when, and how it is cut, is a function of (seed, epoch, place): neither the number of workers nor
that of processes changes it. A picture that cannot be decoded is named and counted, and is never a crash.
"""

import hashlib
import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from run import UserError, seed_at

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in units of 255: what published weights expect
ENDINGS = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
SIZE, RESIZE = 224, 256  # pixels cut out in the middle for evaluation, and of the shorter side before that


class Folders:
    """Labelled pictures of any size, decoded when asked for.

    sources: paths, or the bytes of an encoded picture; names: what to call each; labels: int64 (N,); classes: names.
    size: pixels of what is cut out. `bad` collects the names of pictures that could not be decoded.
    """

    at_once = 100  # pictures in a batch of evaluation

    def __init__(self, sources, names, labels, classes, name, digest, size=SIZE):
        self.sources, self.names, self.labels, self.classes = sources, names, labels, classes
        self.name, self.digest, self.size, self.bad, self.device = name, digest, size, set(), torch.device("cpu")
        self.mean, self.std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        self._loaders = {}

    def __len__(self):
        return len(self.labels)

    def facts(self):
        """What a record says of the dataset."""
        return {"name": self.name, "digest": self.digest, "builtin": self.name == "builtin"}

    def to(self, device):
        """Decoding stays on the CPU; batches go to `device`."""
        self.device = torch.device(device)
        self.labels, self.mean, self.std = (t.to(device) for t in (self.labels, self.mean, self.std))
        return self

    def batches(self, batch_size, shuffle=None, augment="none", skip=0, size=None, shard=(0, 1)):
        """Yield (images float32 (B, 3, S, S) normalized, labels int64 (B,)); see data.Pictures.batches.

        augment: "crop" cuts a random eighth to all of the picture (Szegedy et al. 2014, section 6), "flip" mirrors.
        Without shuffling, a picture that cannot be decoded is black and its label is -1: weight 0. With it, the next
        one that can be decoded takes its place, so that all ranks make equal steps.
        """
        n, (rank, world) = len(self), shard
        if shuffle is None:
            plan = [[(i, None) for i in part.tolist()] for part in torch.arange(n)[rank::world].split(batch_size)]
        else:
            seed, epoch = shuffle
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_at(seed, epoch))).tolist()
            plan, share = [], full_batch(n, batch_size, world)
            for step in range(skip, max(1, n // batch_size)):
                places = range(*(step * batch_size + share * k // world for k in (rank, rank + 1)))
                plan.append([(order[k], ((seed << 24) + epoch, k)) for k in places])
        size = size or self.size
        for images, labels, bad in self._loader(plan, augment, size, training=shuffle is not None):
            for name in bad:
                if name not in self.bad:
                    tqdm.write(f"cannot be decoded: {name}")
                self.bad.add(name)
            images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # (B, S, S, 3) -> (B, 3, S, S)
            yield images.float().sub_(self.mean).div_(self.std), labels.to(self.device, non_blocking=True)

    def _loader(self, plan, augment, size, training):
        """A loader whose workers live on from epoch to epoch, as long as the cut is the same."""
        key = augment, size, training
        if key not in self._loaders:
            decoder = Decoder(self.sources, self.names, self.labels.cpu(), augment, size, training)
            workers = workers_for(len(self))
            self._loaders = {k: v for k, v in self._loaders.items() if k[2] != training} | {
                key: DataLoader(
                    decoder,
                    batch_sampler=Plan(),
                    num_workers=workers,
                    collate_fn=collate,
                    persistent_workers=workers > 0,
                    pin_memory=self.device.type == "cuda",
                )
            }
        self._loaders[key].batch_sampler.batches = plan
        return self._loaders[key]


def full_batch(n, batch_size, world=1):
    """How many of n examples a step takes: batch_size, or of fewer all that the `world` processes can share equally."""
    return min(batch_size, n // world * world)


def workers_for(n):
    """How many processes decode a dataset of n pictures for one of those that train here: to start them pays from a
    certain size on."""
    return max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) if n > 1000 else 0


class Plan:
    """A batch sampler that is told what to sample: lists of what the dataset is indexed with."""

    batches = ()

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Decoder(torch.utils.data.Dataset):
    """What a worker does: (index, key of the random numbers) -> (uint8 (S, S, 3), label, names that could not be)."""

    def __init__(self, sources, names, labels, augment, size, training):
        self.sources, self.names, self.labels = sources, names, labels
        self.augment, self.size, self.training = augment, size, training

    def __getitem__(self, what):
        (first, key), n, bad = what, len(self.sources), []
        for k in range(n):
            i = (first + k) % n
            try:
                picture = decode(self.sources[i])
                image = cut_randomly(picture, self.size, self.augment, key) if key else cut_middle(picture, self.size)
                return torch.from_numpy(np.array(image)), int(self.labels[i]), bad
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # all of these PIL raises
                bad.append(self.names[i])
            if not self.training:
                return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), -1, bad
        raise UserError(f"{self.names[first]} and all others: no picture can be decoded")


def decode(source):
    """An RGB picture from a path or bytes."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        return picture.convert("RGB")


def collate(examples):
    """[(image, label, bad names), ...] -> images uint8 (B, S, S, 3), labels int64 (B,), all bad names"""
    images, labels, bad = zip(*examples)
    return torch.stack(images), torch.tensor(labels), [name for names in bad for name in names]


def cut_middle(picture, size=SIZE):
    """The usual evaluation: the shorter side scaled to 8/7 of `size`, then `size` pixels square from the middle."""
    short, (width, height) = size * RESIZE // SIZE, picture.size
    wide, high = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
    picture = picture.resize((wide, high), Image.BILINEAR)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def cut_randomly(picture, size, augment, key):
    """The usual augmentation: a box of 8 to 100 % of the area and a shape of 3:4 to 4:3, scaled to `size` pixels
    square, mirrored half of the time. `key` (two whole numbers) decides."""
    rng = np.random.default_rng(key)
    mirrored = rng.random() < 0.5
    if "crop" in augment:
        width, height = picture.size
        for _ in range(10):
            area = width * height * rng.uniform(0.08, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left, top = rng.integers(width - wide + 1), rng.integers(height - high + 1)
                break
        else:  # no such box fits: the middle, as far as the shape allows
            wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
            left, top = (width - wide) // 2, (height - high) // 2
        picture = picture.resize((size, size), Image.BILINEAR, (left, top, left + wide, top + high))
    else:
        picture = cut_middle(picture, size)
    return picture.transpose(Image.FLIP_LEFT_RIGHT) if mirrored and "flip" in augment else picture


# ---------------------------------------------------------------------------------------------- where they come from


def load(name, folder, limit=None):
    """(train, validation, None) from folder/train and folder/val, or those below folder/imagenet. Raises UserError."""
    places = [Path(folder), Path(folder) / "imagenet"]
    root = next((place for place in places if (place / "train").is_dir()), None)
    if root is None:
        raise UserError(
            f"{folder}: wants train/ and val/ with a folder of pictures a class; ImageNet itself is to "
            "be had from image-net.org by hand: then name its folder with --data-dir"
        )
    classes = sorted(d.name for d in (root / "train").iterdir() if d.is_dir())
    parts = [listing(root, part, classes) for part in ("train", "val")]
    digest = hashlib.blake2b("\n".join(line for _, _, lines in parts for line in lines).encode(), digest_size=16)
    made = [
        Folders(
            files[:limit],
            [str(f.relative_to(root)) for f in files[:limit]],
            torch.tensor(labels[:limit]),
            classes,
            Path(name).name,
            digest.hexdigest(),
        )
        for files, labels, _ in parts
    ]
    return made[0], made[1], None


def listing(root, part, classes):
    """(files, labels, a line of name and size for each), in the order of the digests of their names."""
    found = []
    for label, name in enumerate(classes):
        folder = root / part / name
        if not folder.is_dir():
            raise UserError(f"{folder}: is missing, though train/ has that class")
        with os.scandir(folder) as entries:
            found += [
                (f"{part}/{name}/{e.name}", label, e.stat().st_size)
                for e in entries
                if Path(e.name).suffix.lower() in ENDINGS and not e.name.startswith(".")
            ]
    if len(classes) < 2 or not found:
        raise UserError(f"{root / part}: wants two folders or more, one a class, with pictures in them")
    found.sort(key=lambda entry: hashlib.blake2b(entry[0].encode(), digest_size=16).digest())
    return [root / path for path, _, _ in found], [label for _, label, _ in found], [f"{p} {s}" for p, _, s in found]


def encode(parts, classes, size):
    """(train, validation, None) from arrays [(uint8 (N, 3, H, W), labels), ...], as JPEGs of many sizes, in memory."""
    rng, made = np.random.default_rng(0), []
    for part, (images, labels) in zip(("train", "val"), parts):
        sources = []
        for picture in images:
            file, shape = io.BytesIO(), rng.integers(size + 6, picture.shape[-1] + 1, 2).tolist()
            Image.fromarray(picture.transpose(1, 2, 0)).resize(shape).save(file, "jpeg", quality=90)
            sources.append(file.getvalue())
        names = [f"{part}/{i}.jpeg" for i in range(len(sources))]
        digest = hashlib.blake2b(b"".join(sources), digest_size=16).hexdigest()
        made.append(Folders(sources, names, torch.tensor(labels), classes, "builtin", digest, size))
    return *made, None
