"""Trained models: best.pt of a run, or a small safetensors file of weights.

    python lstm_imdb/saved.py out/lstm_imdb/imdb-plain-s0-1 lstm_imdb/weights/plain.safetensors   # bfloat16 weights

With no run named, predict.py and analyze.py take the newest finished run, else the committed model.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from common import run

import torch

import data
import model
import train

FOLDER = Path(__file__).resolve().parent
COMMITTED = FOLDER / "weights" / "plain.safetensors"


class Model(NamedTuple):
    """A network in evaluation mode, its vocabulary and classes, the arguments of its run, and its path."""

    net: model.SentimentLSTM
    vocabulary: data.Vocabulary
    classes: list[str]
    args: argparse.Namespace
    path: Path


def open_model(name: str | None = None, device="cpu") -> Model:
    """The model in the run folder or safetensors file `name`; see the top of this file. Raises UserError."""
    if name is None:
        name = run.newest_run(FOLDER.name) or COMMITTED
        print(f"no run named: using {run.display_path(name)}", file=sys.stderr)
    path = Path(name)
    if path.suffix == ".safetensors":
        state, args, words, classes = read_weights(path)
    else:
        record = run.read_record(path / "run.json")
        if record["experiment"] != FOLDER.name:
            raise run.UserError(f"{path}: holds a run of {record['experiment']}/")
        state, args = run.read_checkpoint(path / "best.pt", device), record["args"]
        words, classes = state["words"], state["classes"]
        args |= {"data_dir": run.read_json(path / "local.json").get("data_dir")} if in_folder(path) else {}
        args |= {"data": run.data_place(path, str(args.get("data")))}
    try:
        args = argparse.Namespace(**train.PLAIN | {"data_dir": None} | args)  # a run may be older than an option
        net = train.build_model(args, len(words), len(classes))
        ignored = data.stop_words() if args.stop_words else frozenset()
        vocabulary = data.Vocabulary(words[2:], ignored)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise run.UserError(f"{path}: describes no model of this folder ({str(error)[:80]})") from error
    if isinstance(state, run.Checkpoint):
        state.load_into(model=net)
    else:
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise run.UserError(f"{path}: holds the weights of another network") from error
    return Model(net.to(device).eval(), vocabulary, classes, args, path)


def in_folder(path):
    return (path / "local.json").is_file()


def read_weights(path: Path):
    """(state dict in float32, arguments, words, classes) of a safetensors file. Raises UserError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise run.UserError(f"{path}: needs safetensors: pip install -r requirements.txt") from None
    if not path.is_file():
        raise run.UserError(f"{path}: is missing; train a model: python lstm_imdb/train.py (5 minutes on one core)")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}
        return state, json.loads(header["args"]), header["words"].split("\n"), json.loads(header["classes"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise run.UserError(f"{path}: is not a file of weights of this folder ({str(error)[:80]})") from error


def save_weights(found: Model, path: Path):
    """Write the weights as bfloat16, with arguments, words and classes in the header."""
    from safetensors.torch import save

    tensors = {name: p.to("cpu", torch.bfloat16).contiguous() for name, p in found.net.state_dict().items()}
    args = {name: value for name, value in vars(found.args).items() if name != "data_dir"}
    header = {
        "args": json.dumps(args),
        "words": "\n".join(found.vocabulary.words),
        "classes": json.dumps(found.classes),
    }
    run.make_folder(path.parent)
    run.write(path, save(tensors, header))


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=run.path_arg, help="a finished run")
    p.add_argument("file", type=run.path_arg, help="the safetensors file to write")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    save_weights(open_model(args.run), Path(args.file))
    print(f"{args.file}: {Path(args.file).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run.cli(main)
