"""common/image_files.py and the readers built on it: images of one's own of every kind, what is left out, copies."""

import functools
import importlib
import io
import os

import numpy as np
import pytest
from PIL import Image

from conftest import failure, load, one_line
from helpers import Lazy, make_images

image_files = Lazy(functools.partial(importlib.import_module, "common.image_files"))
images = Lazy(functools.partial(importlib.import_module, "common.images"))
splits = Lazy(functools.partial(importlib.import_module, "common.splits"))

SIZE = 32
GREY = np.tile(np.linspace(20, 235, SIZE).round().astype(np.uint8), (SIZE, 1))  # (32, 32), dark at the left
GREY[:8] = 235  # a bright bar at the top: every rotation shows


def grey_16(dtype="<u2"):
    return (GREY.astype(np.float64) / 255 * 65_535).round().astype(dtype)


def save(image, ending, **options):
    file = io.BytesIO()
    image.save(file, ending, **options)
    return file.getvalue()


def with_alpha(colour, mode="RGBA"):
    """One colour, whose opacity draws the picture: on white black gives GREY, on black white does."""
    opacity = 255 - GREY if colour == 0 else GREY
    image = Image.merge("LA", (Image.new("L", (SIZE, SIZE), colour), Image.fromarray(opacity)))
    return image.convert(mode)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    return save(Image.fromarray(np.rot90(GREY)).convert("RGB"), "png", exif=exif)


def animated(format):
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    if format == "gif":
        frames = [frame.convert("P") for frame in frames]
    return save(frames[0], format, save_all=True, append_images=frames[1:])


def transparent_value():
    """A 16-bit PNG in which one value is declared transparent: black at the left, on white."""
    values = grey_16()
    values[:, :4] = 0
    image = Image.fromarray(values)
    return save(image, "png", transparency=0)


def white_is_zero():
    return save(Image.fromarray(65_535 - grey_16()), "tiff", tiffinfo={262: 0})


def kinds():
    """{name of a file: (its bytes, largest difference from GREY in grey levels)}"""
    grey = Image.fromarray(GREY)
    return {
        "grey.png": (save(grey, "png"), 0),
        "rgb.png": (save(grey.convert("RGB"), "png"), 0),
        "16 bits.png": (save(Image.fromarray(grey_16()), "png"), 1),
        "16 bits.tif": (save(Image.fromarray(grey_16()), "tiff"), 1),
        "16 bits, big endian.TIFF": (save(Image.fromarray(grey_16(">u2")), "tiff"), 1),
        "16 bits, white is zero.tif": (white_is_zero(), 1),
        "16 bits.pgm": (b"P5 32 32 65535\n" + grey_16(">u2").tobytes(), 1),
        "32 bits.tif": (save(Image.fromarray(grey_16("<i4")), "tiff"), 1),
        "floats.tif": (save(Image.fromarray((GREY / 255).astype(np.float32)), "tiff"), 1),
        "palette.png": (save(grey.convert("P"), "png"), 0),
        "cmyk.tif": (save(grey.convert("RGB").convert("CMYK"), "tiff"), 1),
        "cmyk.jpg": (save(grey.convert("RGB").convert("CMYK"), "jpeg", quality=100), 8),
        "rotated.png": (rotated(), 0),
        "black on transparent.png": (with_alpha_bytes(0), 1),
        "white on transparent.png": (with_alpha_bytes(255), 1),
        "grey and alpha.png": (save(with_alpha(0, "LA"), "png"), 1),
        "animated.gif": (animated("gif"), 2),
        "animated.png": (animated("png"), 0),
        "pages.tiff": (animated("tiff"), 0),
        "photo.jfif": (save(grey, "jpeg", quality=100), 8),
        "grey.ppm": (save(grey.convert("RGB"), "ppm"), 0),
        "grey.bmp": (save(grey, "bmp"), 0),
        "grey.webp": (save(grey.convert("RGB"), "webp", lossless=True), 0),
    }


def with_alpha_bytes(colour):
    return save(with_alpha(colour), "png")


KINDS = kinds()


