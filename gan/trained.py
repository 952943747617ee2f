"""Trained generators: read from a run folder or from weights/, for sample.py and evaluate.py.

    python gan/trained.py RUN     # write the best generator of a run to weights/DATA-MODEL.safetensors, in bfloat16

With no run named, sample.py and evaluate.py take the newest finished run, else the committed generator, and say which.
"""

import json
import sys
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

FOLDER = Path(__file__).resolve().parent
COMMITTED = {file.stem: file for file in sorted((FOLDER / "weights").glob("*.safetensors"))}
DEFAULT = "mnist-acgan"  # of the committed generators
FACTS = ("experiment", "args", "git", "dataset", "final")  # of a run, in the header of its committed weights
HELP = f"a run folder, or one of {', '.join(COMMITTED)} (default: the newest finished run, else {DEFAULT})"
TRAIN = "train one first: python gan/train.py --data builtin, 2 minutes"


class Trained(NamedTuple):
    """gan: in evaluation mode, without a discriminator if it is a committed one; args: of the run; facts: of its
    dataset; folder: of the run, or for what is made of a committed generator; epoch: of the weights."""

    gan: model.GAN
    args: train.Options
    facts: dict
    folder: Path
    epoch: int


@dataclass(kw_only=True)
class RunOptions(run.ScriptOptions):
    """The options that name a run and its weights, for `open_run`."""

    run: str | None = option(None, HELP, type=path_arg, metavar="RUN|NAME", positional=True, nargs="?")
    out_dir: str | None = option(None, "the same", type=path_arg, metavar="RUN", names=["--out_dir"])
    checkpoint: str = option("best", "which epoch", choices=["best", "last"])
    weights: str = option("ema", "the average of the generator's weights, or these", choices=["ema", "generator"])


def open_run(args: RunOptions, device) -> Trained:
    """The run or committed generator that `args` names; a line on standard error says which. Raises UserError."""
    if args.run and args.out_dir:
        raise run.UserError(f"name one run: {args.run} or --out_dir {args.out_dir}")
    name = args.run or args.out_dir
    newest = run.newest_run(FOLDER.name, is_done)  # `name_unfinished_run` says more of the others
    if not name:
        name = str(newest) if newest else DEFAULT
        name_unfinished_run(newest)
    if name in COMMITTED:
        if args.checkpoint == "last" or args.weights == "generator":
            raise run.UserError(f"{name}: has the average of the generator's weights at its best epoch alone")
        trained = open_committed(name, device)
    else:
        trained = open_folder(Path(name), args.checkpoint, args.weights, device)
    introduce(name, trained, newest)
    return trained


def is_done(record: dict) -> bool:
    return record["state"] == "done"


def name_unfinished_run(newest: Path | None):
    """Say on standard error which run has been begun after the newest finished one, and how to go on with it."""
    unfinished = None
    for folder, record in run.runs_by_age(run.ROOT / "out" / FOLDER.name):
        if folder == newest:
            unfinished = None
        elif record["state"] in ("running", "interrupted"):
            unfinished = folder, record["state"]
    if unfinished:
        folder, state = unfinished
        shown = run.typed_path(folder)
        text = f"{shown} has not finished ({state}); it goes on with: python gan/train.py --resume {shown}"
        if (folder / "best.pt").exists():
            text += f"; name it, {shown}, for its best epoch so far"
        print(run.printable(text), file=sys.stderr)


def introduce(name: str, trained: Trained, newest: Path | None):
    """Say on standard error which model it is, and what else there is."""
    args = trained.args
    text = f"{args.model}, {args.network} network of width {args.width}, epoch {trained.epoch} on {args.data}"
    others = [other for other in COMMITTED if other != name]
    if newest and Path(name).resolve() != newest.resolve():
        others.append(run.typed_path(newest))
    others.append("one of your own (python gan/train.py)")
    print(run.printable(f"model: {run.typed_path(name)}: {text}; others: {', '.join(others)}"), file=sys.stderr)


