"""Trained networks: from a run folder, or from the weights that are committed.

    python simplenn/saved.py RUN                 # write the weights of a run to weights/cnn.safetensors, in bfloat16

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
from common.arguments import ScriptOptions, parse_options, path_arg
from common.options import option

import torch

import data
import train

COMMITTED = Path(__file__).resolve().parent / "weights" / "cnn.safetensors"


class Model(NamedTuple):
    """A network in evaluation mode, its class names, the mean and standard deviation of its training images, whether
    these were digits prepared as MNIST's, and where it comes from."""

    net: torch.nn.Module
    classes: list[str]
    mean: float
    std: float
    as_mnist: bool
    source: Path


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
        if not (len(classes) > 1 and std > 0 and math.isfinite(mean)):
            raise ValueError("no classes, mean or standard deviation")
        place = run.data_place(source, facts["args"]["data"])
        as_mnist = bool(facts["normalization"].get("as_mnist", data.as_mnist(place)))  # a run may be older than it
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise run.UserError(f"{source}: holds no network for images of this folder ({reason:.100})") from error
    run.check_weights(net, source)
    return Model(net.eval(), classes, mean, std, as_mnist, source)


def newest_run() -> Path | None:
    """The newest finished run that was trained on images."""
    return run.newest_run("simplenn", lambda record: record.get("normalization"))


def open_model(where: str | None = None) -> Model:
    """The network of the run folder or safetensors file `where`; see the top of this file. Raises UserError."""
    path = Path(where) if where else newest_run() or COMMITTED
    if not where:
        print(f"with the network in {run.display_path(path)}", file=sys.stderr)
    if path.is_dir():
        record = run.read_record(path / "run.json")
        return build(record, run.read_checkpoint(path / "best.pt")["model"], path)
    if path == COMMITTED and not path.exists():
        raise run.UserError(f"{path}: is missing; train one: python simplenn/train.py --model cnn --recipe best")
    state, header = run.read_safetensors(path)
    try:
        facts = json.loads(header.get("facts", "{}"))
    except ValueError as error:
        raise run.UserError(f"{path}: holds no network of this folder (its header is not JSON)") from error
    return build(facts, state, path)


def load(where: str | Path) -> Model:
    """The network of the run folder or safetensors file `where`. Raises UserError."""
    return open_model(str(where))


def save(folder: Path, target: Path):
    """Write the best checkpoint of the run in `folder` as bfloat16."""
    record = run.read_record(folder / "run.json")
    if record["state"] != "done":
        raise run.UserError(f"{folder}: has not finished; continue it: python simplenn/train.py --resume {folder}")
    state = run.read_checkpoint(folder / "best.pt")["model"]
    if "normalization" not in record or record["args"]["data"] in data.FUNCTIONS:
        raise run.UserError(f"{folder}: is not a run on images")
    facts = {
        "args": record["args"],
        "classes": record["classes"],
        "normalization": record["normalization"],
        "git": record["git"],
        "test_accuracy": record["final"]["test_accuracy"],
    }
    run.make_folder(target.parent)
    run.write_safetensors(target, state, {"facts": json.dumps(facts)})
    print(f"{run.display_path(target)}: {target.stat().st_size:,} bytes")


@dataclass(kw_only=True)
class Options(ScriptOptions):
    run: str = option("", "a run folder", type=path_arg, metavar="RUN", positional=True)
    out: str = option(str(COMMITTED), "the safetensors file", type=path_arg, metavar="FILE")


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    save(Path(args.run), Path(args.out))


if __name__ == "__main__":
    run.cli(main)
