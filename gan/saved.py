"""Trained generators: read from a run folder, for sample.py and evaluate.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from common import run

import torch

import data
import model

HELP = "a run folder (default: the newest finished run)"
TRAIN = "train one first: python gan/train.py --data builtin, 2 minutes"


class Trained(NamedTuple):
    """gan: in evaluation mode; args: of the run; facts: of its dataset; folder: of the run; epoch: of the weights."""

    gan: model.GAN
    args: SimpleNamespace
    facts: dict
    folder: Path
    epoch: int


def add_flags(parser):
    """The flags that name a run and one of its checkpoints, for `open_run`."""
    parser.add_argument("run", nargs="?", type=run.path_arg, metavar="RUN", help=HELP)
    parser.add_argument("--out_dir", type=run.path_arg, metavar="RUN", help="the same")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best", help="(default: best)")
    parser.add_argument("--weights", choices=["ema", "generator"], default="ema",
                        help="the average of the generator's weights, or these themselves (default: ema)")  # fmt: skip


def open_run(args, device) -> Trained:
    """The run that `args`, the flags of `add_flags`, name. Raises UserError."""
    if args.run and args.out_dir:
        raise run.UserError(f"name one run: {args.run} or --out_dir {args.out_dir}")
    name = args.run or args.out_dir
    folder = Path(name) if name else run.newest_run(Path(__file__).resolve().parent.name)
    if folder is None:
        raise run.UserError(f"there is no finished run; {TRAIN}")
    if not name:
        print(f"no run named: using {run.display_path(folder)}")
    if not (folder / "run.json").exists():
        raise run.UserError(f"{folder}: holds no run; {TRAIN}")
    record = run.read_record(folder / "run.json")
    state = run.read_checkpoint(folder / f"{args.checkpoint}.pt", device)
    try:
        if record["experiment"] != "gan":
            raise ValueError(f"it is a run of {record['experiment']}/")
        made, facts = SimpleNamespace(**record["args"]), record["dataset"]
        gan = model.build(made.model, made.network, facts["channels"], facts["classes"], made.width, made.noise,
                          made.spectral_norm)  # fmt: skip
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise run.UserError(f"{folder / 'run.json'}: is not a record of a run of gan/ ({str(error)[:80]})") from error
    state.load_into(model=gan)
    gan = gan.to(device, memory_format=torch.channels_last).eval()
    return Trained(gan, made, facts, folder, state["epoch"])


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
