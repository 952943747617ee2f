"""Load a trained network from a run folder or from the committed weights, and call it on images.

    python cifar/trained.py RUN         # write the weights of a run to weights/simplenn.safetensors, in bfloat16

With no run named, predict.py takes the newest finished run, else these weights, and says which.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.calibration import calibration_error, unsure_shares
from common.options import option
from common.run import data_dir_option, path_arg

import torch
from torch import Tensor, nn

import data
import train

COMMITTED = Path(__file__).resolve().parent / "weights" / "simplenn.safetensors"
UNSURE = 0.5  # below this probability a prediction is called unsure
FACTS = ("experiment", "args", "git", "dataset")  # of a run, in the header of its committed weights


class Trained(NamedTuple):
    """A network in evaluation mode, the names of its classes, the mean and standard deviation of its training images,
    (1, 3, 1, 1) each, in units of pixel values, the temperature of its logits, and its accuracy on test images."""

    net: nn.Module
    classes: list[str]
    mean: Tensor
    std: Tensor
    temperature: float
    accuracy: float
    source: Path


@torch.no_grad()
def probabilities(trained: Trained, images: Tensor) -> Tensor:
    """float32 (N, classes): the calibrated probabilities of images uint8 (N, 3, 32, 32)."""
    logits, _ = trained.net((images.float() - trained.mean) / trained.std)
    return (logits / trained.temperature).softmax(1)


def build(record: dict, state: dict, facts: dict, source: Path) -> Trained:
    """The network of a record of a run, with the weights `state`. facts: classes, mean, std, temperature and
    test_accuracy. Raises UserError."""
    if record.get("experiment") != "cifar":
        raise run.UserError(f"{source}: holds a run of {record.get('experiment')}/")
    args = run.recorded_options(train.Options, record, source)
    try:
        classes = [str(name) for name in facts["classes"]]
        mean, std = (torch.as_tensor(facts[name]).float().view(1, 3, 1, 1) for name in ("mean", "std"))
        temperature = float(facts["temperature"])
        accuracy = float(facts["test_accuracy"])
        if not (len(classes) > 1 and 0 < temperature < math.inf and (std > 0).all()):
            raise ValueError("no classes, temperature or standard deviation")
        net = run.make_without_memory(lambda: train.build_model(args, len(classes)))
        net.load_state_dict({name: as_float(value) for name, value in state.items()}, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise run.UserError(f"{source}: holds no network of this folder ({reason:.100})") from error
    run.check_weights(net, source)
    return Trained(net.eval(), classes, mean, std, temperature, accuracy, source)


def as_float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def load(where: str | Path) -> Trained:
    """The network of the run folder or safetensors file `where`. Raises UserError."""
    path = Path(where)
    if path.suffix == ".safetensors" and not path.is_dir():
        state, header = run.read_safetensors(path)
        try:
            facts = json.loads(header["facts"])
            return build(facts, state, facts, path)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise run.UserError(f"{path}: holds no network of this folder (its header has no facts)") from error
    record = run.read_record(path / "run.json")
    best = run.read_checkpoint(path / "best.pt")
    final = record.get("final") or {}
    facts = {"temperature": final.get("temperature", 1.0), "test_accuracy": final.get("test_accuracy", math.nan)}
    facts |= {name: best[name] for name in ("classes", "mean", "std")}
    return build(record, best["model"], facts, path)


def load_newest() -> Trained:
    """The network of the newest finished run, else the committed one; a line on standard error says which."""
    path = run.newest_run("cifar") or COMMITTED
    print(f"with the network in {run.display_path(path)}", file=sys.stderr)
    if path == COMMITTED and not path.exists():
        raise run.UserError(f"{path}: is missing; train one: python cifar/train.py --model simplenn --recipe best")
    return load(path)


def save(folder: Path, target: Path, data_dir: str | None):
    """Write the best checkpoint of the finished run in `folder` as bfloat16, with how sure it is on the test set."""
    record = run.read_record(folder / "run.json")
    if record["state"] != "done":
        raise run.UserError(f"{folder}: has not finished; continue it: python cifar/train.py --resume {folder}")
    trained = load(folder)
    args = run.recorded_options(train.Options, record, folder / "run.json")
    _, val_set, test_set, _ = data.load(args.data, data_dir, args.limit)
    val, test = (
        torch.cat([probabilities(trained, images) for images in part.images.split(1000)])
        for part in (val_set, test_set)
    )
    facts = {name: record[name] for name in FACTS} | {
        "classes": trained.classes,
        "mean": trained.mean.flatten().tolist(),
        "std": trained.std.flatten().tolist(),
        "temperature": trained.temperature,
        "test_accuracy": trained.accuracy,
        "val_calibration_error": calibration_error(val, val_set.labels),
        "test_calibration_error": calibration_error(test, test_set.labels),
        "unsure_below": UNSURE,
        "unsure": unsure_shares(test, test_set.labels, UNSURE),
    }
    run.make_folder(target.parent)
    run.write_safetensors(target, trained.net.state_dict(), {"facts": json.dumps(facts)})
    print(f"{run.display_path(target)}: {target.stat().st_size:,} bytes; {facts['unsure']} of predictions are unsure")


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    run: str = option("", "a run folder", type=path_arg, metavar="RUN", positional=True)
    out: str = option(str(COMMITTED), "the safetensors file", type=path_arg, metavar="FILE")
    data_dir: str | None = data_dir_option()


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(auto_threads=1)
    save(Path(args.run), Path(args.out), args.data_dir)


if __name__ == "__main__":
    run.cli(main)
