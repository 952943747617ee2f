"""Images of the user's own: a folder with one subfolder of images per class, or idx files like MNIST's.

    FOLDER/class/*.png                          split into training, validation and test images here
    FOLDER/train/class/*.png, FOLDER/val/...    with FOLDER/val and FOLDER/test if present
    FOLDER/*images-idx3-ubyte[.gz]              MNIST, Fashion-MNIST, KMNIST, EMNIST (letters, balanced, digits)

Hidden files and files without the ending of an image are skipped and counted.
"""

import gzip
import io
import os
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

from common.files import display_path
from common.terminal import UserError

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

ENDINGS = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, MemoryError,
              struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip  # what PIL raises
DIGITS, LETTERS = "0123456789", "abcdefghijklmnopqrstuvwxyz"
EMNIST_CLASSES = {  # by their number (Cohen et al. 2017)
    10: DIGITS,
    26: LETTERS,
    47: DIGITS + LETTERS.upper() + "abdefghnqrt",
    62: DIGITS + LETTERS.upper() + LETTERS,
}


@dataclass
class ImageFolder:
    """A folder of images: class names, and the (path, label) pairs of each part; None for a part that the
    folder does not have."""

    classes: list[str]
    train: list[tuple[Path, int]]
    val: list[tuple[Path, int]] | None
    test: list[tuple[Path, int]] | None


def find(
    folder: Path, at_least: int = 3, classless: bool = False, parts: tuple = ("train", "val", "test")
) -> ImageFolder:
    """The images below `folder`, in one of the layouts above; skipped files are reported in a line on standard error.

    at_least: how many training images a class needs. classless: images that lie in `folder` itself are one class.
    parts: which of the parts are read, if present. Raises UserError.
    """
    try:
        train = folder / "train"
        split = train.is_dir() and (classless or any(entry.is_dir() for entry in train.iterdir()))
        roots = {part: folder / part if split else folder for part in (parts if split else ("train",))}
        roots = {part: root for part, root in roots.items() if root.is_dir()}
        notes, found = Notes(folder), {}
        for part, root in roots.items():
            names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
            images = {name: notes.images_in(root / name) for name in names}
            if classless and not any(images.values()):
                images = {"images": notes.images_in(root)}
            notes.empty += [display_path(root / name) for name in names if name in images and not images[name]]
            found[part] = {name: files for name, files in images.items() if files}
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    classes = list(found["train"])
    if len(classes) < (1 if classless else 2):
        raise UserError(
            f"{roots['train']}: must have two folders of images or more, one per class; found {len(classes)}"
        )
    small = [f"{name} ({len(files)})" for name, files in found["train"].items() if len(files) < at_least]
    if small and not classless:
        raise UserError(f"{roots['train']}: each class needs {at_least} images or more; too few in {', '.join(small)}")
    for part in roots.keys() - {"train"}:
        notes.unknown += [display_path(roots[part] / name) for name in found[part] if name not in classes]
        notes.unknown += [
            f"{display_path(train / name)} (not in {part}/)" for name in classes if name not in found[part]
        ]
        if not any(name in classes for name in found[part]):
            raise UserError(f"{roots[part]}: has no image of a class that train/ has")
    notes.print()
    parts = {
        part: [(file, label) for label, name in enumerate(classes) for file in found[part].get(name, [])]
        for part in roots
    }
    return ImageFolder(classes, parts["train"], parts.get("val"), parts.get("test"))


class Notes:
    """The files skipped in a folder of images."""

    def __init__(self, folder):
        self.folder, self.skipped, self.empty, self.unknown = folder, [], [], []

    def images_in(self, folder):
        files = sorted(folder.iterdir())
        images = [f for f in files if f.suffix.lower() in ENDINGS and not f.name.startswith(".") and f.is_file()]
        chosen = set(images)
        self.skipped += [f.name for f in files if f not in chosen and not f.is_dir()]
        return images

    def print(self):
        if os.environ.get("RANK", "0") != "0":  # under torchrun, the first process says it
            return
        said = {"files that are not images": self.skipped, "folders without images": self.empty,
                "classes that only one part has": self.unknown}  # fmt: skip
        for what, names in said.items():
            if names:
                some = ", ".join(sorted(set(names))[:5]) + (", ..." if len(set(names)) > 5 else "")
                print(f"{display_path(self.folder)}: {len(names):,} {what} ({some})", file=sys.stderr)


