"""Do more parameters generalize worse? Widths from under a thousand to over a million parameters; double descent."""

from common import run

import torch

from model import MLP
from studies import tools, training
from studies.random_labels import randomize

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1300)  # 795 parameters a hidden unit, and 10
NOISY_WIDTHS = (4, 8, 12, 20, 30, 40, 50, 60, 80, 120, 200, 400)  # 4,000 images x 10 classes: at 50 units
NOISE = 0.2
INTERPOLATION = 40_000  # parameters: as many as 4,000 images have logits


def train_one(train_set, val_set, test_set, width, seed, epochs, bs, lr, noise=0.0):
    """One width: a row of the record, with the values of the last epoch and of the best validation epoch of
    those that are evaluated, evenly on a log scale."""
    torch.manual_seed(seed)
    net = MLP([784, width, 10])
    x, true_labels = train_set.tensors()
    y = randomize(true_labels, noise, 10, seed)
    evaluated_epochs = set(tools.log_steps(epochs, 30))
    points = []
    for epoch, _ in training.epochs_of(training.fit(net, x, y, epochs, bs, lr, seed), max(1, len(x) // bs)):
        if epoch in evaluated_epochs:
            _, val_accuracy = training.evaluate(net, *val_set.tensors())
            point = {"epoch": epoch, **training.evaluate_parts(net, (x, y), test_set.tensors())}
            points.append(point | {"val_accuracy": val_accuracy})
    return {
        "setting": f"{width} hidden units",
        "width": width,
        "seed": seed,
        "parameters": run.count_parameters(net),
        "noise": noise,
        "curves": training.curves_of(points),
        "final": points[-1],
        "early": max(points, key=lambda point: point["val_accuracy"]),
    }


def run_widths(ctx, widths, train, epochs, bs, lr, noise=0.0):
    train_set, test_set = ctx.digits(train + 2000, 5000)
    n = min(ctx.pick(train, 100), len(train_set) * 5 // 6)  # a small dataset leaves a sixth for validation
    val_set = train_set.replace(train_set.images[n:], train_set.labels[n:])
    train_set = train_set.subset(n)
    tasks = [
        (train_set, val_set, test_set, width, seed, ctx.pick(epochs, 4), bs, lr, noise)
        for seed in ctx.seeds_of()
        for width in ctx.pick(widths, widths[::4])
    ]
    return ctx.map(train_one, tasks)


def draw(record):
    figure, axes = tools.panels(1, 2)
    by_width = tools.groups(record["rows"], "parameters")
    noise = record["rows"][0]["noise"]
    title = f"{noise:.0%} of the labels are random" if noise else "true labels"
    lines = [("test", "final", "test, last epoch", "-"), ("train", "final", "training, last epoch", "--")]
    lines.append(("test", "early", "test, best validation epoch", ":"))
    for panel, quantity in zip(axes[0], ("loss", "accuracy")):
        for part, when, label, style in lines:
            values = [[row[when][f"{part}_{quantity}"] for row in runs] for runs in by_width.values()]
            tools.draw_band(panel, list(by_width), list(zip(*values)), label, style)
        if noise:
            panel.axvline(INTERPOLATION, color="k", lw=1, alpha=0.5)
        panel.set(xscale="log", xlabel="parameters", ylabel=quantity, title=title)
    axes[0, 0].set_yscale("log")
    tools.finish_axes(axes)
    return figure


def widths(ctx: tools.Context):
    """Eleven widths, 10,000 images with true labels, 20 epochs of Adam at 0.001, batches of 100."""
    rows = run_widths(ctx, WIDTHS, 10_000, 20, 100, 0.001)
    ctx.save(rows, draw)


def double_descent(ctx: tools.Context):
    """4,000 images, 20% of whose labels are random: 300 epochs of Adam at 0.002, batches of 200. The validation images,
    by which an epoch is chosen, have true labels."""
    rows = run_widths(ctx, NOISY_WIDTHS, 4000, 300, 200, 0.002, NOISE)
    ctx.save(rows, draw)


PARTS = {"widths": widths, "double_descent": double_descent}
