"""How far can predict.py be trusted? What it says of all test digits, and of two of them side by side.

    python simplenn/reliability.py                  # the newest run, else the committed network: three minutes
    python simplenn/reliability.py --run RUN        # RUN: a run folder or a safetensors file

The test images are those of the dataset on which the network was trained. Pairs are two of them in one image, with a
gap of 2 to 10 columns and up to 3 rows apart in height. Writes reliability.json into --out.
"""

from dataclasses import dataclass

from common import run
from common.arguments import ROOT, data_dir_option, path_arg
from common.calibration import calibration_error
from common.options import option

import numpy as np
import torch

import data
import predict
import saved


def paste_pair(left: np.ndarray, right: np.ndarray, gap: int, shift: int) -> np.ndarray:
    """uint8 (H, W): two digits (28, 28) side by side, `gap` empty columns apart, the right one `shift` rows lower."""
    left, right = (np.pad(crop_columns(image), ((12, 12), (0, 0))) for image in (left, right))
    space = np.zeros((len(left), gap), np.uint8)
    pair = np.concatenate([left, space, np.roll(right, shift, 0)], 1)  # the rows that come round are empty
    return np.pad(pair, ((0, 0), (12, 12)))


def crop_columns(image: np.ndarray) -> np.ndarray:
    """The image (H, W) without the empty columns on its left and right."""
    columns = np.flatnonzero(image.any(0))
    return image[:, columns[0] : columns[-1] + 1]


def make_pairs(images: np.ndarray, count: int, seed: int = 0) -> list[np.ndarray]:
    """`count` images of two digits drawn from `images` (N, 28, 28)."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        i, j = rng.integers(len(images), size=2)
        pairs.append(paste_pair(images[i], images[j], gap=rng.integers(2, 11), shift=rng.integers(-3, 4)))
    return pairs


def called_two(images) -> int:
    """Of how many images does predict.py ask whether they show two digits?"""
    return sum(predict.shows_two_digits(predict.find_ink(image.astype(float))) for image in images)


def measure(model: saved.Model, test_set, pairs: int) -> tuple[list[dict], dict]:
    """(a row for each kind of answer: how often it is given; the calibration)."""
    odds = saved.probabilities(model, test_set.images)
    confidence, predicted = odds.max(1)
    right = predicted == test_set.labels
    unsure = confidence < predict.UNSURE
    digits = test_set.images[:, 0].numpy()
    counts = {
        "unsure, of digits read right": (int((unsure & right).sum()), int(right.sum())),
        "unsure, of digits read wrong": (int((unsure & ~right).sum()), int((~right).sum())),
        "two digits, of single digits": (called_two(digits), len(digits)),
        "two digits, of pairs": (called_two(make_pairs(digits, pairs)), pairs),
    }
    rows = []
    for setting, (count, of) in counts.items():
        rows.append({"setting": setting, "state": "done", "count": count, "of": of, "share": count / max(1, of)})
    uncalibrated = saved.logits_of(model, test_set.images).softmax(1)
    calibration = {
        "temperature": model.temperature,
        "test_accuracy": right.double().mean().item(),
        "calibration_error": calibration_error(odds, test_set.labels),
        "uncalibrated_error": calibration_error(uncalibrated, test_set.labels),
        "unsure_below": predict.UNSURE,
    }
    return rows, calibration


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    run: str | None = option(None, "a run folder or a safetensors file", type=path_arg, metavar="RUN")
    data_dir: str | None = data_dir_option()
    limit: int | None = option(None, "only the first N test images", above=0)
    pairs: int = option(2000, "images of two digits", above=0, at_most=1_000_000)
    out: str = option(
        str(ROOT / "out/simplenn/reliability"), "folder for reliability.json", type=path_arg, metavar="DIR"
    )


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    run.set_threads(auto_threads=1)
    model = saved.open_model(args.run)
    if not model.as_mnist:
        raise run.UserError(f"{model.source}: its images are read as they are, and never asked about")
    facts, _ = saved.read(model.source)
    _, _, test_set, dataset = data.load(run.data_place(model.source, facts["args"]["data"]), args.data_dir, args.limit)
    rows, calibration = measure(model, test_set, args.pairs)
    for row in rows:
        print(f"{row['setting']:30} {row['count']:6,} of {row['of']:6,}   {row['share']:.2%}")
    print(", ".join(f"{name} {value:.4f}" for name, value in calibration.items()))
    out = run.make_folder(args.out)
    machine = run.environment(torch.device("cpu"), __file__)
    record = {"study": "reliability", **machine, "dataset": dataset, "calibration": calibration, "rows": rows}
    run.write_json(out / "reliability.json", record)
    return rows


if __name__ == "__main__":
    run.cli(main)
