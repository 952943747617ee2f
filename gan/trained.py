"""Trained generators: read from a run folder, for sample.py and evaluate.py."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from common import run
from common.arguments import path_arg
from common.options import option

import torch

import data
import model
import train

HELP = "a run folder (default: the newest finished run)"
TRAIN = "train one first: python gan/train.py --data builtin, 2 minutes"


class Trained(NamedTuple):
    """gan: in evaluation mode; args: of the run; facts: of its dataset; folder: of the run; epoch: of the weights."""

    gan: model.GAN
    args: train.Options
    facts: dict
    folder: Path
    epoch: int


@dataclass(kw_only=True)
class RunOptions(run.ScriptOptions):
    """The options that name a run and its weights, for `open_run`."""

    run: str | None = option(None, HELP, type=path_arg, metavar="RUN", positional=True, nargs="?")
    out_dir: str | None = option(None, "the same", type=path_arg, metavar="RUN", names=["--out_dir"])
    checkpoint: str = option("best", "which epoch", choices=["best", "last"])
    weights: str = option("ema", "the average of the generator's weights, or these", choices=["ema", "generator"])


def open_run(args: RunOptions, device) -> Trained:
    """The run that `args` names. Raises UserError."""
    if args.run and args.out_dir:
        raise run.UserError(f"name one run: {args.run} or --out_dir {args.out_dir}")
    name = args.run or args.out_dir
    folder = Path(name) if name else run.newest_run(Path(__file__).resolve().parent.name)
    if folder is None:
        raise run.UserError(f"there is no finished run; {TRAIN}")
    if not name:
        print(f"no run named: using {run.display_path(folder)}")
    file = folder / "run.json"
    if not file.exists():
        raise run.UserError(f"{folder}: holds no run; {TRAIN}")
    record = run.read_record(file)
    if record["experiment"] != "gan":
        raise run.UserError(f"{file}: is not a record of a run of gan/ but of {record['experiment']}/")
    options = recorded_options(record, file)
    facts = dataset_of(record, file)
    state = run.read_checkpoint(folder / f"{args.checkpoint}.pt", device)
    state.check_shapes(lambda: train.build_model(options, facts))
    gan = train.build_model(options, facts)
    state.load_into(model=gan)
    run.check_weights(getattr(gan, args.weights), state.path)
    gan = gan.to(device, memory_format=torch.channels_last).eval()
    return Trained(gan, options, facts, folder, state["epoch"])


def load(folder: str | Path) -> Trained:
    """The epoch of the lowest FID in the run in `folder`. Raises UserError."""
    return open_run(RunOptions(run=str(folder)), "cpu")


def recorded_options(record: dict, file: Path) -> train.Options:
    """The options in the record of a run. A folder of images need not be there any more. Raises UserError."""
    recorded = str(record["args"].get("data"))
    if not recorded.startswith("./"):
        return run.recorded_options(train.Options, record, file)
    return replace(run.recorded_options(train.Options, record, file, data="auto"), data=recorded)


def dataset_of(record: dict, file: Path) -> dict:
    """The dataset's entry in the record of a run, checked. Raises UserError."""
    facts = record.get("dataset", {})
    for name, lowest, highest in (("channels", 1, 3), ("classes", 1, 1_000_000)):
        value = facts.get(name)
        if type(value) is not int or not lowest <= value <= highest:
            raise run.UserError(f"{file}: is damaged: its dataset has an invalid number of {name}: {str(value)[:80]}")
    if not isinstance(facts.get("digest"), str) or not isinstance(facts.get("builtin"), bool):
        raise run.UserError(f"{file}: is damaged: its dataset has no valid digest")
    return facts


def data_of(trained: Trained, data_dir: str | None, name: str | None = None) -> tuple:
    """(train, held out, test) on which the run was trained; it must be the same dataset. name: where a folder of images
    lies now. Raises UserError."""
    name = run.data_place(trained.folder, name or trained.args.data)
    if name not in data.image_data.NAMES and not Path(name).is_dir():
        raise run.UserError(f"the images of this run are gone from {name}; name their new place with --data")
    *parts, facts = data.load(name, data_dir, trained.args.limit)
    if facts["digest"] != trained.facts["digest"]:
        raise run.UserError(f"{trained.folder}: was trained on another dataset than is in {name} now")
    return tuple(parts)
