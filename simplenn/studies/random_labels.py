"""Can a network fit shuffled labels (Zhang et al. 2017)?

A fraction of the labels of 10,000 training images is random. The labels of the test images stay true.
"""

from common import run

import numpy as np
import torch

from model import MLP
from studies import tools, training

FRACTIONS = (0.0, 0.25, 0.5, 1.0)


def randomize(labels: torch.Tensor, fraction: float, classes: int, seed: int) -> torch.Tensor:
    """Labels (N,) of which a random `fraction` is replaced by labels drawn uniformly; some of these are still true."""
    # not `seed` itself: with seed 0 that would also be the order of the images in the first epoch
    generator = torch.Generator().manual_seed(run.seed_at(seed, 1 << 23))
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    labels = labels.clone()
    labels[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return labels


def train_one(train_set, test_set, fraction, seed, epochs, hidden, target):
    """Train until the loss on the training set is below `target`: a row of the record."""
    torch.manual_seed(seed)
    net = MLP([784, hidden, 10])
    x, true_labels = train_set.tensors()
    y = randomize(true_labels, fraction, 10, seed)
    points = []
    for _ in training.epochs_of(training.fit(net, x, y, epochs, 250, seed=seed), max(1, len(x) // 250)):
        points.append(training.evaluate_parts(net, (x, y), test_set.tensors()))
        if points[-1]["train_loss"] < target:
            break
    curves = training.curves_of(points)
    final = points[-1] | {
        "epochs": len(points),
        "fitted": points[-1]["train_loss"] < target,
        "test_loss_first": curves["test_loss"][0],
        "test_loss_lowest": min(curves["test_loss"]),
    }
    return {
        "setting": f"{fraction:.0%} random",
        "fraction": fraction,
        "seed": seed,
        "curves": curves,
        "parameters": run.count_parameters(net),
        "final": final,
    }


def mnist(ctx: tools.Context):
    """A network 784-512-10, Adam at 0.001 and batches of 250, until the training loss is below 0.01."""
    train_set, test_set = ctx.digits(10_000)
    target = ctx.pick(0.01, 0.5)
    epochs = ctx.pick(300, 3)
    hidden = ctx.pick(512, 32)
    tasks = [
        (train_set, test_set, fraction, seed, epochs, hidden, target)
        for seed in ctx.seeds_of()
        for fraction in FRACTIONS
    ]
    ctx.save(ctx.map(train_one, tasks), draw, target=target)


def draw(record):
    figure, axes = tools.panels(1, 3)
    for i, runs in enumerate(tools.groups(record["rows"], "fraction").values()):
        for row in runs:
            label = row["setting"] if row is runs[0] else None
            for panel, name in zip(axes[0], ("train_loss", "test_loss", "test_accuracy")):
                values = row["curves"][name]
                panel.plot(np.arange(1, len(values) + 1), values, color=f"C{i}", lw=1, label=label)
    labels = ("training loss, given labels", "test loss, true labels", "test accuracy")
    for panel, name in zip(axes[0], labels):
        panel.set(xscale="log", xlabel="epoch", ylabel=name, yscale="linear" if "accuracy" in name else "log")
        panel.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


PARTS = {"mnist": mnist}
