"""Deep against shallow networks with the same number of parameters, on two functions and on MNIST."""

import itertools

from common import run

import numpy as np
import torch
from torch import nn

from model import MLP
from studies import tools, training

MLPS = {
    "one hidden layer": [1, 190, 1],
    "four hidden layers": [1, 10, 18, 15, 4, 1],
    "seven hidden layers": [1, 5, 10, 10, 10, 10, 10, 5, 1],
}
FUNCTIONS = ("sinc", "square")
VARIANTS = {  # what all networks have in common
    "ReLU": dict(activation="relu"),
    "LeakyReLU": dict(activation="leaky"),
    "LeakyReLU, weight decay": dict(activation="leaky", weight_decay=1e-4),
}
DRAWN = {"ReLU": "none", "LeakyReLU": "full"}  # variants in the figure, and how their dots are filled
THRESHOLD = 0.001
REGULARIZATION = {"none": {}, "dropout 0.3": dict(dropout=0.3), "weight decay 0.3": dict(weight_decay=0.3)}


def functions(ctx: tools.Context):
    """Three MLPs of 571, 572 and 571 parameters: full-batch Adam at 0.0012 on 300 points, ten seeds each, with ReLU,
    with LeakyReLU, and with LeakyReLU and weight decay.

    All runs of an architecture and a variant, on both functions, train as one stack.
    """
    steps = ctx.pick(6000, 20)
    seeds = ctx.pick(10, 2)
    logged = tools.log_steps(steps)
    train_sets = {name: ctx.points(name)[0] for name in FUNCTIONS}
    rows = []
    predictions = {name: {"x": points.x[::3, 0], "truth": points.y[::3, 0]} for name, points in train_sets.items()}
    for variant, options in VARIANTS.items():
        for network, sizes in MLPS.items():
            parameters, targets, losses, outputs = train_stack(sizes, train_sets, steps, seeds, **options)
            members = itertools.product(range(seeds), FUNCTIONS)  # in the order of the stack
            for k, (seed, name) in enumerate(members):
                row = {
                    "setting": f"{name}, {network}, {variant}",
                    "function": name,
                    "network": network,
                    "variant": variant,
                    "seed": seed,
                    "hidden_layers": len(sizes) - 2,
                    "parameters": parameters,
                    "curve": losses[logged - 1, k].tolist(),
                    "final": final_of(losses[:, k], outputs[k], targets[k]),
                }
                rows.append(row)
                if seed == 0:
                    predictions[name][f"{network}, {variant}"] = outputs[k, ::3, 0]
    ctx.save(rows, draw_functions, steps=logged.tolist(), threshold=THRESHOLD, predictions=predictions)


def final_of(losses, outputs, targets) -> dict:
    """The results of one network: losses (steps,), of each step; outputs (N, 1) after training, and targets (N, 1)."""
    below = (losses < THRESHOLD).nonzero()
    return {
        "train_loss": (outputs - targets).square().mean().item(),
        "accuracy": ((outputs - targets).abs() <= 0.05).float().mean().item(),
        "reached": len(below) > 0,
        "epochs_to_threshold": int(below[0]) + 1 if len(below) else None,
    }


def train_stack(sizes, train_sets, steps, seeds, activation, weight_decay=0.0):
    """K networks, one per seed and function, trained as one stack of N points each.

    Returns (parameters of one network, targets (K, N, 1), losses (steps, K), outputs after training (K, N, 1)).
    """
    nets = []
    targets = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name in FUNCTIONS:
            nets.append(MLP(sizes, activation))
            targets.append(train_sets[name].y)
    x = train_sets["sinc"].x  # (N, 1), the same for all functions
    y = torch.stack(targets)
    stack = training.Stack(nets)
    curves = torch.empty(steps, len(nets))
    for step, losses, _ in training.fit_stack(stack, x, y, steps, lr=0.0012, weight_decay=weight_decay):
        curves[step - 1] = losses
    with torch.no_grad():
        return run.count_parameters(nets[0]), y, curves, stack(x)


def draw_functions(record):
    """A line of panels per function: losses with ReLU and with LeakyReLU, predictions of seed 0, accuracies."""
    figure, axes = tools.panels(2, 4)
    for line, (name, points) in zip(axes, record["predictions"].items()):
        of_function = [row for row in record["rows"] if row["function"] == name]
        variants = tools.groups(of_function, "variant")
        for panel, variant in zip(line, DRAWN):
            draw_losses(panel, record, variants[variant])
            panel.set_title(f"{name}, {variant}")
        line[0].set_ylabel("training loss, median of seeds")
        line[1].sharey(line[0])
        draw_predictions(line[2], points, "LeakyReLU")
        draw_accuracies(line[3], {variant: variants[variant] for variant in DRAWN})
    for variant, fill in DRAWN.items():
        axes[0, 3].plot([], [], "ko", alpha=0.5, fillstyle=fill, label=variant)
    for panel in axes[-1, :2]:
        panel.set_xlabel("epoch")
    axes[-1, 2].set_xlabel("x")
    axes[-1, 3].set_xlabel("hidden layers")
    tools.finish_axes(axes)
    return figure


