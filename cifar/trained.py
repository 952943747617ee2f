"""Load a trained network from a run folder or from the committed weights, and call it on images.

    python cifar/trained.py RUN         # write the weights of a run to weights/simplenn.safetensors, in bfloat16

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

import data
import train

EXPERIMENT = Path(__file__).resolve().parent.name
COMMITTED = Path(__file__).resolve().parent / "weights" / "simplenn.safetensors"


def load(where: str | Path) -> Classifier:
    """The network of the run folder or safetensors file `where`. Raises UserError."""
    return classifiers.load(where, EXPERIMENT, {"train.py": (train.Options, train.build_model)})


@torch.no_grad()
def compute_logits(trained: Classifier, images: Tensor) -> Tensor:
    """float32 (N, classes), of images uint8 (N, 3, 32, 32)."""
    parts = []
    for part in images.split(1000):
        logits, _ = trained.net((part.float() - trained.mean) / trained.std)
        parts.append(logits)
    return torch.cat(parts)


def probabilities(trained: Classifier, images: Tensor) -> Tensor:
    """float32 (N, classes): the calibrated probabilities of images uint8 (N, 3, 32, 32)."""
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
    name = run.data_place(trained.source, trained.args.data)
    _, val_set, test_set, facts = data.load(name, args.data_dir, trained.args.limit)
    run.check_dataset(trained.source, run.read_record(trained.source / "run.json").get("dataset"), facts)
    val, test = ((compute_logits(trained, part.images), part.labels) for part in (val_set, test_set))
    classifiers.write(Path(args.out), trained, val, test)


if __name__ == "__main__":
    run.cli(main)
