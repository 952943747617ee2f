"""Images of the user's own: a folder with one subfolder of images per class, or idx files like MNIST's.

    FOLDER/class/**/*.png                       split into training, validation and test images here
    FOLDER/train/class/**/*.png, FOLDER/val/... with FOLDER/val and FOLDER/test if present
    FOLDER/*images-idx3-ubyte[.gz]              MNIST, Fashion-MNIST, KMNIST, EMNIST (letters, balanced, digits)

As in torchvision's ImageFolder, images in sub-folders of a class belong to it. What is left out is counted and named:
files without the ending of an image, images beside the folders of the classes, folders beside train/.
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

ENDINGS = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pcx .pgm .png .pnm .ppm .tga .tif .tiff "
    ".webp".split()
)
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)  # what PIL raises
ON_BLACK = "transparent images are laid on black, since white would leave nothing to see"
FIRST_FRAME = "files hold several images, of which the first is read"
DIGITS, LETTERS = "0123456789", "abcdefghijklmnopqrstuvwxyz"
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # names of parts, no classes
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

    at_least: how many training images a class needs. classless: without two folders of images or more, all images are
    one class. parts: which of the parts are read, if present. Raises UserError.
    """
    notes, found = Notes(folder), {}
    try:
        train = folder / "train"
        split = train.is_dir() and (classless or any(entry.is_dir() for entry in train.iterdir()))
        roots = {part: folder / part for part in parts} if split else {"train": folder}
        roots = {part: root for part, root in roots.items() if root.is_dir()}
        if split:
            notes.look_beside(folder, ("train", "val", "test"))
        for part, root in roots.items():
            found[part] = classes_in(root, notes, classless)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    classes = list(found["train"])
    if not split and len(classes) > 1 and {name.lower() for name in classes} <= PARTS:
        names = ", ".join(classes)
        raise UserError(f"{display_path(folder)}: holds parts, not classes: {names}; name them train, val and test")
    if classless and not classes:
        raise UserError(f"{roots['train']}: holds no image ({', '.join(sorted(ENDINGS))})")
    if len(classes) < 2 and not classless:
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


def classes_in(root, notes, classless):
    """{class: its images} of one part. With `classless`, what cannot be two classes or more is one."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    images = {folder.name: notes.images_in(folder) for folder in folders}
    notes.empty += [display_path(folder) for folder in folders if not images[folder.name]]
    classes = {name: files for name, files in images.items() if files}
    if classless and len(classes) < 2:
        beside = notes.images_in(root, deep=False)
        if beside:
            return {"images": sorted(beside + [file for files in classes.values() for file in files])}
    else:
        notes.look_beside(root, [folder.name for folder in folders])
    return classes


class Notes:
    """What is left out of a folder of images, and what was done to images."""

    def __init__(self, folder):
        self.folder = folder
        self.skipped = []
        self.empty = []
        self.unknown = []
        self.beside = []
        self.remarks = {}  # remark: names of the images that it is of

    def images_in(self, folder: Path, deep: bool = True) -> list[Path]:
        """The images in a folder and (with `deep`) in its sub-folders, sorted. Raises OSError."""
        images = []
        visited = {identity(parent) for parent in folder.absolute().parents}
        for place, below, names in os.walk(folder, onerror=raise_error, followlinks=True):
            if identity(place) in visited:  # a link to a folder above leads round
                below.clear()
                continue
            visited.add(identity(place))
            below[:] = sorted(name for name in below if deep and not name.startswith("."))
            for name in sorted(names):
                file = Path(place, name)
                if is_image_name(name) and file.is_file():
                    images.append(file)
                else:
                    self.skipped.append(name)
        return sorted(images)

    def look_beside(self, root: Path, names):
        """Note what lies in `root` beside the folders `names` and is not read: images, and folders."""
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not entry.name.startswith(".") and entry.name not in names:
                self.beside.append(entry.name + "/")
            elif is_image_name(entry.name) and entry.is_file():
                self.beside.append(entry.name)

    def remark(self, remarks: list[str], name: str):
        """Keep what was done to the image `name`."""
        for remark in remarks:
            self.remarks.setdefault(remark, []).append(name)

    def print(self):
        said = {
            "files that are not images": self.skipped,
            "folders without images": self.empty,
            "classes that only one part has": self.unknown,
            "images or folders beside those that are read": self.beside,
            **self.remarks,
        }
        for what, names in said.items():
            if names:
                first = ", ".join(sorted(set(names))[:5]) + (", ..." if len(set(names)) > 5 else "")
                say(self.folder, f"{len(names):,} {what} ({first})")


def list_images(folder: Path) -> list[Path]:
    """The images in a folder and its sub-folders, sorted; what is left out is printed. Raises UserError."""
    notes = Notes(folder)
    try:
        files = notes.images_in(folder)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    notes.print()
    if not files:
        raise UserError(f"{folder}: holds no image ({', '.join(sorted(ENDINGS))})")
    return files


def is_image_name(name: str) -> bool:
    return Path(name).suffix.lower() in ENDINGS and not name.startswith(".")


def identity(folder) -> tuple:
    """What a folder and a link to it have in common."""
    entry = os.stat(folder)
    return (entry.st_dev, entry.st_ino)


def raise_error(error):
    raise error


def say(folder: Path, text: str):
    """A line about a folder on standard error; under torchrun, the first process says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{display_path(folder)}: {text}", file=sys.stderr)


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
    return read_parts(folder, found, channels, size), found.classes


