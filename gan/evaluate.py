"""FID, KID, precision and recall of a trained generator; and the FID of real images.

    python gan/evaluate.py                                          # of the newest finished run, as it was trained
    python gan/evaluate.py RUN --features inception                 # with the network of the published FIDs
    python gan/evaluate.py RUN --weights generator                  # what the average of weights is worth
    python gan/evaluate.py --real --data cifar10 --features efficientnet-lite0   # real images against real images

Writes evaluation-FEATURES.json into --out; with --real, real-FEATURES.json and real.png. A number holds for its
protocol alone: features, number of images, reference. Never compare across protocols.
"""

import statistics
from dataclasses import dataclass

from common import run
from common.arguments import path_arg
from common.options import flag, option

import torch
from matplotlib.figure import Figure

import data
import features
import fid
import scores
from data import DATA_HELP, dataset_arg
from features import INCEPTION
from features import NAMES as FEATURES
from trained import RunOptions, data_of, open_run

AUTO_THREADS = None  # all cores: the features of thousands of images

CLASSIFIER_IMAGES = 40_000  # on which features=classifier is trained with --real
SIZES = (50, 500, 2000, 10_000, 25_000)  # images on each side
RUN_FLAGS = ("run", "out_dir", "checkpoint", "weights", "samples", "seed")  # not with --real
REAL_FLAGS = ("limit", "feature_size")  # only with --real; a run has its own
INCEPTION_HELP = f"{INCEPTION} (default: in the folder of datasets, else fetched)"
OUT_HELP = "folder to write to (default: the run folder; with --real out/gan/real)"


def real_against_real(args, device):
    """FID between disjoint sets of real training images, for sets of every size in SIZES; at most five pairs each.
    Returns (file, record)."""
    train_set, held_out, _, facts = data.load(args.data or "cifar10", args.data_dir, args.limit)
    train_set, held_out = train_set.to(device), held_out.to(device)
    out = run.make_folder(args.out or run.ROOT / "out" / "gan" / "real")
    if len(train_set) + len(held_out) < 2 * SIZES[0]:
        raise run.UserError(f"{facts['name']}: --real needs {2 * SIZES[0]} training images or more")
    name, sizes = args.features or "classifier", (args.feature_size, CLASSIFIER_IMAGES)
    seen_by = features.load(
        name, train_set, held_out, facts["digest"], out, *sizes, args.data_dir, args.inception_weights
    )
    folder = fid.cache_folder(name, args.data_dir, facts)
    digest = facts["digest"][:12]
    real_parts = [
        seen_by.of_part(train_set.images, f"{digest}-train", folder),
        seen_by.of_part(held_out.images, f"{digest}-held-out", folder),
    ]
    real = torch.cat(real_parts)
    real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    rows = []
    for size in [s for s in SIZES if 2 * s <= len(real)]:
        pairs = min(5, len(real) // (2 * size))
        values = [scores.fid(*real[2 * i * size : 2 * (i + 1) * size].split(size)) for i in range(pairs)]
        too_few = size <= real.shape[1]  # for the dimensions of the features
        rows.append({"images": size, "fid": statistics.mean(values), "pairs": values, "too_few": too_few})
        print(f"{size:>6,} real images against {size:,} others: FID {rows[-1]['fid']:.2f} ({pairs} pairs)")
    record = {"dataset": facts, "features": seen_by.facts(), "dimensions": real.shape[1], "rows": rows}
    run.write_figure(out / "real.png", draw_real(record))
    return out / f"real-{name}.json", record


def draw_real(record):
    """The FID of real images against the number of images: a dot for each pair of sets, a line through the means."""
    rows = record["rows"]
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot([row["images"]] * len(row["pairs"]), row["pairs"], ".", color="tab:orange")
    axes.plot([row["images"] for row in rows], [row["fid"] for row in rows], "o-")
    axes.set(xscale="log", xlabel="images on each side", ylabel="FID of real against real images", ylim=(0, None))
    axes.grid(alpha=0.3)
    return figure


def evaluate(args, device):
    """All measures of the run that `args` names against the test images. Returns (file, record)."""
    trained = open_run(args, device)
    facts = trained.facts
    train_set, held_out, test_set = (part.to(device) for part in data_of(trained, args.data_dir, args.data))
    name = args.features or trained.args.features
    sizes = trained.args.feature_size, trained.args.classifier_images
    cache = fid.cache_folder(name, args.data_dir, facts)
    seen_by = features.load(
        name, train_set, held_out, facts["digest"], trained.folder, *sizes, args.data_dir, args.inception_weights
    )
    tester = fid.Judge(seen_by, test_set, "test", cache, facts["digest"])
    images, labels = fid.generate(trained.gan, args.samples, args.seed + 2, device, args.weights)
    judge = fid.Judge(seen_by, held_out, "held out", cache, facts["digest"])
    tester.probe = fid.probe_of(judge, trained.args.model)
    values = tester.measure(images, labels if trained.args.model == "acgan" else None) | tester.measure_probe()
    protocol = tester.protocol(args.samples)
    which = f"{args.checkpoint} weights (epoch {trained.epoch}), {args.weights}"
    print(f"{run.display_path(trained.folder)}, {which}; {fid.describe(protocol)}")
    for measure, value in values.items():
        print(f"  {measure.replace('_', ' '):16} {value:.4f}")
    record = {
        "args": run.record_args(trained.args),
        "weights": args.weights,
        "checkpoint": args.checkpoint,
        "epoch": trained.epoch,
        "protocol": protocol,
        "dataset": facts,
        "final": values,
    }
    return run.make_folder(args.out or trained.folder) / f"evaluation-{name}.json", record


@dataclass(kw_only=True)
class Options(RunOptions):
    samples: int = option(10_000, "generated images", at_least=2, at_most=1_000_000)
    seed: int = option(0, "seed of the noise", at_least=0)
    real: bool = option(False, "compare real images with real images instead of a run")
    feature_size: int = option(96, "pixels, for efficientnet-lite0 with --real", at_least=32, at_most=1024)
    limit: int | None = option(None, "only the first N examples of each part, with --real", above=0)
    features: str | None = option(None, "(default: the run's own; classifier with --real)", choices=list(FEATURES))
    inception_weights: str | None = option(None, INCEPTION_HELP, type=path_arg, metavar="FILE")
    data: str | None = option(None, DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    device: str = run.device_option()
    threads: int | str = run.threads_option()
    out: str | None = option(None, OUT_HELP, type=path_arg, metavar="DIR")


def defaults(given: dict) -> Options:
    """The defaults. Raises UserError if a flag in `given` would not be read."""
    others, reason = (RUN_FLAGS, "without") if given.get("real") else (REAL_FLAGS, "only with")
    for name in given.keys() & others:
        raise run.UserError(f"{'RUN' if name == 'run' else flag(name)}: is read {reason} --real")
    features = given.get("features")
    if "inception_weights" in given and features != "inception":
        raise run.UserError("--inception-weights: is read only with --features inception")
    if given.get("real") and "feature_size" in given and features != "efficientnet-lite0":
        raise run.UserError("--feature-size: is read only with --features efficientnet-lite0")
    return Options()


def parse(argv=None) -> Options:
    return run.parse_options(__file__, Options, argv, defaults)


def main(argv=None):
    args = parse(argv)
    run.set_threads(args.threads, AUTO_THREADS)
    device = run.pick_device(args.device)
    file, record = real_against_real(args, device) if args.real else evaluate(args, device)
    run.write_json(file, record | run.environment(device, __file__))
    return record


if __name__ == "__main__":
    run.cli(main)
