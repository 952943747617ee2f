"""Say what is on photographs: the likeliest classes of each, and a figure of what the network saw.

    python cifar/predict.py photo.jpg pictures/              # files, and folders of images
    python cifar/predict.py photo.jpg --run out/cifar/RUN    # with a run of your own, and its classes

Without --run: the newest finished run, else weights/simplenn.safetensors if trained.py has written it. Each image is
cropped square and scaled to 32 x 32 pixels, as in training. Probabilities are calibrated on validation images; below
50% the network is unsure.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from common import image_files, run
from common.options import option
from common.run import ROOT, path_arg

import numpy as np
import torch
from torch import Tensor

import data
import trained as trained_networks
from trained import UNSURE, Trained

LIKELIEST = 5  # classes that are shown
MOST_DRAWN = 24  # images in the figure


def list_images(places: tuple[str, ...]) -> list[Path]:
    """The image files that `places` name: files, and those in folders. Raises UserError."""
    files = []
    for place in map(Path, places):
        files += image_files.list_images(place) if place.is_dir() else [place]
    return files


def read_images(files: list[Path]) -> tuple[list[Path], Tensor, list[str]]:
    """(files that could be read, their images uint8 (N, 3, 32, 32), errors of the others)."""
    readable = []
    images = []
    errors = []
    for file in files:
        try:
            images.append(image_files.read_image(file, 3, data.SIZE))
            readable.append(file)
        except run.UserError as error:
            errors.append(str(error))
    if not images:
        return [], torch.zeros(0, 3, data.SIZE, data.SIZE, dtype=torch.uint8), errors
    return readable, torch.from_numpy(np.stack(images)), errors


def describe(network: Trained, odds: Tensor) -> str:
    """The likeliest classes of an image in words. odds: (classes,)."""
    best = odds.argsort(descending=True)[:LIKELIEST].tolist()
    words = ", ".join(f"{run.printable(network.classes[i].replace('_', ' '))} {odds[i]:.0%}" for i in best)
    return words if odds.max() >= UNSURE else f"unsure: {words}"


def draw_seen(network: Trained, files: list[Path], images: Tensor, odds: Tensor):
    """A figure of the images as the network saw them, each beside bars of its likeliest classes."""
    from matplotlib.figure import Figure

    count = min(len(files), MOST_DRAWN)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * columns, 1.9 * rows), layout="constrained")
    for i, part in enumerate(figure.subfigures(rows, columns, squeeze=False).flat):
        if i == count:
            break
        left, right = part.subplots(1, 2)
        left.imshow(images[i].permute(1, 2, 0).numpy(), interpolation="nearest")
        left.axis("off")
        left.set_title(run.plain_text(files[i].name[-28:]), fontsize=8)
        best = odds[i].argsort(descending=True)[:LIKELIEST]
        names = [run.plain_text(network.classes[k].replace("_", " ")[:16]) for k in best]
        sure = odds[i].max() >= UNSURE
        right.barh(range(len(names)), odds[i][best].numpy(), color="tab:blue" if sure else "tab:gray")
        right.set_yticks(range(len(names)), names)  # long names may be equal where they are cut
        right.invert_yaxis()
        right.set(xlim=(0, 1), xticks=(0, 0.5, 1), xticklabels=("0", "50%", "100%"))
        right.set_title("" if sure else "unsure", fontsize=8)
        right.tick_params(labelsize=7)
    return figure


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    images: tuple[str, ...] = option((), "image files, or folders of them", positional=True, nargs="+", metavar="IMAGE")
    run: str | None = option(None, "a run folder or a safetensors file of weights", type=path_arg, metavar="RUN")
    out: str = option(str(ROOT / "out/cifar/predict"), "folder of seen.png", type=path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(auto_threads=1)
    network = trained_networks.load(args.run) if args.run else trained_networks.load_newest()
    files, images, errors = read_images(list_images(args.images))
    odds = trained_networks.probabilities(network, images) if files else torch.zeros(0, len(network.classes))
    if not odds.isfinite().all():
        raise run.UserError(f"{network.source}: is damaged: its predictions are not finite numbers")
    for file, row in zip(files, odds):
        print(f"{run.display_path(file)}: {describe(network, row)}")
    if files:
        out = run.make_folder(args.out)
        run.write_figure(out / "seen.png", draw_seen(network, files, images, odds))
        print(f"what the network saw: {run.display_path(out / 'seen.png')}")
    for line in errors[:-1]:
        print(f"error: {line}", file=sys.stderr)
    if errors:
        raise run.UserError(errors[-1])
    return odds


if __name__ == "__main__":
    run.cli(main)
