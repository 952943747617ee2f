"""How fast is the training? The usual way against this folder's, and many networks at once against one by one.

    python simplenn/bench.py --part epoch        # images per second: loaders, precision, memory format
    python simplenn/bench.py --part accuracy     # the best recipe to the end, the usual way and ours
    python simplenn/bench.py --part stack        # K networks as one (torch.func), and one after another

The usual way: torchvision's MNIST as PIL images, RandomAffine, ToTensor and Normalize one by one, and a DataLoader. All
ways take turns, so that a machine that slows down slows all of them; reported are medians. Writes bench-PART.json.
"""

import statistics
import time
from dataclasses import dataclass

from common import run, timing
from common.options import option, to_argv
from common.usual import torchvision_transforms, usual_loader

import torch
import torch.nn.functional as F
from PIL import Image

import data
import train
from data import FUNCTIONS
from model import MLP
from studies import training
from studies.flatness import network as small_cnn

BEST = train.RECIPES["best"]["cnn"]


def affine_loader(dataset, bs, workers, seed=0):
    transforms = torchvision_transforms()
    shift = data.SHIFT / 28
    scale = (1 - data.SCALE, 1 + data.SCALE)
    affine = transforms.RandomAffine(data.ROTATION, (shift, shift), scale, interpolation=Image.Resampling.BILINEAR)
    normalize = transforms.Normalize([dataset.mean / 255], [dataset.std / 255])
    transform = transforms.Compose([affine, transforms.ToTensor(), normalize])
    return usual_loader(dataset, transform, bs, workers, seed)


