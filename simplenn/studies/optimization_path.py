"""Where does training go? The weights of several trainings, projected onto their two principal components."""

import io
from typing import NamedTuple

from common import run

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.func import vmap

from model import MLP
from studies import hessian, tools, training


def pca(points: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Principal components of the rows of `points` (N, P) by the singular values of the centred matrix.

    Returns (mean (P,), components (count, P), fraction of the variance of each (count,)).
    """
    mean = points.mean(0)
    _, values, components = np.linalg.svd(points - mean, full_matrices=False)
    return mean, components[:count], values[:count] ** 2 / (values**2).sum()


def functions(ctx: tools.Context):
    """Eight trainings of one network of 572 parameters on the sinc, full-batch Adam; weights every 60 steps."""
    count, steps = ctx.pick(8, 3), ctx.pick(3000, 60)
    every = steps // 50 or 1
    train_set, _ = ctx.points("sinc")
    x, y = train_set.tensors()
    nets = []
    for seed in range(count):
        torch.manual_seed(seed)
        nets.append(MLP([1, 10, 18, 15, 4, 1], "tanh"))
    stack = training.Stack(nets)
    weights = []
    losses = []
    accuracies = []
    before = stack.vectors()
    for step, loss, outputs in training.fit_stack(stack, x, y, steps + 1, lr=0.003):
        if (step - 1) % every == 0:  # `loss` and `outputs` are from before the step, as `before` is
            weights.append(before)
            losses.append(loss)
            accuracies.append(((outputs - y).abs() <= 0.05).float().mean((1, 2)))
        before = stack.vectors()
    weights = torch.stack(weights, 1)  # (K, T, P)
    paths = Paths(weights, torch.stack(losses, 1), torch.stack(accuracies, 1), every, "step")
    f = hessian.flat_loss(nets[0], F.mse_loss, x, y)
    report(ctx, paths, f, "second layer", weights[:, :, columns_of(nets[0], "3.weight")])


def columns_of(net, name: str) -> slice:
    """The place of the parameter `name` in the vector of all parameters."""
    start = 0
    for other, p in net.named_parameters():
        if other == name:
            return slice(start, start + p.numel())
        start += p.numel()
    raise KeyError(name)


def train_one(train_set, seed, epochs):
    """Weights (T, P), losses (T,), accuracies (T,) after every epoch, the initial ones first."""
    torch.manual_seed(seed)
    net = MLP([784, 32, 10])
    x, y = train_set.tensors()
    weights = [hessian.vector_of(net)]
    evaluations = [training.evaluate(net, x, y)]
    steps = training.fit(net, x, y, epochs, 100, seed=seed)
    for _ in training.epochs_of(steps, max(1, len(x) // 100)):
        weights.append(hessian.vector_of(net))
        evaluations.append(training.evaluate(net, x, y))
    losses, accuracies = torch.tensor(evaluations).T
    return torch.stack(weights), losses, accuracies


def mnist(ctx: tools.Context):
    """Six trainings of an MLP 784-32-10 on 5,000 images, Adam; weights after every epoch. The layer is the last one."""
    train_set, _ = ctx.digits(5000)
    runs = ctx.map(train_one, [(train_set, seed, ctx.pick(20, 3)) for seed in ctx.seeds_of(6, 2)])
    weights, losses, accuracies = (torch.stack(values) for values in zip(*runs))
    x, y = train_set.tensors()
    f = hessian.flat_loss(MLP([784, 32, 10]), F.cross_entropy, x[:1000], y[:1000])
    report(ctx, Paths(weights, losses, accuracies, 1, "epoch"), f, "last layer", weights[:, :, -330:])


class Paths(NamedTuple):
    """K trainings at T times: weights (K, T, P), losses and accuracies (K, T). A time is every `every`-th `unit`."""

    weights: Tensor
    losses: Tensor
    accuracies: Tensor
    every: int
    unit: str


class Plane(NamedTuple):
    """The plane of the two principal components (2, P) through `mean` (P,): the fraction of the variance along each
    (2,), and the projected paths (K, T, 2)."""

    mean: np.ndarray
    components: np.ndarray
    fraction: np.ndarray
    tracks: np.ndarray


def plane_of(weights: Tensor) -> Plane:
    """The plane of paths (K, T, P)."""
    count, times, _ = weights.shape
    flat = weights.reshape(count * times, -1).double().numpy()
    mean, components, fraction = pca(flat)
    return Plane(mean, components, fraction, ((flat - mean) @ components.T).reshape(count, times, 2))


def report(ctx, paths: Paths, f, layer_name, layer):
    """The record, the figure and the animation. f: the loss as a function of all weights. layer: of all paths, the
    weights (K, T, L) of one layer."""
    plane = plane_of(paths.weights)
    plane_of_layer = plane_of(layer)
    grid, losses_on_plane = contours_on_plane(f, plane, ctx.pick(31, 7))
    rows = []
    for k, weights in enumerate(paths.weights):
        final = {
            "train_loss": paths.losses[k, -1].item(),
            "accuracy": paths.accuracies[k, -1].item(),
            "distance": (weights[-1] - weights[0]).norm().item(),
            "length": weights.diff(dim=0).norm(dim=1).sum().item(),
        }
        row = {"setting": "path", "seed": k, "path": plane.tracks[k], "path_of_layer": plane_of_layer.tracks[k]}
        rows.append(row | {"loss": paths.losses[k], "accuracy": paths.accuracies[k], "final": final})
    record = ctx.save(
        rows,
        draw,
        variance={"whole model": plane.fraction, layer_name: plane_of_layer.fraction},
        every=paths.every,
        unit=paths.unit,
        layer=layer_name,
        grid=grid,
        losses_on_plane=losses_on_plane,
    )
    run.write(ctx.out / f"{ctx.name}.gif", animate(record, ctx.pick(26, 3)))


def contours_on_plane(f, plane: Plane, size: int):
    """((x values, y values), losses (size, size)) on the plane, a little larger than the paths."""
    low = plane.tracks.min((0, 1))
    high = plane.tracks.max((0, 1))
    grid = [np.linspace(a - 0.15 * (b - a), b + 0.15 * (b - a), size) for a, b in zip(low, high)]
    xx, yy = np.meshgrid(*grid)
    first, second = plane.components
    w = torch.from_numpy(plane.mean + xx.reshape(-1, 1) * first + yy.reshape(-1, 1) * second).float()
    with torch.no_grad():
        return grid, torch.cat([vmap(f)(part) for part in w.split(8)]).view(size, size).numpy()


def draw(record):
    """The paths of the whole model on the losses of its plane, and those of one layer on the plane of the layer."""
    figure, axes = tools.panels(1, 2, height=4)
    whole, layer = record["variance"]
    contours = draw_contours(axes[0, 0], record)
    figure.colorbar(contours, ax=axes[0, 0], label="training loss on the plane", format="%.2g")
    draw_tracks(axes[0, 0], [row["path"] for row in record["rows"]], record["variance"][whole], whole)
    draw_tracks(axes[0, 1], [row["path_of_layer"] for row in record["rows"]], record["variance"][layer], layer)
    axes[0, 1].legend(fontsize=8)
    return figure


def draw_contours(axes, record):
    losses = np.array(record["losses_on_plane"])
    levels = np.geomspace(losses.min(), losses.max() * 1.001, 13)
    return axes.contourf(*record["grid"], losses, levels, norm="log", cmap="Greys", alpha=0.6)


def draw_tracks(axes, tracks: list, fractions: list[float], name: str):
    """The projected paths, from circles to dots. fractions: of the variance along each component."""
    for k, track in enumerate(tracks):
        x, y = np.transpose(track)
        axes.plot(x, y, color=f"C{k}", lw=1.5)
        axes.plot(x[0], y[0], "o", mfc="w", color=f"C{k}", ms=6, label="initial weights" if k == 0 else None)
        axes.plot(x[-1], y[-1], "o", color=f"C{k}", ms=6, label="trained weights" if k == 0 else None)
    axes.set(title=f"{name}: {sum(fractions):.0%} of the variance", xlabel="component 1", ylabel="component 2")
    axes.margins(0.12)


def animate(record: dict, frames: int) -> bytes:
    """A GIF of the paths as they grow."""
    images = []
    rows = record["rows"]
    for last in np.unique(np.linspace(0, len(rows[0]["path"]) - 1, frames).astype(int)):
        figure = Figure(figsize=(4.4, 3.6), layout="constrained")
        axes = figure.subplots()
        draw_contours(axes, record)
        for k, row in enumerate(rows):
            axes.plot(*np.transpose(row["path"][: last + 1]), "-", color=f"C{k}", lw=1.5)
            axes.plot(*row["path"][last], "o", color=f"C{k}", ms=5)
        accuracy = np.mean([row["accuracy"][last] for row in rows])
        title = f"{record['unit']} {last * record['every']}: mean accuracy {accuracy:.0%}"
        axes.set(title=title, xlabel="component 1", ylabel="component 2")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    palette = images[-1].quantize(64, Image.Quantize.FASTOCTREE)  # one for all: the colours of the runs stay
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    content = io.BytesIO()
    durations = [160] * (len(images) - 1) + [2500]
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)
    return content.getvalue()


PARTS = {"functions": functions, "mnist": mnist}
