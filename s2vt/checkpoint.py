"""A trained model in a file: best.pt of a run, or the committed weights (bfloat16 safetensors)."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from common import run

from torch import Tensor

import extractors
from data import Vocabulary
from decode import caption_all
from model import S2VT

FOLDER = Path(__file__).resolve().parent
COMMITTED = FOLDER / "weights" / "builtin.safetensors"
MODEL_KEYS = ("hidden", "embed", "cell", "attention", "dropout", "pooled")
HELP = "a run folder or a file of weights (default: the newest finished run, else the committed weights)"


class Trained(NamedTuple):
    """A network in evaluation mode, with what is needed to call it. name: how to print it; config: features, frames,
    max_words, the arguments of S2VT, extractor (None if unknown), dataset; folder: of the run, None for weights that
    lie elsewhere."""

    net: S2VT
    vocabulary: Vocabulary
    config: dict
    name: str
    folder: Path | None = None

    def captions(self, features: Tensor, width: int = 1) -> list[str]:
        """The captions of clips, float (N, T, F), by greedy search or by a beam of `width`."""
        found = caption_all(self.net, features, width, self.config["max_words"])
        return [self.vocabulary.decode(caption.words) for caption in found]


def config_of(args, facts: dict) -> dict:
    """The config of a model that is to be trained with `args` on the dataset of `facts`."""
    keys = {key: getattr(args, key) for key in (*MODEL_KEYS, "max_words")}
    return keys | {key: facts[key] for key in ("features", "frames", "extractor")} | {"dataset": facts["name"]}


def build(config: dict, vocab_size: int) -> S2VT:
    """The network of a config, with random weights."""
    return S2VT(config["features"], vocab_size, **{key: config[key] for key in MODEL_KEYS})


def load(name: str | None = None, device="cpu", accept=lambda dataset: True) -> Trained:
    """The trained network in the run folder or file `name`; None: of the newest finished run whose dataset, as its
    record has it, passes `accept`, else the committed one; a line on standard error says which it is and what else
    there is. Raises UserError."""
    if name:
        return read(Path(name), device)
    newest = run.newest_run(FOLDER.name, lambda record: accept(record.get("dataset", {})))
    trained = read(newest or COMMITTED, device)
    others = f"the committed network is --run {run.display_path(COMMITTED)}" if newest else "name another with --run"
    print(f"no run named: using {trained.name}, trained on {trained.config['dataset']}; {others}", file=sys.stderr)
    return trained


def read(path: Path, device="cpu") -> Trained:
    """The trained network in a run folder or file. Raises UserError."""
    is_run = path.is_dir() or path.with_name("run.json").exists()
    path = path / "best.pt" if path.is_dir() else path
    if not path.exists():
        raise run.UserError(f"{path}: is missing; train a model first: python s2vt/train.py --data builtin, 3 minutes")
    state = read_weights(path) if path.suffix == ".safetensors" else run.read_checkpoint(path)
    words = state["words"]
    config = state["config"]
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words) or words[:4] != Vocabulary.SPECIAL:
        raise run.UserError(f"{path}: is damaged (its words are not valid)")
    try:
        check_config(config, words, state["model"])
        net = build(config, len(words))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise run.UserError(f"{path}: is damaged (its config is not valid: {str(error)[:80]})") from error
    state.load_into(model=net)
    run.check_weights(net, path)
    folder = path.parent if is_run else None
    return Trained(net.to(device).eval(), Vocabulary(words), config, run.display_path(path), folder)


def check_config(config: dict, words: list[str], tensors: dict):
    """Raise ValueError, or what damaged values raise, if the config does not fit the words and the weights."""
    if config["extractor"] not in (None, *extractors.NAMES):
        raise ValueError("extractor")
    for name, most in (("frames", 10_000), ("max_words", 1000)):
        if type(config[name]) is not int or not 1 <= config[name] <= most:
            raise ValueError(name)
    shapes = {
        "frame_embed.weight": (config["embed"], config["features"]),
        "head.weight": (len(words), config["hidden"]),
    }
    for name, shape in shapes.items():  # before a network of any other size is built
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has another shape")


def save_weights(path: Path, net: S2VT, words: list[str], config: dict):
    """Write the weights as bfloat16 to a safetensors file, with the words and the config in its header."""
    run.write_safetensors(path, net.state_dict(), {"words": json.dumps(words), "config": json.dumps(config)})


def read_weights(path: Path) -> run.Checkpoint:
    """{"model", "words", "config"} from a file that `save_weights` wrote, in float32. Raises UserError."""
    tensors, header = run.read_safetensors(path)
    try:
        words = json.loads(header["words"])
        config = json.loads(header["config"])
    except (ValueError, LookupError, RecursionError) as error:
        raise run.UserError(f"{path}: is not a file of weights of this folder (its header has no words)") from error
    state = run.Checkpoint(model=tensors, words=words, config=config)
    state.path = path
    return state
