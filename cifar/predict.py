"""Say what is on photographs: the likeliest classes of each, and a figure of what the network saw.

    python cifar/predict.py photo.jpg pictures/              # files, and folders of images
    python cifar/predict.py photo.jpg --run out/cifar/RUN    # with a run of your own, and its classes

Without --run: the newest finished run, else weights/simplenn.safetensors. Each image is cropped square and scaled to
32 x 32 pixels, as in training. Probabilities are calibrated on validation images; below 50% the network is unsure.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import classifiers, image_files, photos, run
from common.classifiers import UNSURE
from common.options import option
from common.run import ROOT, path_arg

import data
import trained as trained_networks
from trained import COMMITTED, EXPERIMENT


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    images: tuple[str, ...] = option((), "image files, or folders of them", positional=True, nargs="+", metavar="IMAGE")
    run: str | None = option(None, "a run folder or a safetensors file of weights", type=path_arg, metavar="RUN")
    out: str = option(str(ROOT / "out/cifar/predict"), "folder of seen.png", type=path_arg, metavar="DIR")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(auto_threads=1)
    network = trained_networks.load(classifiers.find(args.run, EXPERIMENT, COMMITTED))
    classifiers.introduce(network, COMMITTED)
    files = photos.list_images(args.images)
    notes = image_files.Notes(Path("photographs"))
    read = partial(image_files.read_image, channels=3, size=data.SIZE, notes=notes)
    rows, images, errors = photos.read_images(files, read)
    notes.print()
    if not rows:
        photos.raise_errors(errors)
    odds = trained_networks.probabilities(network, images)
    seen = [files[row] for row in rows]
    for file, row in zip(seen, odds):
        print(f"{run.display_path(file)}: {photos.describe(network.classes, row, UNSURE)}")
    out = run.make_folder(args.out)
    run.write_figure(out / "seen.png", photos.draw_seen(seen, images, network.classes, odds, UNSURE))
    print(f"what the network saw: {run.display_path(out / 'seen.png')}")
    photos.raise_errors(errors)
    return odds


if __name__ == "__main__":
    run.cli(main)
