"""Load a trained network from a run folder, and call it on images."""

from pathlib import Path
from typing import NamedTuple

from common import run

from torch import Tensor, nn

import model
import train

EXPERIMENT = Path(__file__).resolve().parent.name


class Trained(NamedTuple):
    """A network in evaluation mode, the names of its classes, the mean and standard deviation of its training images,
    (1, C, 1, 1) each, in units of pixel values, and the options of its run."""

    net: nn.Module
    classes: list[str]
    mean: Tensor
    std: Tensor
    args: train.Options


def load(folder: str | Path, device="cpu") -> Trained:
    """The best checkpoint of the run in `folder`. Raises UserError."""
    folder = Path(folder)
    record = run.read_record(folder / "run.json")
    if record["experiment"] != EXPERIMENT:
        raise run.UserError(f"{folder}: holds a run of {record['experiment']}/")
    args = run.recorded_options(train.Options, record, folder / "run.json")
    best = run.read_checkpoint(folder / "best.pt", device)
    if not isinstance(best["classes"], list) or not all(isinstance(best[name], Tensor) for name in ("mean", "std")):
        raise run.UserError(f"{best.path}: is not a checkpoint of this experiment: invalid classes, mean or std")
    net = model.build(args.model, len(best["classes"]), args.shortcut).to(device)
    best.load_into(model=net)
    run.check_weights(net, best.path)
    return Trained(net.eval(), best["classes"], best["mean"], best["std"], args)
