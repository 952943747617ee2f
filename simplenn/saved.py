"""Trained networks: from a run folder, or from the weights that are committed.

    python simplenn/saved.py RUN                 # write the weights of a run to weights/cnn.safetensors, in bfloat16

RUN is a run folder or a safetensors file, whose temperature is fitted again on the validation images of its dataset.
With no run named, the scripts take the newest finished run on images, else weights/cnn.safetensors, and say which.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from common import run
from common.arguments import ScriptOptions, data_dir_option, parse_options, path_arg
from common.calibration import fit_temperature
from common.options import option

import torch
from torch import Tensor

import data
import train

COMMITTED = Path(__file__).resolve().parent / "weights" / "cnn.safetensors"


class Model(NamedTuple):
    """A network in evaluation mode, its class names, the mean and standard deviation of its training images, whether
    these were digits prepared as MNIST's, the temperature of its logits, and where it comes from."""

    net: torch.nn.Module
    classes: list[str]
    mean: float
    std: float
    as_mnist: bool
    temperature: float
    source: Path


@torch.no_grad()
def logits_of(model: Model, images: Tensor) -> Tensor:
    """float32 (N, classes): the logits of images uint8 (N, 1, 28, 28)."""
    parts = [model.net((part.float() - model.mean) / model.std) for part in images.split(1000)]
    return torch.cat(parts)


def probabilities(model: Model, images: Tensor) -> Tensor:
    """float32 (N, classes): the calibrated probabilities of images uint8 (N, 1, 28, 28)."""
    return (logits_of(model, images) / model.temperature).softmax(1)


def build(facts: dict, state: dict, source) -> Model:
    """The network that `facts` describe, with the parameters `state`. Raises UserError."""
    try:
        if facts["args"]["data"] in data.FUNCTIONS:
            raise ValueError("it was trained on a function")
        record = facts | {"args": facts["args"] | {"data": "builtin"}}  # its data need not be there any more
        args, classes = run.recorded_options(train.Options, record, source), list(map(str, facts["classes"]))
        # without memory: that which a damaged file describes may need any amount
        net = run.make_without_memory(lambda: train.build_model(args, SimpleNamespace(classes=classes)))
        net.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in state.items()}, assign=True
        )
        mean, std = (float(facts["normalization"][name]) for name in ("mean", "std"))
        temperature = float((facts.get("final") or facts).get("temperature", 1.0))  # a run may be older than it
        if not (len(classes) > 1 and std > 0 and math.isfinite(mean) and 0 < temperature < math.inf):
            raise ValueError("no classes, mean, standard deviation or temperature")
        place = run.data_place(source, facts["args"]["data"])
        as_mnist = bool(facts["normalization"].get("as_mnist", data.as_mnist(place)))  # a run may be older than it
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise run.UserError(f"{source}: holds no network for images of this folder ({reason:.100})") from error
    run.check_weights(net, source)
    return Model(net.eval(), classes, mean, std, as_mnist, temperature, source)


def newest_run() -> Path | None:
    """The newest finished run that was trained on images."""
    return run.newest_run("simplenn", lambda record: record.get("normalization"))


def open_model(where: str | None = None) -> Model:
    """The network of the run folder or safetensors file `where`; see the top of this file. Raises UserError."""
    path = Path(where) if where else newest_run() or COMMITTED
    if not where:
        print(f"with the network in {run.display_path(path)}; a run of your own: --run RUN", file=sys.stderr)
    return build(*read(path), path)


def read(path: Path) -> tuple[dict, dict]:
    """(the facts, the parameters) in a run folder or safetensors file. Raises UserError."""
    if path.is_dir():
        record = run.read_record(path / "run.json")
        return record, run.read_checkpoint(path / "best.pt")["model"]
    if path == COMMITTED and not path.exists():
        raise run.UserError(f"{path}: is missing; train one: python simplenn/train.py --model cnn --recipe best")
    state, header = run.read_safetensors(path)
    try:
        return json.loads(header.get("facts", "{}")), state
    except ValueError as error:
        raise run.UserError(f"{path}: holds no network of this folder (its header is not JSON)") from error


def load(where: str | Path) -> Model:
    """The network of the run folder or safetensors file `where`. Raises UserError."""
    return open_model(str(where))


def save(source: Path, target: Path, data_dir: str | None = None):
    """Write the network in a run folder or safetensors file as bfloat16, with its temperature. Raises UserError."""
    facts, state = read(source)
    model = build(facts, state, source)
    if facts.get("state", "done") != "done":
        raise run.UserError(f"{source}: has not finished; continue it: python simplenn/train.py --resume {source}")
    args = facts["args"]
    _, val_set, _, found = data.load(run.data_place(source, args["data"]), data_dir, args.get("limit"))
    run.check_dataset(source, facts.get("dataset"), found)
    kept = {
        "args": args,
        "classes": model.classes,
        "normalization": facts["normalization"],
        "git": facts.get("git"),
        "test_accuracy": (facts.get("final") or facts).get("test_accuracy"),
        "temperature": fit_temperature(logits_of(model, val_set.images), val_set.labels),
    }
    run.make_folder(target.parent)
    run.write_safetensors(target, state, {"facts": json.dumps(kept)})
    print(f"{run.display_path(target)}: {target.stat().st_size:,} bytes, temperature {kept['temperature']:.3f}")


@dataclass(kw_only=True)
class Options(ScriptOptions):
    run: str = option("", "a run folder or safetensors file", type=path_arg, metavar="RUN", positional=True)
    out: str = option(str(COMMITTED), "the safetensors file", type=path_arg, metavar="FILE")
    data_dir: str | None = data_dir_option()


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    save(Path(args.run), Path(args.out), args.data_dir)


if __name__ == "__main__":
    run.cli(main)