@pytest.mark.parametrize("name", KINDS)
def test_an_image_of_any_kind_shows_what_it_shows(name, tmp_path):
    """In the reader of arrays, in colour and in grey, and in the one that decodes when an image is needed."""
    content, tolerance = KINDS[name]
    file = tmp_path / name
    file.write_bytes(content)
    assert image_files.is_image_name(name)
    for channels in (1, 3):
        pixels = image_files.read_image(file, channels, SIZE)
        assert pixels.shape == (channels, SIZE, SIZE) and pixels.dtype == np.uint8
        assert abs(pixels.astype(int) - GREY).max() <= tolerance, name
    assert np.array_equal(np.asarray(image_files.open_image(content)).transpose(2, 0, 1), pixels)


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    """A folder of two classes: all KINDS in the first, ten other images in each."""
    folder = tmp_path_factory.mktemp("kinds") / "own"
    for label, first in (("a", 1), ("b", 16)):
        (folder / label).mkdir(parents=True)
        for shift in range(first, first + 10):
            Image.fromarray(np.roll(GREY, shift, axis=1)).save(folder / label / f"{shift}.png")
    for name, (content, _) in KINDS.items():
        (folder / "a" / name).write_bytes(content)
    return folder


def count_near(pictures, expected, tolerance):
    """How many of the pictures (N, H, W) differ from the expected one by no more than `tolerance` grey levels."""
    distance = abs(np.asarray(pictures).astype(int) - expected.astype(int))
    return int((distance.reshape(len(pictures), -1).max(1) <= tolerance).sum())


@pytest.mark.parametrize("folder", ["cifar", "gan", "resnet", "simplenn", "mnist"])
def test_every_folder_reads_images_of_every_kind_alike(folder, all_kinds):
    options, expected = {}, GREY
    if folder in ("simplenn", "mnist"):
        expected = np.asarray(Image.fromarray(GREY).resize((28, 28), Image.Resampling.BICUBIC))
    if folder == "mnist":  # the grey networks of resnet/
        folder, options = "resnet", {"family": "mnist"}
    parts = load(folder, "data").load(str(all_kinds), **options)[:3]
    pictures = np.concatenate([part.images.numpy()[:, 0] for part in parts])
    assert len(pictures) == 20 + len(KINDS) and count_near(pictures, expected, 8) == len(KINDS)


def test_large_images_and_those_of_the_demo_are_read_alike(all_kinds):
    files = [all_kinds / "a" / name for name in KINDS]
    decoder = load("resnet", "folders").Decoder(files, list(KINDS), [0] * len(files), "none", 28, training=False)
    crops = [decoder[i, None][0].numpy()[..., 0] for i in range(len(files))]
    assert count_near(crops, GREY[2:30, 2:30], 8) == len(KINDS)
    seen = [load("resnet", "predict").read_image(file, "cifar")[0] for file in files]
    assert count_near(seen, GREY, 8) == len(KINDS)


