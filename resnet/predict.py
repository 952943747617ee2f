"""Say what is on photographs: the likeliest classes of each, and a figure of what the network saw.

    python resnet/predict.py photo.jpg pictures/              # files, and folders of images
    python resnet/predict.py pictures/ --run out/resnet/RUN   # with a run of your own, and its classes
    python resnet/predict.py --run out/resnet/RUN             # no images: the test set of the run

Without --run: the newest finished run, else weights/resnet20.safetensors. Each image is cropped square and scaled, as
in training. Probabilities are calibrated on validation images; below 50% the network is unsure.

Writes predictions.csv (id, label, its name and probability), and for photographs seen.png. An image in a folder that is
named like a class, below a folder on the command line, has this label. Where labels are known, confusion.png has the
confusion matrix, and mistakes.png the mistakes of the highest probability.
"""

import csv
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import classifiers, image_files, photos, run
from common.classifiers import UNSURE, Classifier
from common.options import option
from common.run import ROOT, data_dir_option, device_option, path_arg, threads_option

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import data
import folders
from trained import COMMITTED, EXPERIMENT, load, probabilities

AUTO_THREADS = 1  # a few images gain nothing from more
CHUNK = 256  # images in memory at a time


def list_images(places, classes):
    """(files, labels int64 (N,), -1 where unknown) of image files and of the images in folders."""
    files = []
    labels = []
    for place in places:
        found = photos.list_images([place])
        files += found
        labels += [label_of(file.relative_to(place), classes) for file in found]
    return files, torch.tensor(labels)


def label_of(path, classes):
    """The label of an image: the first of the folders in its path that is named like a class; -1 without one."""
    for name in path.parent.parts:
        if name in classes:
            return classes.index(name)
    return -1


def test_images(trained: Classifier, data_dir):
    """(ids, images, labels int64 (N,)) of the test set of a run. images: uint8 (N, C, S, S), or files. Raises
    UserError."""
    folder, name = trained.source, trained.args.data
    if not folder.is_dir():
        raise run.UserError(
            "name image files, or folders of them; or with --run a run folder, whose test set is then predicted"
        )
    local = folder / "local.json"  # where the data of the run were
    where = data_dir = data_dir or (run.read_json(local).get("data_dir") if local.exists() else None)
    if name.startswith("./"):  # a folder of the user's own
        where = name = run.data_place(folder, name)
    if where and not Path(where).is_dir():
        raise run.UserError(f"{folder}: its data is gone from {where}; name the folder of its images")
    family = data.family_of_model(trained.args.model)
    _, _, test_set, facts = data.load(name, data_dir, trained.args.limit, family)
    run.check_dataset(folder, run.read_record(folder / "run.json").get("dataset"), facts)
    if test_set is None:
        raise run.UserError(f"--run {folder}: that data has no test set; name a folder of images")
    if family == "imagenet":
        return test_set.names, test_set.sources, test_set.labels
    return range(len(test_set)), test_set.images, test_set.labels


def read_image(source: Path | bytes, family: str, notes: image_files.Notes | None = None) -> np.ndarray:
    """uint8 (C, S, S): an image in the size that the networks of the family take. notes: takes what was done to it.
    source: a file, or the bytes of one of the built-in images. Raises UserError."""
    if isinstance(source, bytes):
        return np.asarray(folders.center_crop(image_files.open_image(source))).transpose(2, 0, 1)
    if family == "imagenet":
        return image_files.read_image(source, 3, folders.SIZE, notes, crop=lambda image, _: folders.center_crop(image))
    channels, size = (1, 28) if family == "mnist" else (3, 32)
    return image_files.read_image(source, channels, size, notes)


def predict(trained: Classifier, images: Tensor | list[Path]) -> tuple[list[int], Tensor, list[str]]:
    """(rows of the images that could be read, their probabilities float32 (rows, classes), errors of the others).

    images: uint8 (N, C, S, S), or files, which are cropped square and scaled.
    """
    notes = image_files.Notes(Path("photographs"))
    read = partial(read_image, family=data.family_of_model(trained.args.model), notes=notes)
    rows = []
    odds = [torch.zeros(0, len(trained.classes))]
    errors = []
    for first in tqdm(range(0, len(images), CHUNK), "predicting", leave=False, disable=None):
        chunk = images[first : first + CHUNK]
        readable = list(range(len(chunk)))
        if not isinstance(chunk, Tensor):
            readable, chunk, unreadable = photos.read_images(chunk, read)
            errors += unreadable
        if readable:
            odds.append(probabilities(trained, chunk))
        rows += [first + row for row in readable]
    notes.print()
    return rows, torch.cat(odds), errors