def read_parts(folder: Path, found: ImageFolder, channels: int, size: int) -> list:
    """[train, val, test] of the images that were found in `folder`, each as `read` returns it. Raises UserError."""
    parts, notes = [], Notes(folder)
    for part in (found.train, found.val, found.test):
        if part is None:
            parts.append(None)
            continue
        bar = tqdm(part, f"reading {display_path(folder)}", leave=False, disable=None)
        images = np.stack([read_image(file, channels, size, notes) for file, _ in bar])
        parts.append((images, np.array([label for _, label in part], dtype=np.int64)))
    notes.print()
    return parts


def read_image(file: Path, channels: int, size: int, notes: Notes | None = None, crop=ImageOps.fit) -> np.ndarray:
    """uint8 (channels, size, size): the image cropped square and scaled. notes: takes what was done to it; crop: of an
    image and a size. Raises UserError."""
    try:
        image, remarks = decode(file)
        image = crop(image, (size, size))
    except UNREADABLE as error:
        raise UserError(
            f"{file}: is not a readable image ({error or type(error).__name__}); replace or remove it"
        ) from error
    if notes:
        notes.remark(remarks, file.name)
    if channels == 1:
        return np.asarray(image.convert("L"))[None]
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# ---------------------------------------------------------------------------------------------------------- decoding


def open_image(source: Path | bytes) -> Image.Image:
    """The image in a regular file or in bytes, decoded, upright, as RGB of 8 bits. Raises one of UNREADABLE."""
    return decode(source)[0]


def decode(source: Path | bytes) -> tuple[Image.Image, list[str]]:
    """(image, remarks): the image as of `open_image`, and what was done that its owner may not expect: ON_BLACK,
    FIRST_FRAME. Raises one of UNREADABLE.

    Pixels of 16 bits are divided by 65,535, floats are taken as 0 to 1. What is transparent becomes white.
    """
    if not isinstance(source, bytes) and not source.is_file():  # a FIFO would wait for ever
        raise OSError("not a regular file" if source.exists() else "there is no such file")
    remarks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, about odd headers and large images
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            if getattr(file, "is_animated", False) and file.format != "MPO":  # MPO: a photo and its preview
                remarks.append(FIRST_FRAME)
                file.seek(0)
            white_is_zero = file.format == "TIFF" and file.tag_v2.get(262) == 0
            image = ImageOps.exif_transpose(file)
        if image.mode == "F" or image.mode.startswith("I"):
            image = to_8_bits(image, white_is_zero)
        if image.has_transparency_data:
            image, on_black = lay_on_background(image)
            remarks += [ON_BLACK] if on_black else []
        return image.convert("RGB"), remarks


def to_8_bits(image: Image.Image, white_is_zero: bool) -> Image.Image:
    """A grey image of 16 bits, or of floats from 0 to 1, with 8 bits a pixel. Raises ValueError for other numbers."""
    values = np.asarray(image).astype(np.float64)
    largest = 1 if image.mode == "F" else 65_535
    if not (values.min() >= 0 and values.max() <= largest):  # NaN fails, too
        limits = "floats from 0 to 1" if image.mode == "F" else "whole numbers from 0 to 65,535"
        raise ValueError(f"its pixels are from {values.min():g} to {values.max():g}; {limits} can be read")
    shares = 1 - values / largest if white_is_zero else values / largest
    grey = Image.fromarray((255 * shares).round().astype(np.uint8))
    transparent = image.info.get("transparency")  # the value that a PNG declares transparent
    if isinstance(transparent, int):
        opacity = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, opacity))
    return grey


def lay_on_background(image: Image.Image) -> tuple[Image.Image, bool]:
    """(image, whether it is on black): an image with transparent parts on white, or on black where white would leave
    one colour only."""
    image = image.convert("RGBA")
    on_white, on_black = (
        Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")
        for colour in ("white", "black")
    )
    if is_constant(on_white) and not is_constant(on_black):
        return on_black, True
    return on_white, False


def is_constant(image: Image.Image) -> bool:
    """Have all pixels the same colour?"""
    return all(low == high for low, high in image.getextrema())


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
    emnist = EMNIST_CLASSES.get(count) if first == 0 or count == 26 else None  # of EMNIST, letters alone begin at 1
    names = list(emnist or map(str, range(first, first + count)))
    return [(images, labels - first) for images, labels in parts], names


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
