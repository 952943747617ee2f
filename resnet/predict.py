"""Predict with a trained network: the test set, or any folder of images.

    python resnet/predict.py                                                      # test set of the newest finished run
    python resnet/predict.py --run out/resnet/cifar10-resnet20-s0-1               # of this run
    python resnet/predict.py --run out/resnet/cifar10-resnet20-s0-1 --data DIR    # images in DIR, of any size

An image below a folder named like a class has this label; images elsewhere in DIR have none. Writes into --out:
predictions.csv (id, predicted label, its name and probability), and if labels are known confusion.png and
mistakes.png, the most confident mistakes. The id is the name of the file, or the index in the test set.
"""

import contextlib
import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from common import image_files, run
from common.options import option
from common.run import data_dir_option, device_option, path_arg, threads_option

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import ImageOps
from torch import Tensor
from tqdm import tqdm

import data
import folders
from trained import EXPERIMENT, load

AUTO_THREADS = 1  # a few images gain nothing from more


def find_run(name):
    """The run folder `name`, or without a name the newest finished one. Raises UserError."""
    if name:
        return Path(name)
    folder = run.newest_run(EXPERIMENT)
    if folder is None:
        raise run.UserError(
            f"no finished run in {run.display_path(run.ROOT / 'out' / EXPERIMENT)}; a minute on two "
            "cores gives one: python resnet/train.py --data mnist"
        )
    print(f"the newest finished run: {run.display_path(folder)}")
    return folder


def list_images(folder, classes):
    """(ids, files, labels int64 (N,), -1 where unknown) of the images in a folder and its sub-folders."""
    files = image_files.list_images(folder)
    paths = [file.relative_to(folder) for file in files]
    labels = [label_of(path, classes) for path in paths]
    return [path.as_posix() for path in paths], files, torch.tensor(labels)


def label_of(path, classes):
    """The label of an image: the first of the folders in its path that is named like a class; -1 without one."""
    for name in path.parent.parts:
        if name in classes:
            return classes.index(name)
    return -1


def test_images(folder, args, data_dir, family):
    """(ids, sources, labels int64 (N,)) of the test set of the run in `folder`. Raises UserError."""
    file, name = folder / "local.json", args.data  # the path of the run's data
    local = run.read_json(file) if file.exists() else {}
    where = data_dir = data_dir or local.get("data_dir")
    if name.startswith("./"):  # a folder of the user's own
        where = name = run.data_place(folder, name)
    if not (where is None or os.path.isdir(str(where))):
        raise run.UserError(f"{folder}: its data is gone from {where}; name a folder of images with --data")
    test_set = data.load(name, data_dir, args.limit, family)[2]
    if test_set is None:
        raise run.UserError(f"--run {folder}: that data has no test set; name a folder of images with --data")
    if family == "imagenet":
        return test_set.names, test_set.sources, test_set.labels
    return range(len(test_set)), test_set.images, test_set.labels


def resize(image, family):
    """A PIL image in the size that the networks of the family take: uint8 (C, S, S)."""
    if family == "mnist":
        return np.asarray(ImageOps.fit(image, (28, 28)).convert("L"))[None]
    image = ImageOps.fit(image, (32, 32)) if family == "cifar" else folders.center_crop(image)
    return np.asarray(image).transpose(2, 0, 1)


def pixels(source, family, notes=None):
    """uint8 (C, S, S): an image of the test set, or one from a file. notes: takes what was done to it. Raises
    image_files.UNREADABLE."""
    if isinstance(source, Tensor):
        return source
    image, remarks = image_files.decode(source)
    if notes:
        notes.remark(remarks, Path(source).name)
    return torch.tensor(resize(image, family))


@torch.no_grad()
def predict(net, sources, family, mean, std, notes=None):
    """(rows of the images that can be decoded, softmax of their logits as float32 (rows, classes)). notes: takes what
    was done to images. Raises UserError if none can be decoded."""
    rows, probabilities = [], []
    for part in tqdm(torch.arange(len(sources)).split(256), "predicting", leave=False, disable=None):
        images = {}
        for i in part.tolist():
            with contextlib.suppress(*image_files.UNREADABLE):
                images[i] = pixels(sources[i], family, notes)
        if images:
            batch = torch.stack(list(images.values())).to(mean.device).float()
            probabilities.append(net((batch - mean) / std).softmax(1).cpu())
            rows += images
    if notes:
        notes.print()
    if not rows:
        raise run.UserError(f"{sources[0]}: cannot be decoded, nor can any other of the {len(sources):,} images")
    return torch.tensor(rows), torch.cat(probabilities)


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


def draw_mistakes(path, image, predicted, probability, labels, classes, rows=3, columns=8):
    """The wrong predictions of the highest probability. image(i): the pixels of row i, uint8 (C, S, S)."""
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[probability[wrong].argsort(descending=True)][: rows * columns].tolist()
    names = [label_text(name) for name in classes]
    figure = Figure(figsize=(1.15 * columns, 1.5 * rows), layout="constrained")
    for i, axes in zip(worst, figure.subplots(rows, columns).flat):
        axes.imshow(image(i).permute(1, 2, 0).numpy().squeeze(), cmap="gray", interpolation="nearest")
        axes.set_title(f"{names[predicted[i]]} {probability[i]:.0%}\n(is {names[labels[i]]})", fontsize=7)
    for axes in figure.axes:
        axes.axis("off")
    run.write_figure(path, figure)


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    run: str | None = option(None, "a run folder (default: the newest finished run)", type=path_arg, metavar="DIR")
    data: str | None = option(None, "folder of images (default: the test set of the run)", type=path_arg, metavar="DIR")
    data_dir: str | None = data_dir_option()
    device: str = device_option()
    threads: int | str = threads_option()
    out: str | None = option(None, "folder of the results (default: the run folder)", type=path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(args.threads, AUTO_THREADS)
    folder = find_run(args.run)
    trained = load(folder, run.pick_device(args.device))
    classes = trained.classes
    family = data.family_of_model(trained.args.model)
    if args.data:
        if not Path(args.data).is_dir():
            raise run.UserError(f"{args.data}: is not a folder of images")
        ids, sources, labels = list_images(Path(args.data), classes)
    else:
        ids, sources, labels = test_images(folder, trained.args, args.data_dir, family)
    out = run.make_folder(args.out or folder)
    notes = image_files.Notes(Path(args.data)) if args.data else None
    rows, probability = predict(trained.net, sources, family, trained.mean, trained.std, notes)
    (probability, predicted), labels = probability.max(1), labels[rows]
    write_predictions(out / "predictions.csv", [ids[i] for i in rows], predicted, classes, probability)
    undecodable = sorted(set(range(len(sources))) - set(rows.tolist()))
    for i in undecodable:
        print(f"cannot be decoded: {ids[i]}")
    known, accuracy = labels >= 0, None
    text = f"{len(rows):,} images" + (f", {len(undecodable)} more not decodable" if undecodable else "")
    if known.any():
        accuracy = (predicted == labels)[known].float().mean().item()
        text += f", accuracy {accuracy:.2%} of {int(known.sum()):,} labelled"
        draw_confusion(out / "confusion.png", predicted[known], labels[known], classes)
        draw_mistakes(
            out / "mistakes.png",
            lambda i: pixels(sources[rows[known][i]], family),
            predicted[known],
            probability[known],
            labels[known],
            classes,
        )
    print(f"{text}; {run.display_path(out / 'predictions.csv')}")
    return accuracy


if __name__ == "__main__":
    run.cli(main)
