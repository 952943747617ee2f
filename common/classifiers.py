"""A trained network that names images: read from a run folder or from a small file, and written to such a file.

The small file holds the weights as bfloat16, and in its header the facts that the demos need and the README quotes:
classes, mean and standard deviation, the temperature of the logits, and how sure the network is of the test images.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common import run
from common.calibration import calibration_error, fit_temperature, unsure_shares
from common.run import UserError

import torch
from torch import Tensor, nn

UNSURE = 0.5  # a prediction of a lower probability is called unsure
FACTS = ("experiment", "args", "git", "dataset", "parameters")  # of a run, in the header of a small file


class Classifier(NamedTuple):
    """A network in evaluation mode, and what its predictions need.

    mean, std: (1, C, 1, 1), of the training images, in units of pixel values; args: the options of its run; dataset:
    its name; temperature (of the logits) and accuracy (on test images): None where the run did not measure them;
    source: the run folder or the small file.
    """

    net: nn.Module
    classes: list[str]
    mean: Tensor
    std: Tensor
    args: Any
    dataset: str
    temperature: float | None
    accuracy: float | None
    source: Path


def find(where: str | None, experiment: str, committed: Path) -> Path:
    """The run folder or small file `where`, else the newest finished run, else the committed file. Raises UserError."""
    path = Path(where) if where else run.newest_run(experiment) or committed
    if path == committed and not path.exists():
        raise UserError(f"{path}: is missing; name a run of your own with --run RUN")
    return path


def load(where: str | Path, experiment: str, scripts: dict[str, tuple[type, Callable]], device="cpu") -> Classifier:
    """The network in the run folder or small file `where`.

    scripts: of the experiment, {"train.py": (the class of its options, make)}, where make(args, classes) is its network
    for such options and a number of classes. Raises UserError.
    """
    source = Path(where)
    if source.suffix == ".safetensors" and not source.is_dir():
        weights = described = source
        state, header = run.read_safetensors(source)
        facts = read_facts(header, source)
        record = facts
    else:
        weights = source / "best.pt"
        described = source / "run.json"
        record = run.read_record(described)
        best = run.read_checkpoint(weights, device)
        state = best["model"]
        final = record.get("final") or {}
        facts = {name: best[name] for name in ("classes", "mean", "std")}
        facts |= {name: final.get(name) for name in ("temperature", "test_accuracy")}
    if record.get("experiment") != experiment:
        raise UserError(f"{source}: holds a run of {record.get('experiment')}/")
    script = record.get("script", "train.py")  # the only one when older records were made
    if script not in scripts:
        raise UserError(f"{source}: holds a run of {script}; name one of {' or '.join(scripts)}")
    options, make = scripts[script]
    try:
        args = run.recorded_options(options, record, described)
        trained = build(args, str(record["dataset"]["name"]), facts, source)
        net = run.make_without_memory(lambda: make(args, len(trained.classes)))
        net.load_state_dict({name: value.to(device) for name, value in state.items()}, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{weights}: holds no network of {experiment}/ ({reason:.100})") from error
    run.check_weights(net, weights)
    return trained._replace(net=net.eval(), mean=trained.mean.to(device), std=trained.std.to(device))


def read_facts(header: dict[str, str], path: Path) -> dict:
    try:
        facts = json.loads(header["facts"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: holds no trained network (its header has no facts)") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("args"), dict):
        raise UserError(f"{path}: holds no trained network (its header has no options)")
    return facts


def build(args, dataset: str, facts: dict, source: Path) -> Classifier:
    """The classifier of checked facts, without its network. Raises KeyError, TypeError, ValueError, RuntimeError."""
    classes = facts["classes"]
    if not isinstance(classes, list) or len(classes) < 2:
        raise ValueError("fewer than two classes")
    mean, std = (torch.as_tensor(facts[name]).float().view(1, -1, 1, 1) for name in ("mean", "std"))
    if mean.shape != std.shape or not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError("invalid mean or standard deviation")
    temperature = facts["temperature"]
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError("invalid temperature")
    accuracy = facts["test_accuracy"]
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError("invalid accuracy")
    return Classifier(None, list(map(str, classes)), mean, std, args, dataset, temperature, accuracy, source)


def introduce(trained: Classifier, committed: Path):
    """Say on standard error which network it is, and which other there is."""
    text = f"{trained.args.model} trained on {trained.dataset}"
    if trained.accuracy is not None:
        text += f", {trained.accuracy:.1%} of its test images right"
    if trained.temperature is None:
        text += "; probabilities are not calibrated"
    other = "a run of your own: --run RUN"
    if trained.source.resolve() != committed and committed.exists():
        other = f"the committed network: --run {run.typed_path(committed)}"
    print(run.printable(f"{run.typed_path(trained.source)}: {text}; {other}"), file=sys.stderr)


def calibrated(trained: Classifier, logits: Tensor) -> Tensor:
    """Probabilities of logits (N, classes), at the temperature that validation chose. Raises UserError if they are not
    finite numbers."""
    odds = (logits / (trained.temperature or 1.0)).softmax(1)
    if not odds.isfinite().all():
        raise UserError(f"{trained.source}: is damaged: its predictions are not finite numbers")
    return odds


# ------------------------------------------------------------------------------------------------------ the small file


def in_bfloat16(trained: Classifier) -> Classifier:
    """The same network with its weights rounded to bfloat16, as the small file has them."""
    state = trained.net.state_dict()
    floats = {name: value.bfloat16().float() for name, value in state.items() if value.is_floating_point()}
    trained.net.load_state_dict(state | floats)
    return trained


def write(target: Path, trained: Classifier, val: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]):
    """Write the small file of the network of a finished run. val, test: the logits (N, classes) of the images of a
    part, and their labels (N,). Raises UserError."""
    record = run.read_record(trained.source / "run.json")
    if record["state"] != "done":
        raise UserError(f"{trained.source}: has not finished; --resume {run.typed_path(trained.source)} continues it")
    if trained.temperature is None:
        trained = trained._replace(temperature=fit_temperature(*val))
    logits, labels = test
    odds = calibrated(trained, logits)
    facts = {name: record.get(name) for name in FACTS} | {
        "classes": trained.classes,
        "mean": trained.mean.flatten().tolist(),
        "std": trained.std.flatten().tolist(),
        "temperature": trained.temperature,
        "val_calibration_error": calibration_error(calibrated(trained, val[0]), val[1]),
        "test_calibration_error": calibration_error(odds, labels),
        "uncalibrated_test_error": calibration_error(logits.softmax(1), labels),
        "test_accuracy": (odds.argmax(1) == labels).double().mean().item(),
        "unsure_below": UNSURE,
        "unsure": unsure_shares(odds, labels, UNSURE),
    }
    run.make_folder(target.parent)
    run.write_safetensors(target, trained.net.state_dict(), {"facts": json.dumps(facts)})
    shares = ", ".join(f"{share:.1%} of {name}" for name, share in facts["unsure"].items())
    print(
        f"{run.display_path(target)}: {target.stat().st_size:,} bytes, temperature {trained.temperature:.3f}, "
        f"test accuracy {facts['test_accuracy']:.2%}; unsure: {shares}"
    )
