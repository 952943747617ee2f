"""Predict with a trained network: the test set, or any folder of pictures.

    python resnet/predict.py --run out/resnet/cifar10-resnet20-s0-1               # the test set of the run's data
    python resnet/predict.py --run out/resnet/cifar10-resnet20-s0-1 --data DIR    # pictures in DIR, of any size

With a folder a class in DIR the labels are known; pictures directly in DIR have none. Writes into --out:
predictions.csv (id, label, name, probability: the class predicted), and where labels are known confusion.png and
mistakes.png, the most confident errors. An id is a file's name, or of the test set the place in the order of data.py.
"""

import argparse
import csv
import io
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import data
import folders
import model
import run
from run import UserError


def load_run(folder, device):
    """(network, what best.pt holds beside it, arguments of the run) of the run in `folder`. Raises UserError."""
    try:
        args = json.loads((folder / "run.json").read_text(encoding="utf-8"))["args"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: holds no run of train.py ({error})") from None
    if not (folder / "best.pt").exists():
        raise UserError(f"{folder}: has no best.pt yet; it comes with the first epoch")
    best = run.read_checkpoint(folder / "best.pt", device)
    if not args.keys() >= {"model", "shortcut"} or not best.keys() >= {"classes", "mean", "std"}:
        raise UserError(f"{folder}: holds a run of another experiment")
    net = model.build(args["model"], len(best["classes"]), args["shortcut"]).to(device)
    run.restore(net, best["model"], folder / "best.pt")
    return net.eval(), best, args


def pictures_in(folder, kind, classes):
    """(ids, images uint8 (N, C, S, S), labels int64 (N,), -1 where unknown, names of undecodable files) of a folder."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in folders.ENDINGS and not f.name.startswith("."))
    ids, images, labels, bad = [], [], [], []
    for file in files:
        try:
            images.append(fit(folders.decode(file), kind))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            bad.append(str(file.relative_to(folder)))
            continue
        ids.append(file.relative_to(folder).as_posix())
        labels.append(classes.index(file.parent.name) if file.parent.name in classes else -1)
    if not images:
        raise UserError(f"{folder}: holds no picture that can be decoded")
    return ids, torch.from_numpy(np.stack(images)), torch.tensor(labels), bad


def fit(picture, kind):
    """A PIL picture as the networks of that kind want it: uint8 (C, S, S)."""
    if kind == "mnist":
        return np.asarray(ImageOps.fit(picture, (28, 28)).convert("L"))[None]
    picture = ImageOps.fit(picture, (32, 32)) if kind == "cifar" else folders.center_crop(picture)
    return np.asarray(picture).transpose(2, 0, 1)


@torch.no_grad()
def probabilities(net, images, mean, std):
    """uint8 (N, C, S, S) -> softmax of the logits, float32 (N, classes)"""
    device = mean.device
    return torch.cat([net((part.to(device).float() - mean) / std).softmax(1).cpu() for part in images.split(256)])


def write_predictions(path, ids, chosen, classes, certainty):
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["id", "label", "name", "probability"])
    for row in zip(ids, chosen.tolist(), (classes[k] for k in chosen), certainty.tolist()):
        writer.writerow([*row[:3], f"{row[3]:.4f}"])
    run.write(path, table.getvalue())


def draw_confusion(path, chosen, labels, classes):
    """How often each class was taken for each other one: rows are the truth."""
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (labels.numpy(), chosen.numpy()), 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(0.1, (shares - np.diag(np.diag(shares))).max()))
    axes.set(xlabel="predicted", ylabel="truth")
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for (i, k), count in np.ndenumerate(counts):
            axes.text(k, i, count, ha="center", va="center", fontsize=7, color="white" if i == k else "black")
    run.write_figure(path, figure)


def draw_mistakes(path, images, chosen, certainty, labels, classes, rows=3, columns=8):
    """The wrong predictions that the network was most certain of."""
    wrong = (chosen != labels).nonzero().flatten()
    worst = wrong[certainty[wrong].argsort(descending=True)][: rows * columns].tolist()
    figure = Figure(figsize=(1.15 * columns, 1.5 * rows), layout="constrained")
    for i, axes in zip(worst, figure.subplots(rows, columns).flat):
        axes.imshow(images[i].permute(1, 2, 0).numpy().squeeze(), cmap="gray", interpolation="nearest")
        axes.set_title(f"{classes[chosen[i]]} {certainty[i]:.0%}\n(is {classes[labels[i]]})", fontsize=7)
    for axes in figure.axes:
        axes.axis("off")
    run.write_figure(path, figure)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True, metavar="DIR", help="the run folder of train.py that holds best.pt")
    run.add_flags(
        p,
        "data_dir",
        "device",
        data=dict(metavar="DIR", help="pictures (default: the run's test set)"),
        out=dict(help="where to (default: the run folder)"),
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    folder, device = Path(args.run), run.pick_device(args.device)
    net, best, told = load_run(folder, device)
    kind, classes, bad = data.family_of_model(told["model"]), best["classes"], []
    if args.data:
        if not Path(args.data).is_dir():
            raise UserError(f"{args.data}: is no folder of pictures")
        ids, images, labels, bad = pictures_in(Path(args.data), kind, classes)
    elif kind == "imagenet":
        raise UserError(f"--run {folder}: that data has no test set; name a folder of pictures with --data")
    else:
        test_set = data.load(told["data"], args.data_dir, told["limit"], kind)[2]
        ids, images, labels = range(len(test_set)), test_set.images, test_set.labels
    out = run.make_folder(args.out or folder)
    certainty, chosen = probabilities(net, images, best["mean"], best["std"]).max(1)
    write_predictions(out / "predictions.csv", ids, chosen, classes, certainty)
    for name in bad:
        print(f"cannot be decoded: {name}")
    known = labels >= 0
    accuracy = (chosen == labels)[known].float().mean().item() if known.any() else None
    if known.any():
        draw_confusion(out / "confusion.png", chosen[known], labels[known], classes)
        draw_mistakes(out / "mistakes.png", images[known], chosen[known], certainty[known], labels[known], classes)
    print(
        f"{len(images):,} pictures"
        + (f", {len(bad)} more not decodable" if bad else "")
        + (f", accuracy {accuracy:.2%} of {int(known.sum()):,} labelled" if known.any() else ", no labels")
        + f"; {run.shown(out / 'predictions.csv')}"
    )
    return accuracy


if __name__ == "__main__":
    run.cli(main)
