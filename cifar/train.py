"""Train LeNet-5 on CIFAR-100 or SimpleNN on CIFAR-10.

    python cifar/train.py --lr 0.01 --bs 16                # LeNet-5, CIFAR-100, 10 epochs (the recipe `quick`)
    python cifar/train.py --recipe best                    # the best recipe found for LeNet-5
    python cifar/train.py --model simplenn --recipe best   # and for SimpleNN, on CIFAR-10
    python cifar/train.py --data builtin                   # a quick look without any download

Validation chooses the epoch; that checkpoint is tested once, at the end. The recipe sets every
hyper-parameter; flags override it.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

from common import run
from common.calibration import fit_temperature
from common.options import option
from common.schedules import lr_factor

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import AUGMENT, DATA_HELP, dataset_arg
from model import ACTIVATIONS, LeNet5, SimpleNN

DATASET = {"lenet5": "cifar100", "simplenn": "cifar10"}  # {model: what --data auto means}
RECIPE_NAMES = ["quick", "plain", "best", "tiny"]


@dataclass(kw_only=True)
class Options(run.TrainOptions):
    data: str = option("auto", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    recipe: str = option("quick", "a named set of hyper-parameters; flags override it", choices=RECIPE_NAMES)
    model: str = option("lenet5", "the network", choices=list(DATASET))
    epochs: int = option(10, "passes over the training set", above=0)
    bs: int = option(32, "batch size", above=0)
    lr: float = option(0.001, "learning rate; its peak, if it is scheduled", above=0)
    decay: str = option("none", "schedule of the learning rate", choices=["none", "step", "cosine", "onecycle"])
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    nesterov: bool = option(False, "Nesterov's momentum")
    augment: str = option(
        "none",
        "augmentation of the training images; without a value: crop+flip",
        choices=AUGMENT,
        nargs="?",
        const="crop+flip",
        off="none",
    )
    l1: float = option(0.0, "strength of the L1 penalty", at_least=0)
    weight_decay: float = option(0.0, "weight decay (L2 penalty)", at_least=0, names=["--l2"])
    label_smoothing: float = option(0.0, "share of the target spread evenly over all classes", at_least=0, below=1)
    bn: bool = option(False, "batch normalization", only="simplenn")
    activation: str = option("relu", "after each layer", choices=list(ACTIVATIONS), only="simplenn")

    variant: ClassVar[str] = "model"

    def check(self):
        if self.nesterov and not self.momentum:
            raise run.UserError("--nesterov: needs a --momentum above 0")


PLAIN = Options()
BEST = replace(PLAIN, bs=128, decay="onecycle", augment="crop+flip", weight_decay=5e-4, nesterov=True)
QUICK = replace(PLAIN, lr=0.01, bs=16, decay="onecycle", augment="flip", label_smoothing=0.1, momentum=0.7)
TINY = replace(PLAIN, epochs=2, lr=0.01)  # a second, for tests
RECIPES = {
    "quick": {"lenet5": QUICK, "simplenn": replace(QUICK, bn=True, activation="swish")},
    "plain": dict.fromkeys(DATASET, PLAIN),
    "best": {
        "lenet5": replace(BEST, epochs=90, lr=0.02, label_smoothing=0.1),
        "simplenn": replace(BEST, epochs=30, lr=0.05, bn=True, activation="swish"),
    },
    "tiny": dict.fromkeys(DATASET, TINY),
}
AUTO_PRECISION = "fp32"  # bench.py: these networks are too small to gain from bfloat16
AUTO_THREADS = 1  # tools/seconds.py: a second thread gains a tenth if the machine is idle, and loses more if not


def build_model(args, num_classes):
    if args.model == "lenet5":
        return LeNet5(num_classes)
    return SimpleNN(num_classes, args.bn, args.activation)


def train(args, r, model, train_set, val_set):
    """Train, and leave in the run folder last.pt, best.pt (the highest validation accuracy) and metrics.csv."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=args.nesterov,
        fused=r.device.type in ("cpu", "cuda"),
    )
    n = len(train_set)
    steps = math.ceil(n / args.bs)
    first_epoch = 0
    best = -1.0
    if state := r.load(model=model, optimizer=optimizer):
        first_epoch, best = state["epoch"], state["best"]

    for epoch in range(first_epoch, args.epochs):
        model.train()
        began = time.monotonic()
        losses = torch.zeros(steps, device=r.device)  # kept on the device: `.item()` at each step would stall a GPU
        correct = torch.zeros((), dtype=torch.int64, device=r.device)
        batches = train_set.batches(args.bs, shuffle=(args.seed, epoch), augment=args.augment)
        bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, leave=False, disable=None)
        for step, (images, labels) in enumerate(bar):
            progress = (epoch + step / steps) / args.epochs
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(args.decay, progress, steps=args.epochs * steps)
            with r.autocast():
                logits, _ = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
                if args.l1:  # the L1 penalty: the sum of absolute weights, a constant pull towards zero
                    loss = loss + args.l1 * sum(p.abs().sum() for p in model.parameters())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            losses[step] = loss.detach() * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                r.check_finite(losses[: step + 1], epoch * steps)
                seen = min((step + 1) * args.bs, n)
                bar.set_postfix(loss=f"{losses.sum().item() / seen:.3f}", accuracy=f"{correct.item() / seen:.1%}")

        seconds = time.monotonic() - began
        train_loss, train_accuracy = losses.sum().item() / n, correct.item() / n
        val_loss, val_accuracy, _ = evaluate(model, val_set, r)
        r.check_finite(torch.tensor([val_loss]), (epoch + 1) * steps)
        r.log(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "train_accuracy": train_accuracy,
                "val_accuracy": val_accuracy,
                "lr": optimizer.param_groups[0]["lr"],
                "epoch_seconds": round(seconds, 2),
            }
        )
        r.print(
            f"epoch {epoch + 1:>3}/{args.epochs}   loss {train_loss:.3f} train {val_loss:.3f} val   accuracy "
            f"{train_accuracy:.1%} train {val_accuracy:.1%} val   {n / seconds:,.0f} images/s"
        )
        if val_accuracy > best:
            best = val_accuracy
            r.save_best(model=model, epoch=epoch + 1, classes=train_set.classes, mean=train_set.mean, std=train_set.std)
        r.save(model=model, optimizer=optimizer, epoch=epoch + 1, best=best)


