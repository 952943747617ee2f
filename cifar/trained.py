"""Load a trained network from a run folder, and call it on images."""

from pathlib import Path
from typing import NamedTuple

from common import run

from torch import Tensor, nn

import train


class Trained(NamedTuple):
    """A network in evaluation mode, the names of its classes, and the mean and standard deviation of its training
    images, (1, 3, 1, 1) each, in units of pixel values."""

    net: nn.Module
    classes: list[str]
    mean: Tensor
    std: Tensor


def load(folder: str | Path) -> Trained:
    """The best checkpoint of the run in `folder`. Raises UserError."""
    folder = Path(folder)
    record = run.read_record(folder / "run.json")
    if record["experiment"] != "cifar":
        raise run.UserError(f"{folder}: holds a run of {record['experiment']}/")
    args = run.recorded_options(train.Options, record, folder / "run.json")
    best = run.read_checkpoint(folder / "best.pt")
    net = train.build_model(args, len(best["classes"]))
    best.load_into(model=net)
    run.check_weights(net, best.path)
    return Trained(net.eval(), best["classes"], best["mean"], best["std"])
