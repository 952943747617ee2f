"""Load a trained network from a run folder or from the committed weights, and call it on images.

    python resnet/trained.py RUN         # write the weights of a run to weights/resnet20.safetensors, in bfloat16

With no run named, predict.py takes the newest finished run, else these weights, and says which.
"""

from dataclasses import dataclass
from pathlib import Path

from common import classifiers, run
from common.classifiers import Classifier
from common.options import option
from common.run import data_dir_option, path_arg

import torch
from torch import Tensor

import airbench
import data
import model
import train

EXPERIMENT = Path(__file__).resolve().parent.name
COMMITTED = Path(__file__).resolve().parent / "weights" / "resnet20.safetensors"


def load(where: str | Path, device="cpu") -> Classifier:
    """The network of the run folder or safetensors file `where`. Raises UserError."""
    scripts = {"train.py": (train.Options, build_model), "airbench.py": (airbench.Options, build_airbench)}
    return classifiers.load(where, EXPERIMENT, scripts, device)


def build_model(args, num_classes: int):
    return model.build(args.model, num_classes, args.shortcut)


def build_airbench(args, num_classes: int):
    return airbench.Network(num_classes, args.width)


@torch.no_grad()
def compute_logits(trained: Classifier, images: Tensor) -> Tensor:
    """float32 (N, classes) on the CPU, of images uint8 (N, C, S, S)."""
    parts = []
    for part in images.split(256):
        pixels = part.to(trained.mean.device).float()
        parts.append(trained.net((pixels - trained.mean) / trained.std).cpu())
    return torch.cat(parts)


def probabilities(trained: Classifier, images: Tensor) -> Tensor:
    """float32 (N, classes): the calibrated probabilities of images uint8 (N, C, S, S)."""
    return classifiers.calibrated(trained, compute_logits(trained, images))


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    run: str = option("", "a run folder", type=path_arg, metavar="RUN", positional=True)
    out: str = option(str(COMMITTED), "the safetensors file", type=path_arg, metavar="FILE")
    data_dir: str | None = data_dir_option()


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(auto_threads=1)
    trained = classifiers.in_bfloat16(load(args.run))
    if isinstance(trained.args, airbench.Options):
        raise run.UserError(f"{args.run}: is a run of airbench.py; only those of train.py are calibrated and written")
    family = data.family_of_model(trained.args.model)
    if family == "imagenet":
        raise run.UserError(f"{args.run}: {trained.args.model} is too large for a small file")
    name = run.data_place(trained.source, trained.args.data)
    _, val_set, test_set, facts = data.load(name, args.data_dir, trained.args.limit, family)
    run.check_dataset(trained.source, run.read_record(trained.source / "run.json").get("dataset"), facts)
    val, test = ((compute_logits(trained, part.images), part.labels) for part in (val_set, test_set))
    classifiers.write(Path(args.out), trained, val, test)


if __name__ == "__main__":
    run.cli(main)