@torch.no_grad()
def evaluate(model, dataset, r):
    """(mean cross-entropy, accuracy, logits (N, classes)) of the model on a dataset."""
    model.eval()
    with r.autocast():
        logits = torch.cat([model(images)[0] for images, _ in dataset.batches(1000)]).float()
    correct = (logits.argmax(1) == dataset.labels).sum().item()
    return F.cross_entropy(logits, dataset.labels).item(), correct / len(dataset), logits


def draw_predictions(dataset, logits, rows=3, columns=8):
    """A figure of the first images with the predicted class, and the true class if that is wrong."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.15 * columns, 1.4 * rows), layout="constrained")
    predicted = logits.argmax(1).tolist()
    for i, axes in zip(range(len(dataset)), np.ravel(figure.subplots(rows, columns))):
        true_class = int(dataset.labels[i])
        axes.imshow(dataset.images[i].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        truth, guess = (run.plain_text(dataset.classes[k].replace("_", " ")) for k in (true_class, predicted[i]))
        right = predicted[i] == true_class
        colour = "tab:green" if right else "tab:red"
        axes.set_title(guess if right else f"{guess}\n(is {truth})", fontsize=7.5, color=colour)
    for axes in figure.axes:
        axes.axis("off")
    return figure


def recipe(given: dict) -> Options:
    """The recipe of the model that the flags `given` name."""
    name, model = given.get("recipe", "quick"), given.get("model", "lenet5")
    return replace(RECIPES[name][model], recipe=name, model=model)


def parse(argv=None) -> Options:
    return run.parse_options(__file__, Options, argv, recipe, extendable=lambda args: args.decay == "none")


def main(argv=None):
    args = parse(argv)
    train_set, val_set, test_set, facts = data.load(args.data, args.data_dir, args.limit, auto=DATASET[args.model])
    args.data = facts["name"] if args.data == "auto" else args.data
    with run.Run(args, __file__, f"{facts['name']}-{args.model}", AUTO_PRECISION, AUTO_THREADS) as r:
        train_set, val_set, test_set = (part.to(r.device) for part in (train_set, val_set, test_set))
        model = build_model(args, len(train_set.classes))
        model = model.to(r.device, memory_format=torch.channels_last)  # faster, see bench.py
        parameters = run.count_parameters(model)
        r.note(
            f"{args.model}, {parameters / 1e6:.6f} M parameters, on {facts['name']}: {len(train_set):,} "
            f"training images, {len(val_set):,} validation images",
            dataset=facts,
            parameters=parameters,
        )
        train(args, r, model, train_set, val_set)
        penalty = args.l1 * sum(p.abs().sum().item() for p in model.parameters())  # of the last weights, not the best
        uniform_loss = math.log(len(train_set.classes)) + penalty

        best = r.load_best(model=model)
        val_loss, val_accuracy, val_logits = evaluate(model, val_set, r)
        test_loss, test_accuracy, logits = evaluate(model, test_set, r)
        r.figure("predictions.png", draw_predictions(test_set, logits))
        r.finish(
            f"test accuracy {test_accuracy:.2%} with the weights of epoch {best['epoch']} (validation "
            f"{val_accuracy:.2%})",
            uniform_loss=uniform_loss,
            best_epoch=best["epoch"],
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            temperature=fit_temperature(val_logits, val_set.labels),
            test_loss=test_loss,
            test_accuracy=test_accuracy,
        )
    return r.record


if __name__ == "__main__":
    run.cli(main)