def train_epoch(batches, model, optimizer, bf16, lr_at=None):
    """Train on `batches`; returns images per second."""
    seen, began = 0, time.perf_counter()
    model.train()
    for step, (images, labels) in enumerate(batches):
        for group in optimizer.param_groups if lr_at else ():
            group["lr"] = lr_at(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels, label_smoothing=BEST.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(labels)
    return seen / (time.perf_counter() - began)


def new_model(channels_last=True):
    model = train.CNN(10, BEST.widths, BEST.dropout)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model, train.build_optimizer(BEST, model)


def epoch(args, parts):
    """Images per second of an epoch with augmentation."""
    train_set, bs = parts[0], BEST.bs
    native = run.native_bf16(torch.device("cpu"))
    prepared = list(train_set.batches(bs, shuffle=(0, 0), augment="affine"))
    loaders = {workers: affine_loader(train_set, bs, workers) for workers in timing.loader_workers()}
    plain, fast = new_model(channels_last=False), new_model()

    def ours(i):
        return train_set.batches(bs, shuffle=(0, i), augment="affine")

    ways = {f"usual, {n} workers, fp32": lambda i, n=n: train_epoch(loaders[n], *plain, False) for n in loaders}
    ways["ours, fp32"] = lambda i: train_epoch(ours(i), *plain, False)
    ways["ours, fp32, channels last"] = lambda i: train_epoch(ours(i), *fast, False)
    if native:
        ways["ours, bf16, channels last"] = lambda i: train_epoch(ours(i), *fast, True)
    ways["step alone"] = lambda i: train_epoch(prepared, *fast, native)
    rates = timing.turns(ways, args.rounds)
    usual = [max(pair) for pair in zip(*list(rates.values())[:2])]
    return [
        {
            "way": name,
            "images_per_s": statistics.median(values),
            "rates": values,
            "times_usual": timing.median_ratio(values, usual),
        }
        for name, values in rates.items()
    ]


def accuracy(args, parts):
    """Seconds and test accuracy of the best recipe, trained to the end in both ways, one seed per round."""
    train_set, _, test_set = parts
    native, epochs = run.native_bf16(torch.device("cpu")), args.epochs or BEST.epochs
    steps = -(-len(train_set) // BEST.bs)
    workers = timing.loader_workers()[-1]

    def whole_run(seed, usual):
        torch.manual_seed(seed)
        model, optimizer = new_model(channels_last=not usual)
        loader, began = affine_loader(train_set, BEST.bs, workers, seed) if usual else None, time.perf_counter()
        for i in range(epochs):
            batches = loader if usual else train_set.batches(BEST.bs, shuffle=(seed, i), augment="affine")

            def lr_at(step, i=i):
                progress = (i + step / steps) / epochs
                return BEST.lr * train.lr_factor(BEST.decay, progress, steps=epochs * steps)

            train_epoch(batches, model, optimizer, native and not usual, lr_at)
        seconds = time.perf_counter() - began
        return seconds, training.evaluate(model, *test_set.tensors())[1]

    usual_way = f"usual, {workers} workers, fp32"
    ways = {usual_way: lambda i: whole_run(i, True), "ours": lambda i: whole_run(i, False)}
    values = timing.turns(ways, args.rounds, warmup=0)
    usual = [seconds for seconds, _ in values[usual_way]]
    rows = []
    for name, pairs in values.items():
        seconds, accuracies = zip(*pairs)
        rows += [
            {
                "way": name,
                "seconds": statistics.median(seconds),
                "test_accuracy": statistics.mean(accuracies),
                "times_usual": 1 / timing.median_ratio(list(seconds), usual),
                "accuracies": accuracies,
            }
        ]
    return rows


def stack(args, parts):
    """Steps per second of K networks as a stack, relative to one network after another."""
    x, y = data.load_function("sinc")[0].tensors()
    images = parts[0].subset(128)
    cases = {
        "MLP of 572 parameters, 300 points": (lambda: MLP([1, 10, 18, 15, 4, 1]), x, y, (3, 10, 50, 100)),
        "MLP 784-64-10, 128 images": (lambda: MLP([784, 64, 10]), *images.subset(128, True).tensors(), (10,)),
        "small CNN, 128 images": (lambda: small_cnn(False), *images.tensors(), (10,)),
    }
    rows = []
    for case, (make, inputs, targets, sizes) in cases.items():
        for size in sizes:
            steps = max(10, 200 // size)

            def loss_of(outputs, targets=targets):
                if targets.is_floating_point():
                    return (outputs - targets).square().mean((-2, -1))
                labels = targets.expand(outputs.shape[:-1])
                return (
                    F.cross_entropy(outputs.movedim(-1, 1), labels, reduction="none").mean(-1)
                    if outputs.dim() == 3
                    else F.cross_entropy(outputs, labels)
                )

            def one_by_one(i, make=make, inputs=inputs, size=size, steps=steps, loss_of=loss_of):
                nets = [make() for _ in range(size)]
                optimizers = [torch.optim.Adam(net.parameters(), 1e-3, fused=True) for net in nets]
                began = time.perf_counter()
                for net, optimizer in zip(nets, optimizers):
                    for _ in range(steps):
                        loss = loss_of(net(inputs))
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                return time.perf_counter() - began

            def together(i, make=make, inputs=inputs, size=size, steps=steps, loss_of=loss_of):
                nets = training.Stack([make() for _ in range(size)])
                optimizer = torch.optim.Adam(list(nets.parameters.values()), 1e-3, fused=True)
                began = time.perf_counter()
                for _ in range(steps):
                    loss = loss_of(nets(inputs)).sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                return time.perf_counter() - began

            seconds = timing.turns({"one by one": one_by_one, "together": together}, args.rounds)
            rows.append(
                {
                    "case": case,
                    "networks": size,
                    "steps": steps,
                    "ms_per_step": 1e3 * statistics.median(seconds["together"]) / steps,
                    "times_faster": timing.median_ratio(seconds["one by one"], seconds["together"]),
                }
            )
    return rows


PARTS = {"epoch": epoch, "accuracy": accuracy, "stack": stack}


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    part: str = option("epoch", "the part that is timed", choices=list(PARTS))
    data: str = option("auto", "the images: mnist, ...", type=data.dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N examples of each part", above=0)
    epochs: int | None = option(None, "epochs of the part accuracy (default: the recipe's)", above=0)
    rounds: int = option(5, "turns of each way", above=0)
    out: str = option(
        str(run.ROOT / "out/simplenn/bench"), "folder for bench-PART.json", type=run.path_arg, metavar="DIR"
    )

    def check(self):
        if self.data in FUNCTIONS:
            raise run.UserError(f"--data {self.data}: bench.py times training on images")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    out = run.make_folder(args.out)
    *parts, facts = data.load(args.data, args.data_dir, args.limit)
    if len(parts[0].classes) != 10:
        raise run.UserError(f"--data {args.data}: has {len(parts[0].classes)} classes; bench.py is for ten")
    machine = run.environment(torch.device("cpu"), __file__)
    print(f"{args.part}, on {facts['name']}; {machine['device']['name']}, {machine['device']['threads']} threads")
    rows = PARTS[args.part](args, parts)
    for row in rows:
        words = []
        for name, value in row.items():
            if isinstance(value, float):
                words.append(f"{name} {value:,.4g}")
            elif not isinstance(value, list | tuple):
                words.append(f"{name} {value}")
        print("  ".join(words))
    given = {name: value for name, value in run.record_args(args).items() if value is not None}
    command = ["simplenn/bench.py", *to_argv(Options, given)]
    rows = [row | {"state": "done", "command": command} for row in rows]
    run.write_json(
        out / f"bench-{args.part}.json", {"bench": f"simplenn, {args.part}", **machine, "dataset": facts, "rows": rows}
    )
    return rows


if __name__ == "__main__":
    run.cli(main)