@pytest.mark.parametrize(
    "values, said",
    [
        (np.full((4, 4), 70_000, np.int32), "65,535"),
        (np.full((4, 4), -1, np.int32), "65,535"),
        (np.full((4, 4), 1.5, np.float32), "from 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "from 0 to 1"),
    ],
)
def test_other_numbers_are_an_error_of_one_line(values, said, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    code, message = failure(image_files.read_image, tmp_path / "a.tif", 1, 4)
    assert code == 1 and one_line(message) and "a.tif" in message and said in message


def test_a_transparent_value_of_16_bits_is_white(tmp_path):
    (tmp_path / "a.png").write_bytes(transparent_value())
    pixels = image_files.read_image(tmp_path / "a.png", 1, SIZE)[0].astype(int)
    assert (pixels[:, :4] == 255).all() and abs(pixels[:, 4:] - GREY[:, 4:]).max() <= 1


def test_what_is_done_to_images_is_counted_and_said(tmp_path, capsys):
    folder = write_images(tmp_path, {"a": range(5), "b": range(5, 10)})
    for name in ("white on transparent.png", "animated.gif", "black on transparent.png", "16 bits.png"):
        (folder / "a" / name).write_bytes(KINDS[name][0])
    (folder / "b" / "white.png").write_bytes(with_alpha_bytes(255))
    images.load(str(folder))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "1 files hold several images" in lines[0] and "animated.gif" in lines[0]
    assert "2 transparent images are laid on black" in lines[1] and "white.png" in lines[1]
    assert "4 images repeat another" in lines[2], "they show the same"
    train = load("resnet", "data").load(str(folder), family="imagenet")[0]
    list(train.batches(4))
    assert len(train.remarks) == 2 and "laid on black" in capsys.readouterr().out


def test_endings_are_those_that_pillow_decodes():
    Image.init()
    assert {Image.registered_extensions()[ending] for ending in image_files.ENDINGS} <= Image.OPEN.keys()
    torchvisions = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    assert torchvisions <= image_files.ENDINGS


# ------------------------------------------------------------------------------------------------- what is left out


def write_images(root, numbers, size=12):
    """{folder below `root`: numbers of its images}; equal numbers are equal images. Returns `root`."""
    for name, images_of in numbers.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, number in enumerate(images_of):
            pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_links_to_folders_are_followed_once(tmp_path):
    write_images(tmp_path, {"own/a": range(4), "elsewhere/b": range(4, 9)})
    (tmp_path / "own" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "own" / "a" / "round").symlink_to(tmp_path / "own" / "a")
    (tmp_path / "own" / "a" / "all").symlink_to(tmp_path / "own")
    assert len(image_files.find(tmp_path / "own").train) == 9


AB = {"train/a": range(4), "train/b": range(4, 8)}
LEFT_OUT = [  # folders, whether images without classes are wanted; classes, number of images, what is said
    ({".": range(3), "a": range(3, 7), "b": range(7, 11)}, False, ["a", "b"], 8, "3 images or folders beside"),
    ({".": range(3), "a": range(3, 7), "b": range(7, 11)}, True, ["a", "b"], 8, "3 images or folders beside"),
    ({".": range(6), "extra": range(6, 9)}, True, ["images"], 9, ""),
    ({"extra": range(6, 9)}, True, ["extra"], 3, ""),
    (AB | {"valid/a": [9]}, False, ["a", "b"], 8, "1 images or folders beside those that are read (valid/)"),
    (AB | {"train": [9], ".": [10]}, False, ["a", "b"], 8, "2 images or folders beside"),
]


@pytest.mark.parametrize("folders, classless, classes, count, said", LEFT_OUT)
def test_what_is_left_out_is_counted_and_named(folders, classless, classes, count, said, tmp_path, capsys):
    found = image_files.find(write_images(tmp_path, folders), classless=classless)
    assert found.classes == classes and len(found.train) == count
    err = capsys.readouterr().err
    assert said in err if said else not err


def test_the_demo_gives_images_in_sub_folders_the_label_of_their_class(tmp_path):
    write_images(tmp_path, {"a": [1], "a/x": [2], "test/b/y": [3], "c": [4]})
    files, labels = load("resnet", "predict").list_images([tmp_path, tmp_path / "a" / "0.png"], ["a", "b"])
    *below, named = labels.tolist()
    labels = {file.relative_to(tmp_path).as_posix(): label for file, label in zip(files, below)}
    assert labels == {"a/0.png": 0, "a/x/0.png": 0, "test/b/y/0.png": 1, "c/0.png": -1}
    assert named == -1, "its folder is not below one on the command line"


# ----------------------------------------------------------------------------------------------------------- copies


def readers():
    """{name: function of a folder that returns ([keys of the images of train, val, test], facts)}"""

    def pixels(folder, module, **options):
        *parts, facts = load(module, "data").load(str(folder), **options)
        return [[image.numpy().tobytes() for image in part.images] for part in parts], facts

    def files(folder):
        *parts, facts = load("resnet", "data").load(str(folder), family="imagenet")
        return [[source.read_bytes() for source in part.sources] for part in parts], facts

    return {
        "cifar": lambda folder: pixels(folder, "cifar"),
        "simplenn": lambda folder: pixels(folder, "simplenn"),
        "gan": lambda folder: pixels(folder, "gan"),
        "resnet": lambda folder: pixels(folder, "resnet"),
        "resnet, large images": files,
    }


@pytest.mark.parametrize("reader", readers())
def test_copies_are_on_one_side_of_a_split(reader, tmp_path, capsys):
    """Every image twice, and ten of one class in the other class, too."""
    a, b = [*range(30)], [*range(30, 60)]
    write_images(tmp_path, {"a": a, "a/again": a, "b": [*b, *range(10)], "b/again": b})
    parts, facts = readers()[reader](tmp_path)
    sets = [set(part) for part in parts]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert sum(map(len, parts)) == 130 and len(set().union(*sets)) == 60
    assert all(len(part) >= 8 for part in parts), "a tenth of each class, about"
    assert facts["copies"] == {"train": 70}
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "70 images repeat another" in err[0] and tmp_path.name in err[0]


@pytest.mark.parametrize("reader", readers())
def test_copies_in_the_users_own_parts_are_counted_and_never_moved(reader, tmp_path, capsys):
    write_images(tmp_path, {"train/a": range(20), "train/b": range(20, 40), "val/a": [0, 50], "val/b": [51]})
    write_images(tmp_path, {"test/a": [0, 1, 60], "test/b": [50, 61, 62]})
    parts, facts = readers()[reader](tmp_path)
    assert list(map(len, parts)) == [40, 3, 6]
    assert facts["copies"] == {"val": 1, "test": 3}
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "1 of the 3 images of val" in err[0] and "3 of the 6 images of test" in err[1]


@pytest.mark.parametrize("reader", readers())
def test_without_copies_nothing_is_said_and_equal_sizes_are_no_copies(reader, tmp_path, capsys):
    write_images(tmp_path, {"a": range(20), "b": range(20, 40)})
    for file in tmp_path.glob("*/*.png"):  # as uncompressed files, all have one size
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    parts, facts = readers()[reader](tmp_path)
    assert "copies" not in facts and not capsys.readouterr().err
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40


def test_the_split_without_copies_is_as_it_was():
    labels = np.arange(200) % 7
    plain, grouped = splits.split(labels, 0.2), splits.split(labels, 0.2, np.arange(200))
    assert all(np.array_equal(a, b) for a, b in zip(plain, grouped))


def test_copies_in_a_published_dataset_are_counted_and_its_split_stays():
    pixels, labels = np.arange(100).reshape(50, 2) // 4, np.zeros(50, np.int64)  # two of each, adjacent
    parts = [(pixels, labels), None, (pixels[:3], labels[:3])]
    keys = [list(map(bytes, part[0].astype(np.uint8))) if part else None for part in parts]
    plain = [splits.divide("cifar10", parts, keys, 0.1, as_published=True), splits.divide("x", parts, keys, 0.1)]
    assert [len(part[1]) for part in plain[0][0]] == [45, 5, 3] and plain[0][1] == {"train": 25, "val": 1, "test": 3}
    assert [len(part[1]) for part in plain[1][0]] == [46, 4, 3] and plain[1][1] == {"train": 25, "test": 3}


@pytest.mark.parametrize("parts", [("Training", "Test"), ("train", "valid"), ("Train", "Test", "Validation")])
def test_folders_that_are_named_as_parts_are_no_classes(parts, tmp_path):
    """A folder train/ is a part, so its two classes are found; of the others all would be."""
    make_images(tmp_path, {f"{part}": 4 for part in parts})
    folder = load("cifar", "data").image_data.image_files
    if "train" in parts:
        assert folder.find(tmp_path).classes == ["cats", "dogs"]
        return
    code, message = failure(folder.find, tmp_path)
    assert code == 1 and one_line(message) and "parts, not classes" in message


def test_a_folder_of_one_image_many_times_is_one_line(tmp_path):
    write_images(tmp_path, {"a": [1] * 20, "b": [1] * 20})
    for folder in ("cifar", "gan", "simplenn", "resnet"):
        code, message = failure(load(folder, "data").load, str(tmp_path))
        assert code == 1 and one_line(message) and "too few different images" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs are POSIX's")
def test_a_fifo_named_as_an_image_is_left_out(tmp_path, capsys):
    write_images(tmp_path, {"a": range(4), "b": range(4, 8)})
    os.mkfifo(tmp_path / "a" / "x.tif")
    assert len(image_files.find(tmp_path).train) == 8 and "x.tif" in capsys.readouterr().err


def test_a_file_that_is_missing_is_called_missing(tmp_path):
    code, message = failure(image_files.read_image, tmp_path / "photo.jpg", 3, 32)
    assert code == 1 and one_line(message) and "there is no such file" in message
