"""Trained models: best.pt of a run, or a small safetensors file of weights.

    python lstm_imdb/saved.py out/lstm_imdb/imdb-short-s0-1 lstm_imdb/weights/short.safetensors   # bfloat16 weights

With no run named, predict.py, pairs.py and analyze.py take the newest finished run, else the committed model.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.arguments import ScriptOptions, parse_options, path_arg
from common.options import option

import torch

import data
import model
import train

FOLDER = Path(__file__).resolve().parent
COMMITTED = FOLDER / "weights" / "short.safetensors"


FINAL = ("val_accuracy", "test_accuracy", "temperature")  # metrics of a run that stay with its weights


class Model(NamedTuple):
    """A network in evaluation mode, its vocabulary and classes, the arguments of its run, its path, and those metrics
    of its run that are known, of FINAL."""

    net: model.SentimentLSTM
    vocabulary: data.Vocabulary
    classes: list[str]
    args: train.Options
    path: Path
    final: dict[str, float]

    @property
    def temperature(self) -> float:
        """That of the logits, for calibrated probabilities; 1 if the run is older than calibration."""
        return self.final.get("temperature", 1.0)

    def read(self, text: str) -> tuple[list[str], int]:
        """(the words of a review that the network reads, number of all its words)."""
        words = [word for word in data.tokenize(text) if word not in self.vocabulary.ignored]
        limit = self.args.max_len
        return words[:limit] if self.args.keep == "start" else words[-limit:], len(words)

    def encode(self, text: str) -> torch.Tensor:
        """The tokens (1, T) of a review."""
        words, _ = self.read(text)
        return torch.tensor([self.vocabulary.encode(words)])


def open_model(name: str | None = None, device="cpu") -> Model:
    """The model in the run folder or safetensors file `name`; see the top of this file. Raises UserError."""
    if name is None:
        name = run.newest_run(FOLDER.name) or COMMITTED
    path = Path(name)
    if path.suffix == ".safetensors":
        state, record, words, classes = read_weights(path)
    else:
        record = run.read_record(path / "run.json")
        if record["experiment"] != FOLDER.name:
            raise run.UserError(f"{path}: holds a run of {record['experiment']}/")
        checkpoint = run.read_checkpoint(path / "best.pt", device)
        state = checkpoint["model"]
        words = checkpoint["words"]
        classes = checkpoint["classes"]
    for name, texts in (("words", words), ("classes", classes)):
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise run.UserError(f"{path}: is damaged: its {name} are not a list of texts")
    args = read_options(record, path)
    sizes = len(words), len(classes)
    net = run.make_without_memory(lambda: train.build_model(args, *sizes))  # of a damaged file it may fit no memory
    try:
        net.load_state_dict(state, assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise run.UserError(f"{path}: holds the weights of another network") from error
    run.check_weights(net, path)
    final = read_final(record, path)
    vocabulary = data.Vocabulary(words[2:], data.stop_words() if args.stop_words else frozenset())
    return Model(net.to(device).requires_grad_().eval(), vocabulary, classes, args, path, final)


def describe(found: Model) -> str:
    """Which model it is and what else there is, in a line."""
    others = "a run of train.py"
    if found.path.resolve() != COMMITTED:
        others = f"another run of train.py, or {run.display_path(COMMITTED)}"
    accuracy = ""
    if "test_accuracy" in found.final:
        accuracy = f", right on {found.final['test_accuracy']:.1%} of test reviews"
    place = run.display_path(found.path)
    trained_on = run.printable(str(found.args.data))
    return f"with {place}: recipe {found.args.recipe}, trained on {trained_on}{accuracy}; --run takes {others}"


def read_final(record: dict, path: Path) -> dict[str, float]:
    """The metrics FINAL in a record. Raises UserError."""
    final = record.get("final") or {}
    try:
        metrics = {name: float(final[name]) for name in FINAL if name in final}
        if not all(math.isfinite(value) and value >= 0 for value in metrics.values()):
            raise ValueError("a number that cannot be right")
        if metrics.get("temperature") == 0:
            raise ValueError("a temperature of 0")
    except (TypeError, ValueError) as error:
        raise run.UserError(f"{path}: is damaged: its metrics are {str(error):.80}") from error
    return metrics


def load(name: str | Path) -> Model:
    """The model in the run folder or safetensors file `name`. Raises UserError."""
    return open_model(str(name))


def read_options(record: dict, path: Path) -> train.Options:
    """The options of the run whose record is `record`; its data need not be there any more. Raises UserError."""
    try:
        place = run.data_place(path, str(record["args"]["data"]))
        record = record | {"args": record["args"] | {"data": "builtin"}}
    except (KeyError, TypeError) as error:
        raise run.UserError(f"{path}: is damaged: its record has no --data") from error
    options = run.recorded_options(train.Options, record, path)
    options.data = place
    if (path / "local.json").is_file():
        options.data_dir = run.read_json(path / "local.json").get("data_dir")
    return options


def read_weights(path: Path):
    """(state dict in float32, the record {"args", "final"}, words, classes) of a safetensors file. Raises UserError."""
    if not path.exists():
        raise run.UserError(f"{path}: is missing; train a model: python lstm_imdb/train.py (5 minutes on one core)")
    state, header = run.read_safetensors(path)
    try:
        record = {"args": json.loads(header["args"]), "final": json.loads(header.get("final", "{}"))}
        return state, record, header["words"].split("\n"), json.loads(header["classes"])
    except (KeyError, ValueError, RecursionError) as error:
        raise run.UserError(f"{path}: is not a file of weights of this folder ({str(error)[:80]})") from error


def save_weights(found: Model, path: Path):
    """Write the weights as bfloat16, with arguments, words, classes and metrics in the header."""
    header = {
        "args": json.dumps(run.record_args(found.args)),
        "words": "\n".join(found.vocabulary.words),
        "classes": json.dumps(found.classes),
        "final": json.dumps(found.final),
    }
    run.make_folder(path.parent)
    run.write_safetensors(path, found.net.state_dict(), header)


@dataclass(kw_only=True)
class Options(ScriptOptions):
    run: str = option("", "a finished run", type=path_arg, positional=True)
    file: str = option("", "the safetensors file to write", type=path_arg, positional=True)


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    save_weights(open_model(args.run), Path(args.file))
    print(f"{args.file}: {Path(args.file).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run.cli(main)
