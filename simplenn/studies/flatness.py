"""Does a large batch find a sharper minimum? Lines between minima, and loss surfaces around them."""

import copy

import numpy as np
import torch
from torch import nn

from studies import tools, training

BATCHES = {"batch size 64": dict(bs=64), "batch size 1024": dict(bs=1024)}
RATES = {"learning rate 0.0005": dict(lr=5e-4), "learning rate 0.005": dict(lr=5e-3)}
PAIRS = {"batch size": BATCHES, "learning rate": RATES, "batch size, with batch normalization": BATCHES}
MINIMA = BATCHES | RATES


def network(bn: bool) -> nn.Module:
    """A small CNN for 28 x 28 images, 26,826 parameters, and 48 more with batch normalization."""
    norm = nn.BatchNorm2d if bn else nn.Identity
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        norm(8),
        nn.ReLU(),  # -> (8, 14, 14)
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        norm(16),
        nn.ReLU(),  # -> (16, 7, 7)
        nn.Flatten(),
        nn.Linear(784, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def train_minimum(train_set, options, bn, seed, epochs):
    """A trained network; the two of a pair begin with the same weights."""
    torch.manual_seed(seed)
    net = network(bn)
    bs = options.get("bs", 128)
    lr = options.get("lr", 1e-3)
    for _ in training.fit(net, *train_set.tensors(), epochs, bs, lr, seed):
        pass
    return net


def set_parameters(net, parameters):
    with torch.no_grad():
        for p, value in zip(net.parameters(), parameters):
            p.copy_(value)


@torch.no_grad()
def recompute_statistics(net, x):
    """Set the running statistics of batch normalization to the statistics of x under the network's present weights."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    if norms:
        net.train()
        for part in x.split(1000):
            net(part)
        net.eval()


def along_line(train_set, test_set, pair, seed, epochs, alphas):
    """Loss and accuracy at (1 - a) w1 + a w2: a row of the record."""
    bn = "normalization" in pair
    nets = [train_minimum(train_set, options, bn, seed, epochs) for options in PAIRS[pair].values()]
    w1, w2 = ([p.detach() for p in net.parameters()] for net in nets)
    between = copy.deepcopy(nets[0])
    x, y = train_set.tensors()
    points = {}  # {a: losses and accuracies}
    for a in alphas:
        set_parameters(between, [torch.lerp(p, q, a) for p, q in zip(w1, w2)])
        recompute_statistics(between, x)
        points[a] = training.evaluate_parts(between, (x, y), test_set.tensors())
    final = {}
    # `outside`: half the distance beyond the minimum, away from the other one
    for label, minimum, outside in (("first", 0.0, -0.5), ("second", 1.0, 1.5)):
        final |= {f"{name}_{label}": value for name, value in points[minimum].items()}
        final[f"rise_{label}"] = points[outside]["train_loss"] - points[minimum]["train_loss"]
    highest = max(point["train_loss"] for a, point in points.items() if 0 <= a <= 1)
    final["barrier"] = highest - max(final["train_loss_first"], final["train_loss_second"])
    curves = training.curves_of(list(points.values()))
    return {"setting": pair, "seed": seed, "curves": curves, "final": final}


def line(ctx: tools.Context):
    """Two minima from the same initial weights, 10,000 images, 20 epochs of Adam; a from -1 to 2."""
    train_set, test_set = ctx.digits(10_000, 5000, flat=False)
    alphas = np.linspace(-1, 2, ctx.pick(31, 7)).round(3).tolist()
    tasks = [(train_set, test_set, pair, seed, ctx.pick(20, 2), alphas) for seed in ctx.seeds_of() for pair in PAIRS]
    ctx.save(ctx.map(along_line, tasks), draw_line, alphas=alphas)


def draw_line(record):
    """A column of panels per pair of networks: loss and accuracy along the line."""
    figure, axes = tools.panels(2, len(PAIRS))
    for column, (pair, runs) in enumerate(tools.groups(record["rows"], "setting").items()):
        first, second = PAIRS[pair]
        for panel, quantity in zip(axes[:, column], ("loss", "accuracy")):
            train, test = ([row["curves"][f"{part}_{quantity}"] for row in runs] for part in ("train", "test"))
            tools.draw_band(panel, record["alphas"], train, "training", "--")
            tools.draw_band(panel, record["alphas"], test, "test")
            for a in (0, 1):
                panel.axvline(a, color="k", lw=0.7, alpha=0.5)
            panel.set(xlabel=f"a\n0: {first}\n1: {second}", ylabel=quantity)
        axes[0, column].set(title=pair.replace(", ", ",\n"), yscale="log")
    tools.finish_axes(axes)
    return figure


def filter_normalized(parameters, generator):
    """A random direction whose filters have the norms of the filters of `parameters` (Li et al. 2018, section 4).

    A filter is a row of a weight. Biases and batch normalization stay as they are.
    """
    direction = []
    for p in parameters:
        d = torch.zeros_like(p)
        if p.dim() > 1:
            d = torch.randn(p.shape, generator=generator)
            d = d * (p.flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)).view(-1, *[1] * (p.dim() - 1))
        direction.append(d)
    return direction


def around_minimum(train_set, name, seed, epochs, directions, radii, grid):
    """The mean rise of the loss along filter-normalized directions; for seed 0 a surface too: a row of the record."""
    net = train_minimum(train_set, MINIMA[name], False, seed, epochs)
    x, y = (values[:2000] for values in train_set.tensors())
    w = [p.detach().clone() for p in net.parameters()]
    generator = torch.Generator().manual_seed(seed)
    center, _ = training.evaluate(net, x, y)

    def loss_at(parameters):
        set_parameters(net, parameters)
        loss, _ = training.evaluate(net, x, y)
        return loss

    rises = np.zeros((directions, len(radii)))
    for i in range(directions):
        d = filter_normalized(w, generator)
        for k, radius in enumerate(radii):
            rises[i, k] = loss_at([p + radius * q for p, q in zip(w, d)]) - center
    mean_rises = rises.mean(0).tolist()
    surface = None
    if seed == 0:
        d = filter_normalized(w, generator)
        e = filter_normalized(w, generator)
        surface = [[loss_at([p + a * q + b * r for p, q, r in zip(w, d, e)]) for a in grid] for b in grid]
    final = {"train_loss": center, "weight_norm": torch.cat([p.flatten() for p in w]).norm().item()}
    for radius, rise in zip(radii, mean_rises):
        final[f"rise_{round(100 * radius)}_percent"] = rise
    return {"setting": name, "seed": seed, "rises": mean_rises, "surface": surface, "final": final}


def surface(ctx: tools.Context):
    """Loss along filter-normalized random directions around the minima of both batch sizes and learning rates."""
    train_set, _ = ctx.digits(10_000, flat=False)
    radii = [0.1, 0.2, 0.3, 0.4, 0.5]
    grid = np.linspace(-1, 1, ctx.pick(21, 5)).round(3).tolist()
    tasks = [
        (train_set, name, seed, ctx.pick(20, 2), ctx.pick(20, 2), radii, grid)
        for seed in ctx.seeds_of()
        for name in MINIMA
    ]
    ctx.save(ctx.map(around_minimum, tasks), draw_surface, radii=radii, grid=grid)


def draw_surface(record):
    """The surfaces of seed 0 around the minima of both batch sizes, and the mean rise of the loss around all four."""
    figure, axes = tools.panels(1, 3)
    levels = np.geomspace(0.003, 10, 18)
    grid = record["grid"]
    for panel, row in zip(axes[0], record["rows"][:2]):
        z = np.clip(row["surface"], levels[0], levels[-1])
        contours = panel.contourf(grid, grid, z, levels, norm="log", cmap="viridis")
        panel.set(title=row["setting"], xlabel="direction 1", ylabel="direction 2", aspect="equal")
    bar = figure.colorbar(contours, ax=axes[0, :2].tolist(), ticks=[0.01, 0.1, 1, 10], label="training loss")
    bar.ax.set_yticklabels(["0.01", "0.1", "1", "10"])
    for name, runs in tools.groups(record["rows"], "setting").items():
        tools.draw_band(axes[0, 2], record["radii"], [row["rises"] for row in runs], name)
    axes[0, 2].set(xlabel="distance, in filter norms", ylabel="mean rise of the training loss", yscale="log")
    tools.finish_axes(axes[0, 2])
    return figure


PARTS = {"line": line, "surface": surface}