def draw_losses(panel, record, rows):
    """The median of each network, and a band from 10% to 90% of its seeds."""
    steps = record["steps"]
    for i, (network, runs) in enumerate(tools.groups(rows, "network").items()):
        losses = np.log10([row["curve"] for row in runs])
        low, middle, high = np.quantile(losses, (0.1, 0.5, 0.9), axis=0)
        panel.plot(steps, 10**middle, label=network.split()[0], color=f"C{i}")
        panel.fill_between(steps, 10**low, 10**high, alpha=0.15, color=f"C{i}", lw=0)
    panel.axhline(record["threshold"], color="k", ls=":", lw=1)
    panel.set(xscale="log", yscale="log")


def draw_predictions(panel, points, variant):
    """The outputs of seed 0 of each network."""
    for i, network in enumerate(MLPS):
        panel.plot(points["x"], points[f"{network}, {variant}"], lw=1, color=f"C{i}")
    panel.plot(points["x"], points["truth"], "k:", lw=1, label="truth")
    panel.set(xticks=(-1, 0, 1), title=f"seed 0, {variant}")


def draw_accuracies(panel, variants):
    """A dot for each seed: hollow with ReLU, full with LeakyReLU."""
    for side, (variant, rows) in zip((-0.13, 0.13), variants.items()):
        for i, runs in enumerate(tools.groups(rows, "network").values()):
            accuracies = [row["final"]["accuracy"] for row in runs]
            places = [i + side] * len(runs)
            panel.plot(places, accuracies, "o", alpha=0.5, color=f"C{i}", fillstyle=DRAWN[variant])
    panel.set(ylabel="points within 0.05", ylim=(0, 1.02), title="a dot for each seed")
    panel.set_xticks(range(len(MLPS)), [network.split()[0] for network in MLPS])


def cnn(convolutions: int, dropout: float = 0.0) -> nn.Module:
    """A CNN with one, two or four convolutions and about 25,600 parameters."""
    if convolutions == 1:
        layers = [nn.Conv2d(1, 50, 5, padding=2), nn.ReLU(), nn.MaxPool2d(4)]  # -> (50, 7, 7)
        last = 50
    elif convolutions == 2:
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # -> (16, 14, 14)
        layers += [nn.Conv2d(16, 40, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # -> (40, 7, 7)
        last = 40
    else:
        layers = []
        last = 26
        for a, b in ((1, 17), (17, last)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]  # -> (17, 14, 14), (26, 7, 7)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(last * 49, 10))


def train_cnn(train_set, test_set, convolutions, regularization, seed, epochs):
    """One CNN on MNIST: a row of the record."""
    torch.manual_seed(seed)
    options = REGULARIZATION[regularization]
    net = cnn(convolutions, options.get("dropout", 0.0)).to(memory_format=torch.channels_last)
    x, y = train_set.tensors()
    steps = training.fit(net, x, y, epochs, 100, seed=seed, weight_decay=options.get("weight_decay", 0))
    points = []
    for _ in training.epochs_of(steps, max(1, len(x) // 100)):
        points.append(training.evaluate_parts(net, (x, y), test_set.tensors()))
    return {
        "setting": f"{convolutions} convolutions, {regularization}",
        "convolutions": convolutions,
        "regularization": regularization,
        "seed": seed,
        "parameters": run.count_parameters(net),
        "curves": training.curves_of(points),
        "final": points[-1],
    }


def mnist(ctx: tools.Context):
    """CNNs with one, two and four convolutions and equal parameters, on 5,000 images, with and without
    regularization. The test set is the subject here and chooses nothing."""
    train_set, test_set = ctx.digits(5000, 5000, flat=False)
    epochs = ctx.pick(10, 2)
    tasks = [
        (train_set, test_set, n, name, seed, epochs)
        for seed in ctx.seeds_of()
        for n in (1, 2, 4)
        for name in REGULARIZATION
    ]
    ctx.save(ctx.map(train_cnn, tasks), draw_mnist)


def draw_mnist(record):
    """A column of panels per regularization: losses and accuracies."""
    figure, axes = tools.panels(2, 3)
    for column, name in enumerate(REGULARIZATION):
        regularized = [row for row in record["rows"] if row["regularization"] == name]
        for n, runs in tools.groups(regularized, "convolutions").items():
            label = f"{n} convolution{'s' if n > 1 else ''}"
            for panel, quantity in zip(axes[:, column], ("loss", "accuracy")):
                test, train = ([row["curves"][f"{part}_{quantity}"] for row in runs] for part in ("test", "train"))
                x = range(1, len(test[0]) + 1)
                color = tools.draw_band(panel, x, test, label)
                tools.draw_band(panel, x, train, None, "--", color)
                panel.set(xlabel="epoch")
        axes[0, column].set(title=name if name != "none" else "no regularization", yscale="log")
        if not record["quick"]:
            axes[0, column].set(ylim=(0.01, 0.7))
            axes[1, column].set(ylim=(0.9, 1.002))
        tools.label_plainly(axes[0, column].yaxis)
    axes[0, 0].set_ylabel("loss: test (dashed: training)")
    axes[1, 0].set_ylabel("accuracy: test (dashed: training)")
    tools.finish_axes(axes)
    return figure


PARTS = {"functions": functions, "mnist": mnist}