def write_predictions(path, ids, predicted, classes, probability):
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["id", "label", "name", "probability"])
    for i, label, p in zip(ids, predicted.tolist(), probability.tolist()):
        writer.writerow([i, label, classes[label], f"{p:.4f}"])
    run.write(path, table.getvalue())


def label_text(name):
    """The name of a class for a figure."""
    return run.plain_text(name if len(name) <= 24 else name[:21] + "...")


def draw_confusion(path, predicted, labels, classes):
    """The confusion matrix: a row for each true class, a column for each predicted one."""
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (labels.numpy(), predicted.numpy()), 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(0.1, (shares - np.diag(np.diag(shares))).max()))
    axes.set(xlabel="predicted", ylabel="truth")
    if len(classes) <= 20:
        names = [label_text(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), names)
        for (i, k), count in np.ndenumerate(counts):
            axes.text(k, i, count, ha="center", va="center", fontsize=7, color="white" if i == k else "black")
    run.write_figure(path, figure)


def draw_mistakes(path, images, predicted, probability, labels, trained, rows=3, columns=8):
    """The wrong predictions of the highest probability, of images whose labels are known (not -1)."""
    wrong = ((predicted != labels) & (labels >= 0)).nonzero().flatten()
    worst = wrong[probability[wrong].argsort(descending=True)][: rows * columns].tolist()
    names = [label_text(name) for name in trained.classes]
    figure = Figure(figsize=(1.15 * columns, 1.5 * rows), layout="constrained")
    for i, axes in zip(worst, figure.subplots(rows, columns).flat):
        axes.imshow(pixels(images[i], trained).permute(1, 2, 0).numpy().squeeze(), cmap="gray", interpolation="nearest")
        axes.set_title(f"{names[predicted[i]]} {probability[i]:.0%}\n(is {names[labels[i]]})", fontsize=7)
    for axes in figure.axes:
        axes.axis("off")
    run.write_figure(path, figure)


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    images: tuple[str, ...] = option(
        (), "image files, or folders of them (default: the test set)", positional=True, nargs="*", metavar="IMAGE"
    )
    run: str | None = option(None, "a run folder or a safetensors file of weights", type=path_arg, metavar="RUN")
    data_dir: str | None = data_dir_option()
    device: str = device_option()
    threads: int | str = threads_option()
    out: str | None = option(
        None,
        "folder of the results (default: out/resnet/predict; for a test set the run folder)",
        type=path_arg,
        metavar="DIR",
    )


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    trained = load(classifiers.find(args.run, EXPERIMENT, COMMITTED), run.pick_device(args.device))
    classifiers.introduce(trained, COMMITTED)
    if args.images:
        images, labels = list_images(args.images, trained.classes)
        ids = [file.as_posix() for file in images]
        out = args.out or ROOT / "out/resnet/predict"
    else:
        ids, images, labels = test_images(trained, args.data_dir)
        out = args.out or trained.source
    out = run.make_folder(out)
    rows, odds, errors = predict(trained, images)
    if not rows:
        photos.raise_errors(errors)

    ids = [ids[row] for row in rows]
    images = [images[row] for row in rows]
    labels = labels[rows]
    probability, predicted = odds.max(1)
    write_predictions(out / "predictions.csv", ids, predicted, trained.classes, probability)
    if args.images:
        show(images, odds, trained, out)
    text, accuracy = f"{len(rows):,} image{'' if len(rows) == 1 else 's'}", None
    known = labels >= 0
    if known.any():
        accuracy = (predicted == labels)[known].float().mean().item()
        text += f", accuracy {accuracy:.2%} of {int(known.sum()):,} labelled"
        draw_confusion(out / "confusion.png", predicted[known], labels[known], trained.classes)
        draw_mistakes(out / "mistakes.png", images, predicted, probability, labels, trained)
    print(f"{text}; {run.display_path(out / 'predictions.csv')}")
    photos.raise_errors(errors)
    return accuracy


def show(files: list[Path], odds: Tensor, trained: Classifier, out: Path):
    """Print what is on photographs, and draw what the network saw of the first ones."""
    for file, row in zip(files, odds):
        print(f"{run.display_path(file)}: {photos.describe(trained.classes, row, UNSURE)}")
    seen = torch.stack([pixels(file, trained) for file in files[: photos.MOST_DRAWN]])
    run.write_figure(out / "seen.png", photos.draw_seen(files, seen, trained.classes, odds, UNSURE))
    print(f"what the network saw: {run.display_path(out / 'seen.png')}")


def pixels(image: Tensor | Path | bytes, trained: Classifier) -> Tensor:
    """uint8 (C, S, S): an image of the test set, or of a file that could be read before."""
    if isinstance(image, Tensor):
        return image
    return torch.tensor(read_image(image, data.family_of_model(trained.args.model)))


if __name__ == "__main__":
    run.cli(main)