def open_folder(folder: Path, checkpoint: str, weights: str, device) -> Trained:
    """The networks of the run in `folder`. Raises UserError."""
    file = folder / "run.json"
    if not file.exists():
        raise run.UserError(f"{folder}: holds no run; name a run, or one of {', '.join(COMMITTED)}, or {TRAIN}")
    record = run.read_record(file)
    options, facts = read_facts(record, file)
    weights_file = folder / f"{checkpoint}.pt"
    if record["state"] != "done" and not weights_file.exists():
        shown = run.typed_path(folder)
        raise run.UserError(
            f"{shown}: ended before its first {weights_file.name}: python gan/train.py --resume {shown}"
        )
    state = run.read_checkpoint(weights_file, device)
    state.check_shapes(lambda: train.build_model(options, facts))
    gan = train.build_model(options, facts)
    state.load_into(model=gan)
    run.check_weights(getattr(gan, weights), state.path)
    gan = gan.to(device, memory_format=torch.channels_last).eval()
    return Trained(gan, options, facts, folder, state["epoch"])


def open_committed(name: str = DEFAULT, device="cpu") -> Trained:
    """The generator in weights/. Its networks `generator` and `ema` are the same. Raises UserError."""
    return open_safetensors(COMMITTED.get(name, FOLDER / "weights" / f"{name}.safetensors"), device)


def open_safetensors(file: Path, device="cpu") -> Trained:
    """The generator that `save` has written. Raises UserError."""
    state, header = run.read_safetensors(file)
    try:
        record = json.loads(header["facts"])
        epoch = int(record["final"]["best_epoch"])
        options, facts = read_facts(record, file)
        gan = run.make_without_memory(lambda: train.build_model(options, facts))
        gan.discriminator = None
        for net in (gan.generator, gan.ema):
            net.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise run.UserError(f"{file}: holds no generator of this folder ({reason:.100})") from error
    run.check_weights(gan.ema, file)
    gan = gan.to(device, memory_format=torch.channels_last).eval()
    return Trained(gan, options, facts, run.ROOT / "out" / FOLDER.name / file.stem, epoch)


def load(folder: str | Path) -> Trained:
    """The epoch of the lowest FID in the run in `folder`. Raises UserError."""
    return open_folder(Path(folder), "best", "ema", "cpu")


def save(folder: Path, target: Path | None = None) -> Path:
    """Write the average of the generator's weights at the best epoch of the finished run in `folder`, as bfloat16.
    Returns the file. Raises UserError."""
    trained = load(folder)
    record = run.read_record(folder / "run.json")
    if record["state"] != "done":
        shown = run.typed_path(folder)
        raise run.UserError(f"{shown}: has not finished; continue it: python gan/train.py --resume {shown}")
    name = f"{trained.facts['name']}-{trained.args.model}"
    target = target or FOLDER / "weights" / f"{name}.safetensors"
    run.make_folder(target.parent)
    facts = {key: record[key] for key in FACTS}
    run.write_safetensors(target, trained.gan.ema.state_dict(), {"facts": json.dumps(facts)})
    return target


def read_facts(record: dict, file: Path) -> tuple[train.Options, dict]:
    """(the options, the dataset's entry) in the record of a run of this folder. Raises UserError."""
    if record.get("experiment") != FOLDER.name:
        raise run.UserError(f"{file}: is not a record of a run of gan/ but of {record.get('experiment')}/")
    return recorded_options(record, file), dataset_of(record, file)


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
    run.check_dataset(trained.folder, trained.facts, facts)
    return tuple(parts)


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    run: str = option("", "a run folder", type=path_arg, metavar="RUN", positional=True)
    out: str | None = option(None, "the file (default: weights/DATA-MODEL.safetensors)", type=path_arg, metavar="FILE")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(auto_threads=1)
    target = save(Path(args.run), Path(args.out) if args.out else None)
    print(f"{run.display_path(target)}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    run.cli(main)
