"""Deep against shallow networks with the same number of parameters, on two functions and on MNIST."""

import numpy as np
import torch
from torch import nn

from model import MLP, count_parameters
from studies import tools, training

MLPS = {
    "one hidden layer": [1, 190, 1],
    "four hidden layers": [1, 10, 18, 15, 4, 1],
    "seven hidden layers": [1, 5, 10, 10, 10, 10, 10, 5, 1],
}
FUNCTIONS = ("sinc", "square")
THRESHOLD = 0.001
REGULARIZATION = {"none": {}, "dropout 0.3": dict(dropout=0.3), "weight decay 0.3": dict(weight_decay=0.3)}


def functions(ctx: tools.Context):
    """Three MLPs of 571, 572 and 571 parameters: full-batch Adam at 0.0012 on 300 points, ten seeds each.

    All runs of an architecture, on both functions, train as one stack.
    """
    steps, seeds = ctx.pick(6000, 20), ctx.pick(10, 2)
    parts = {name: ctx.points(name) for name in FUNCTIONS}
    x, kept, rows, drawn = parts["sinc"][0].x, tools.log_steps(steps), [], {}
    for setting, sizes in MLPS.items():
        nets = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            nets += [MLP(sizes) for _ in FUNCTIONS]
        stack = training.Stack(nets)
        y = torch.stack([parts[name][0].y for _ in range(seeds) for name in FUNCTIONS])  # (K, N, 1)
        curves = torch.empty(steps, len(nets))
        for step, losses, _ in training.fit_stack(stack, x, y, steps, lr=0.0012):
            curves[step - 1] = losses
        with torch.no_grad():
            outputs = stack(x)
        hits = ((outputs - y).abs() <= 0.05).float().mean((1, 2)).tolist()
        final = (outputs - y).square().mean((1, 2)).tolist()
        for k in range(len(nets)):
            name, below = FUNCTIONS[k % 2], (curves[:, k] < THRESHOLD).nonzero()
            drawn.setdefault((name, setting), outputs[k, :, 0].numpy())
            rows.append(
                {
                    "setting": f"{name}, {setting}",
                    "function": name,
                    "network": setting,
                    "seed": k // 2,
                    "hidden_layers": len(sizes) - 2,
                    "parameters": count_parameters(nets[0]),
                    "curve": curves[kept - 1, k].tolist(),
                    "final": {
                        "train_loss": final[k],
                        "accuracy": hits[k],
                        "reached": len(below) > 0,
                        "epochs_to_threshold": int(below[0]) + 1 if len(below) else None,
                    },
                }
            )
    ctx.save(rows, draw_functions(rows, kept, parts, drawn), steps=kept.tolist(), threshold=THRESHOLD)


def draw_functions(rows, kept, parts, drawn):
    figure, axes = tools.panels(2, 3)
    for line, name in zip(axes, FUNCTIONS):
        mine = [row for row in rows if row["function"] == name]
        for i, (setting, same) in enumerate(tools.groups(mine, "network").items()):
            curves = np.log10([row["curve"] for row in same])
            middle, low, high = np.median(curves, 0), *np.quantile(curves, (0.1, 0.9), axis=0)
            line[0].plot(kept, 10**middle, label=f"{setting}, {same[0]['parameters']} parameters", color=f"C{i}")
            line[0].fill_between(kept, 10**low, 10**high, alpha=0.15, color=f"C{i}", lw=0)
            line[1].plot(parts[name][0].x[:, 0].numpy(), drawn[name, setting], lw=1, label=setting)
            values = [row["final"]["accuracy"] for row in same]
            line[2].plot([i] * len(values), values, "o", alpha=0.5, color=f"C{i}")
        line[0].axhline(THRESHOLD, color="k", ls=":", lw=1)
        line[0].set(
            xscale="log", yscale="log", xlabel="epoch", ylabel="training loss", title=f"{name}: median of seeds"
        )
        line[1].plot(parts[name][0].x[:, 0].numpy(), parts[name][0].y[:, 0].numpy(), "k:", lw=1, label="truth")
        line[1].set(xlabel="x", xticks=(-1, -0.5, 0, 0.5, 1), title="prediction of seed 0")
        line[2].set(ylabel="points within 0.05", ylim=(0, 1), title="accuracy, a dot for each seed")
        line[2].set_xticks(range(3), ["one", "four", "seven"])
        line[2].set_xlabel("hidden layers")
    tools.finish_axes(axes)
    return figure


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
        layers, last = [], 26
        for a, b in ((1, 17), (17, 26)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]  # -> (17, 14, 14), (26, 7, 7)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(last * 49, 10))


def train_cnn(train_set, test_set, convolutions, regularization, seed, epochs):
    """One CNN on MNIST: a row of the record."""
    torch.manual_seed(seed)
    options = REGULARIZATION[regularization]
    net = cnn(convolutions, options.get("dropout", 0.0)).to(memory_format=torch.channels_last)
    x, y = train_set.tensors()
    steps, curves = training.fit(net, x, y, epochs, 100, seed=seed, weight_decay=options.get("weight_decay", 0)), []
    for _ in training.epochs_of(steps, max(1, len(x) // 100)):
        curves.append([*training.evaluate(net, x, y), *training.evaluate(net, *test_set.tensors())])
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return {
        "setting": f"{convolutions} convolutions, {regularization}",
        "convolutions": convolutions,
        "regularization": regularization,
        "seed": seed,
        "parameters": count_parameters(net),
        "curves": dict(zip(names, map(list, zip(*curves)))),
        "final": dict(zip(names, curves[-1])),
    }


def mnist(ctx: tools.Context):
    """CNNs with one, two and four convolutions and equal parameters, on 5,000 images, with and without
    regularization. The test set is the subject here and chooses nothing."""
    train_set, test_set = ctx.digits(5000, 5000, flat=False)
    epochs = ctx.pick(10, 2)
    tasks = [
        (train_set, test_set, n, name, seed, epochs)
        for seed in range(ctx.seeds)
        for n in (1, 2, 4)
        for name in REGULARIZATION
    ]
    rows = ctx.map(train_cnn, tasks)
    figure, axes = tools.panels(2, 3)
    for column, name in enumerate(REGULARIZATION):
        mine = [row for row in rows if row["regularization"] == name]
        for n, same in tools.groups(mine, "convolutions").items():
            for row, quantity in enumerate(("loss", "accuracy")):
                x, color = range(1, epochs + 1), None
                for part, style in (("test", "-"), ("train", "--")):
                    curves = [r["curves"][f"{part}_{quantity}"] for r in same]
                    label = f"{n} convolutions, {same[0]['parameters']:,} parameters" if part == "test" else None
                    color = tools.draw_band(axes[row, column], x, curves, label, style, color)
                axes[row, column].set(xlabel="epoch", ylabel=f"{quantity}: test (dashed: training)")
        axes[0, column].set(title=f"regularization: {name}", yscale="log")
        axes[1, column].set(ylim=(0.9, 1.002) if not ctx.quick else None)
    tools.finish_axes(axes)
    ctx.save(rows, figure)


PARTS = {"functions": functions, "mnist": mnist}
