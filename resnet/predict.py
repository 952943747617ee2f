"""Predict with a trained network: the test set, or any folder of images.

    python resnet/predict.py                                                      # test set of the newest finished run
    python resnet/predict.py --run out/resnet/cifar10-resnet20-s0-1               # of this run
    python resnet/predict.py --run out/resnet/cifar10-resnet20-s0-1 --data DIR    # images in DIR, of any size

If DIR has a folder for each class, the labels are known; images directly in DIR have none. Writes into --out:
predictions.csv (id, predicted label, its name and probability), and where labels are known confusion.png and
mistakes.png, the most confident mistakes. The id is the name of the file, or the index in the test set.
"""

import argparse
import csv
import io
from pathlib import Path

from common import image_files, run

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import ImageOps

import data
import folders
import model

EXPERIMENT = Path(__file__).resolve().parent.name


def find_run(name):
    """The run folder `name`, or without a name the newest finished one. Raises UserError."""
    if name:
        return Path(name)
    folder = run.newest_run(EXPERIMENT)
    if folder is None:
        raise run.UserError(f"no finished run in {run.display_path(run.ROOT / 'out' / EXPERIMENT)}; a minute on two "
                            "cores gives one: python resnet/train.py --data mnist")  # fmt: skip
    print(f"the newest finished run: {run.display_path(folder)}")
    return folder


def load_run(folder, device):
    """(network, checkpoint best.pt, arguments) of the run in `folder`. Raises UserError."""
    record = run.read_record(folder / "run.json")
    if record["experiment"] != EXPERIMENT:
        raise run.UserError(f"{folder}: holds a run of {record['experiment']}/")
    args, best = record["args"], run.read_checkpoint(folder / "best.pt", device)
    net = model.build(args["model"], len(best["classes"]), args["shortcut"]).to(device)
    best.load_into(model=net)
    return net.eval(), best, args


def read_images(folder, family, classes):
    """(ids, images uint8 (N, C, S, S), labels int64 (N,), -1 where unknown, names of undecodable files) of a folder."""
    files = sorted(f for f in folder.rglob("*") if folders.is_image(f.name))
    ids, images, labels, undecodable = [], [], [], []
    for file in files:
        try:
            images.append(resize(folders.decode(file), family))
        except image_files.UNREADABLE:
            undecodable.append(str(file.relative_to(folder)))
            continue
        ids.append(file.relative_to(folder).as_posix())
        labels.append(classes.index(file.parent.name) if file.parent.name in classes else -1)
    if not images:
        raise run.UserError(f"{folder}: holds no image that can be decoded")
    return ids, torch.from_numpy(np.stack(images)), torch.tensor(labels), undecodable


def resize(image, family):
    """A PIL image in the size that the networks of the family take: uint8 (C, S, S)."""
    if family == "mnist":
        return np.asarray(ImageOps.fit(image, (28, 28)).convert("L"))[None]
    image = ImageOps.fit(image, (32, 32)) if family == "cifar" else folders.center_crop(image)
    return np.asarray(image).transpose(2, 0, 1)


@torch.no_grad()
def probabilities(net, images, mean, std):
    """uint8 (N, C, S, S) -> softmax of the logits, float32 (N, classes)"""
    device = mean.device
    return torch.cat([net((part.to(device).float() - mean) / std).softmax(1).cpu() for part in images.split(256)])


def write_predictions(path, ids, predicted, classes, probability):
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["id", "label", "name", "probability"])
    for i, label, p in zip(ids, predicted.tolist(), probability.tolist()):
        writer.writerow([i, label, classes[label], f"{p:.4f}"])
    run.write(path, table.getvalue())


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
        names = [run.plain_text(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), names)
        for (i, k), count in np.ndenumerate(counts):
            axes.text(k, i, count, ha="center", va="center", fontsize=7, color="white" if i == k else "black")
    run.write_figure(path, figure)


def draw_mistakes(path, images, predicted, probability, labels, classes, rows=3, columns=8):
    """The wrong predictions of the highest probability."""
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[probability[wrong].argsort(descending=True)][: rows * columns].tolist()
    names = [run.plain_text(name) for name in classes]
    figure = Figure(figsize=(1.15 * columns, 1.5 * rows), layout="constrained")
    for i, axes in zip(worst, figure.subplots(rows, columns).flat):
        axes.imshow(images[i].permute(1, 2, 0).numpy().squeeze(), cmap="gray", interpolation="nearest")
        axes.set_title(f"{names[predicted[i]]} {probability[i]:.0%}\n(is {names[labels[i]]})", fontsize=7)
    for axes in figure.axes:
        axes.axis("off")
    run.write_figure(path, figure)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=run.path_arg, metavar="DIR", help="a run folder (default: the newest finished run)")
    run.add_flags(
        p,
        "data_dir",
        "device",
        data=dict(type=run.path_arg, metavar="DIR", help="folder of images (default: the test set of the run)"),
        out=dict(help="where to write (default: the run folder)"),
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    folder, device = find_run(args.run), run.pick_device(args.device)
    net, best, trained = load_run(folder, device)
    family, classes, undecodable = data.family_of_model(trained["model"]), best["classes"], []
    if args.data:
        if not Path(args.data).is_dir():
            raise run.UserError(f"{args.data}: is no folder of images")
        ids, images, labels, undecodable = read_images(Path(args.data), family, classes)
    elif family == "imagenet":
        raise run.UserError(f"--run {folder}: that data has no test set; name a folder of images with --data")
    else:
        local = folder / "local.json"  # where the run found its data
        data_dir = args.data_dir or (run.read_json(local).get("data_dir") if local.exists() else None)
        test_set = data.load(trained["data"], data_dir, trained["limit"], family)[2]
        ids, images, labels = range(len(test_set)), test_set.images, test_set.labels
    out = run.make_folder(args.out or folder)
    probability, predicted = probabilities(net, images, best["mean"], best["std"]).max(1)
    write_predictions(out / "predictions.csv", ids, predicted, classes, probability)
    for name in undecodable:
        print(f"cannot be decoded: {name}")
    known, accuracy = labels >= 0, None
    text = f"{len(images):,} images" + (f", {len(undecodable)} more not decodable" if undecodable else "")
    if known.any():
        accuracy = (predicted == labels)[known].float().mean().item()
        text += f", accuracy {accuracy:.2%} of {int(known.sum()):,} labelled"
        draw_confusion(out / "confusion.png", predicted[known], labels[known], classes)
        draw_mistakes(out / "mistakes.png", images[known], predicted[known], probability[known], labels[known], classes)
    print(f"{text}; {run.display_path(out / 'predictions.csv')}")
    return accuracy


if __name__ == "__main__":
    run.cli(main)