def read(folder: Path, channels: int, size: int) -> tuple[list, list[str]]:
    """All images below `folder`: ([train, val, test], class names), where a part is (uint8 (N, channels, size, size),
    labels int64 (N,)), or None if the folder does not have it. Images are cropped square and scaled. Raises UserError.
    """
    if holds_idx(folder):
        if (channels, size) != (1, 28):
            raise UserError(f"{folder}: its idx files hold grey images of 28 x 28, for networks that read MNIST")
        (train, test), classes = read_idx(folder, find_idx(folder))
        return [train, None, test], classes
    found = find(folder)
    parts = []
    for part in (found.train, found.val, found.test):
        if part is None:
            parts.append(None)
            continue
        bar = tqdm(part, f"reading {display_path(folder)}", leave=False, disable=None)
        images = np.stack([read_image(file, channels, size) for file, _ in bar])
        parts.append((images, np.array([label for _, label in part], dtype=np.int64)))
    return parts, found.classes


def open_image(source: Path | bytes) -> Image.Image:
    """The image in a regular file or in bytes, decoded, upright, as RGB. Raises one of UNREADABLE."""
    if not isinstance(source, bytes) and not source.is_file():  # a FIFO would wait for ever
        raise OSError("not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, about odd headers and large images
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


def read_image(file: Path, channels: int, size: int) -> np.ndarray:
    """uint8 (channels, size, size): the image cropped square and scaled. Raises UserError."""
    try:
        image = ImageOps.fit(open_image(file), (size, size))
    except UNREADABLE as error:
        raise UserError(f"{file}: is not a readable image ({error or type(error).__name__}); remove it") from error
    if channels == 1:
        return np.asarray(image.convert("L"))[None]
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# -------------------------------------------------------------------------------------------------------- idx files


def holds_idx(folder: Path) -> bool:
    """Does `folder` hold idx files of images?"""
    return any(folder.glob("*images*idx3*"))


def find_idx(folder):
    """The names, without .gz, of the four idx files in a folder: training images and labels, test images and labels."""
    names = sorted({file.name.removesuffix(".gz") for file in folder.glob("*idx*ubyte*")})
    chosen = []
    for part in ("train", "test|t10k"):
        for kind in ("images", "labels"):
            fits = [name for name in names if kind in name and any(word in name for word in part.split("|"))]
            if len(fits) != 1:
                what = f"one file {part.replace('|', ' or ')}-{kind}-idx{3 if kind == 'images' else 1}-ubyte[.gz]"
                raise UserError(f"{folder}: must hold {what}; found {', '.join(fits) or 'none'}")
            chosen += fits
    return chosen


def read_idx(folder: Path, names: list[str]) -> tuple[list, list[str]]:
    """Images and labels of two parts from idx files, packed (.gz) or not: ([(uint8 (N, 1, 28, 28), int64 (N,)), ...],
    class names). EMNIST's images are stored transposed, and its letters are labelled from 1. Raises UserError."""
    arrays = [read_idx_file(folder, name, dimensions) for name, dimensions in zip(names, (3, 1, 3, 1), strict=True)]
    parts = []
    for images, labels, name in ((arrays[0], arrays[1], names[0]), (arrays[2], arrays[3], names[2])):
        if len(images) != len(labels) or images.shape[1:] != (28, 28):
            raise UserError(f"{folder / name}: holds images {images.shape}, and there are {len(labels)} labels")
        images = images.transpose(0, 2, 1) if "emnist" in name else images
        parts.append((np.ascontiguousarray(images)[:, None], labels.astype(np.int64)))
    first = min(labels.min() for _, labels in parts)
    count = int(max(labels.max() for _, labels in parts) - first) + 1
    if first not in (0, 1) or count < 2:
        raise UserError(
            f"{folder}: its labels begin at {first} and are {count} classes; two or more from 0 or 1 are needed"
        )
    names = EMNIST_CLASSES.get(count) or [str(i) for i in range(count)]
    return [(images, labels - first) for images, labels in parts], list(names)


def read_idx_file(folder, name, dimensions):
    """The array in one idx file: uint8 of that many dimensions."""
    file = folder / f"{name}.gz" if (folder / f"{name}.gz").exists() else folder / name
    try:
        if not file.is_file():
            raise OSError("no such regular file")
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        header = np.frombuffer(content, ">u4", count=1 + dimensions)
        shape = [int(n) for n in header[1:]]
        if header[0] != 0x0800 + dimensions or len(content) != 4 * (1 + dimensions) + np.prod(shape, dtype=object):
            raise ValueError(f"its header and its {len(content):,} bytes do not fit")
        if not shape[0]:
            raise ValueError("it is empty")
        return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read as an idx file ({error})") from error
