"""Read handwritten digits: photos or scans, dark on light or light on dark, of any size.

    python simplenn/predict.py photo.jpg scans/             # files and folders: the newest run, else the committed one
    python simplenn/predict.py digit.png --run RUN          # RUN: a run folder or a safetensors file

Each image must show one digit. It is prepared as MNIST's digits were: scaled to a box of 20 x 20 pixels, then placed in
28 x 28 with its centre of mass in the middle. A network that was trained on a folder of images of your own sees the
image as it saw those: cropped square and scaled to 28 x 28. What the network saw is saved as seen.png in --out.

Probabilities are calibrated on validation images; below 90% the network is unsure. Two large shapes side by side are
asked about. `python simplenn/reliability.py` measures how often both are false alarms.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from common import image_files, photos, run
from common.arguments import ROOT, ScriptOptions, parse_options, path_arg
from common.options import option

import matplotlib.figure
import numpy as np
import torch
from PIL import Image
from scipy import ndimage

import saved

WORKING_SIZE = 400  # larger images are scaled down to it before the digit is looked for
CONTRAST = 25  # grey levels between a digit and its background, at the least
UNSURE = 0.9  # below this probability a prediction is called unsure

# of the second largest shape, beside the largest, if both are digits
LEAST_INK = 0.2  # times the ink of the largest
LEAST_HEIGHT = 0.5  # times the height of the taller one
LEAST_OVERLAP = 0.5  # of their rows, times the height of the smaller one
LEAST_WIDTH = 0.9  # of both together, times the height of the taller one: an open 4 is narrower


def open_grey(path: Path) -> np.ndarray:
    """The image as float (H, W), 0 black to 255 white, as image_files.decode reads it. Raises UserError."""
    try:
        image = image_files.open_image(path)
        image.thumbnail((WORKING_SIZE, WORKING_SIZE))
        return np.asarray(image.convert("L"), dtype=float)
    except image_files.UNREADABLE as error:
        raise run.UserError(f"{path}: is not a readable image ({str(error) or type(error).__name__:.100})") from error


def find_ink(grey: np.ndarray) -> np.ndarray:
    """float (H, W) in [0, 1]: how much of a stroke each pixel is. Raises UserError if there is no digit.

    The border tells the background. A morphological closing with a window wider than strokes gives the background
    alone, shadows included, and the ink is what is darker.
    """
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    if np.median(border) < (grey.min() + grey.max()) / 2:  # light on dark
        grey = 255 - grey
    size = max(3, int(0.4 * max(grey.shape)) | 1)
    background = ndimage.gaussian_filter(ndimage.grey_closing(np.pad(grey, size, mode="edge"), size), size / 6)
    ink = np.clip(background[size:-size, size:-size] - grey, 0, None)
    top = np.percentile(ink[ink >= 0.5 * ink.max()], 50) if ink.max() > 0 else 0
    if top < CONTRAST:
        raise run.UserError("shows no digit that stands out from its background")
    return np.clip((ink / top - 0.15) / 0.85, 0, 1)  # the faintest pixels are noise and paper


def shows_two_digits(ink: np.ndarray) -> bool:
    """Do two large shapes lie side by side in the ink (H, W)? Parts of one digit, such as the bar of a 5, are smaller,
    or lie above each other."""
    shapes, count = ndimage.label(ink > 0.3, np.ones((3, 3)))
    if count < 2:
        return False
    sums = ndimage.sum_labels(ink, shapes, range(1, count + 1))
    small, large = np.argsort(sums)[-2:]
    boxes = ndimage.find_objects(shapes)
    left, right = sorted((boxes[small], boxes[large]), key=lambda box: box[1].start)  # each (rows, columns)
    heights = [rows.stop - rows.start for rows, _ in (left, right)]
    overlap = min(left[0].stop, right[0].stop) - max(left[0].start, right[0].start)
    width = right[1].stop - left[1].start
    return bool(
        right[1].start >= left[1].stop  # side by side
        and sums[small] >= LEAST_INK * sums[large]
        and min(heights) >= LEAST_HEIGHT * max(heights)
        and overlap >= LEAST_OVERLAP * min(heights)
        and width >= LEAST_WIDTH * max(heights)
    )


def keep_digit(ink: np.ndarray) -> np.ndarray:
    """The ink without specks: connected parts that have at least a tenth of the ink of the largest one."""
    parts, count = ndimage.label(ink > 0.3, np.ones((3, 3)))
    if not count:
        raise run.UserError("shows no digit that stands out from its background")
    sums = ndimage.sum_labels(ink, parts, range(1, count + 1))
    kept = np.isin(parts, 1 + np.flatnonzero(sums >= 0.1 * sums.max()))
    return np.where(ndimage.binary_dilation(kept, np.ones((3, 3)), iterations=2), ink, 0)


def center_as_mnist(ink: np.ndarray) -> np.ndarray:
    """uint8 (28, 28): the ink scaled to a box of 20 x 20 with its aspect ratio, its centre of mass in the middle."""
    rows, columns = np.flatnonzero((ink > 0.15).any(1)), np.flatnonzero((ink > 0.15).any(0))
    digit = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = 20 / max(digit.shape)
    height, width = (max(1, round(scale * n)) for n in digit.shape)
    small = Image.fromarray((digit * 255).astype(np.uint8)).resize((width, height), Image.Resampling.LANCZOS)
    canvas = np.zeros((68, 68))  # with room on all sides: the centre of mass may be far from the centre of the box
    canvas[24 : 24 + height, 24 : 24 + width] = np.asarray(small)
    y, x = (round(c) for c in ndimage.center_of_mass(canvas))
    return canvas[y - 14 : y + 14, x - 14 : x + 14].round().astype(np.uint8)


def prepare(path: Path, as_mnist: bool = True) -> tuple[np.ndarray, bool]:
    """(uint8 (28, 28): what the network sees of an image file; does it show two digits?). Raises UserError that names
    the file.

    as_mnist: the digit in it, light on dark and centred; else the whole image, as training read it.
    """
    if not as_mnist:
        return image_files.read_image(path, 1, 28)[0].copy(), False  # torch wants to be able to write
    try:
        ink = find_ink(open_grey(path))
        return center_as_mnist(keep_digit(ink)), shows_two_digits(ink)
    except run.UserError as error:
        raise error if str(path) in str(error) else run.UserError(f"{path}: {error}") from None


def draw_seen(answers):
    """The network's input, with its answer. answers: (name, image (28, 28), title), of which 24 are drawn at most."""
    answers = answers[: photos.MOST_DRAWN]
    columns = min(len(answers), 6)
    rows = -(-len(answers) // columns)
    figure = matplotlib.figure.Figure(figsize=(1.9 * columns, 2.2 * rows), layout="constrained")
    for axes, (name, image, title) in zip(np.ravel(figure.subplots(rows, columns)), answers):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{run.plain_text(name[-24:])}\n{run.plain_text(title)}", fontsize=8)
    for axes in figure.axes:
        axes.axis("off")
    return figure


@dataclass(kw_only=True)
class Options(ScriptOptions):
    images: tuple[str, ...] = option((), "image files, or folders of them", positional=True, nargs="+", metavar="IMAGE")
    run: str | None = option(None, "a run folder or a safetensors file of weights", type=path_arg, metavar="RUN")
    out: str = option(str(ROOT / "out/simplenn/predict"), "folder of seen.png", type=path_arg, metavar="DIR")


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    run.set_threads(auto_threads=1)
    model = saved.open_model(args.run)
    out = run.make_folder(args.out)
    answers = []
    failed = []
    for path in photos.list_images(args.images):
        try:
            image, two_digits = prepare(path, model.as_mnist)
        except run.UserError as error:
            failed.append(str(error))
            continue
        (p,) = saved.probabilities(model, torch.from_numpy(image)[None, None])  # (1, 1, 28, 28) -> (classes,)
        if not torch.isfinite(p).all():
            raise run.UserError(f"{model.source}: is damaged: its predictions are not finite numbers")
        title = f"{model.classes[p.argmax()]} {p.max():.1%}"
        if p.max() < UNSURE:
            title += ", unsure"
        all_classes = ", ".join(f"{name} {value:.1%}" for name, value in zip(model.classes, p))
        shown = run.display_path(path)
        print(f"{shown}: {title}   ({all_classes})")
        if two_digits:
            print(f"warning: {shown}: two digits? two large shapes lie side by side, read as one", file=sys.stderr)
            title += "\ntwo digits?"
        answers.append((path.name, image, title))
    if answers:
        run.write_figure(out / "seen.png", draw_seen(answers))
        print(f"what the network saw: {run.display_path(out / 'seen.png')}")
    photos.raise_errors(failed)
    return answers


if __name__ == "__main__":
    run.cli(main)
