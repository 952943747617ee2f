"""Where does training go? The weights of several trainings, projected onto their two principal components."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch.func import vmap

from common import run  # isort: skip
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
    weights, accuracy, losses, before = [], [], [], stack.vectors()
    for step, loss, outputs in training.fit_stack(stack, x, y, steps + 1, lr=0.003):
        if (step - 1) % every == 0:  # `loss` and `outputs` are those before the step: take the weights of then
            losses.append(loss)
            accuracy.append(((outputs - y).abs() <= 0.05).float().mean((1, 2)))
            weights.append(before)
        before = stack.vectors()
    names = [name for name, _ in nets[0].named_parameters()]
    sizes = [p.numel() for p in nets[0].parameters()]
    start = sum(sizes[: names.index("3.weight")])
    paths = torch.stack(weights, 1)  # (K, T, P)
    layer = paths[:, :, start : start + sizes[names.index("3.weight")]]
    f = hessian.flat_loss(nets[0], F.mse_loss, x, y)
    report(ctx, paths, layer, "second layer", torch.stack(losses, 1), torch.stack(accuracy, 1), f, every, "step")


def train_one(train_set, seed, epochs):
    """Weights (T, P), losses (T,), accuracies (T,) after every epoch, the initial ones first."""
    torch.manual_seed(seed)
    net, (x, y) = MLP([784, 32, 10]), train_set.tensors()
    weights, values = [hessian.vector_of(net)], [training.evaluate(net, x, y)]
    for _ in training.epochs_of(training.fit(net, x, y, epochs, 100, seed=seed), max(1, len(x) // 100)):
        weights.append(hessian.vector_of(net))
        values.append(training.evaluate(net, x, y))
    return torch.stack(weights), *torch.tensor(values).T


def mnist(ctx: tools.Context):
    """Six trainings of an MLP 784-32-10 on 5,000 images, Adam; weights after every epoch. The layer is the last one."""
    train_set, _ = ctx.digits(5000)
    runs = ctx.map(train_one, [(train_set, seed, ctx.pick(20, 3)) for seed in range(ctx.pick(6, 2))])
    paths, losses, accuracy = (torch.stack(parts) for parts in zip(*runs))
    x, y = train_set.tensors()
    f = hessian.flat_loss(MLP([784, 32, 10]), F.cross_entropy, x[:1000], y[:1000])
    report(ctx, paths, paths[:, :, -330:], "last layer", losses, accuracy, f, 1, "epoch")


def report(ctx, paths, layer, layer_name, losses, accuracy, f, every, unit):
    """The record, the figure and the animation of paths (K, T, P)."""
    count, points, _ = paths.shape
    planes = {}
    for name, rows in (("whole model", paths), (layer_name, layer)):
        flat = rows.reshape(count * points, -1).double().numpy()
        mean, components, fraction = pca(flat)
        planes[name] = (mean, components, fraction, ((flat - mean) @ components.T).reshape(count, points, 2))
    mean, components, fraction, track = planes["whole model"]
    grid, z = contours_on_plane(f, mean, components, track, ctx.pick(31, 7))
    rows = [
        {
            "setting": "path",
            "seed": k,
            "path": track[k],
            "loss": losses[k],
            "accuracy": accuracy[k],
            "final": {
                "train_loss": losses[k, -1].item(),
                "accuracy": accuracy[k, -1].item(),
                "distance": (paths[k, -1] - paths[k, 0]).norm().item(),
                "length": paths[k].diff(dim=0).norm(dim=1).sum().item(),
            },
        }
        for k in range(count)
    ]
    figure, axes = tools.panels(1, 2, 5.4, 4.4)
    for one, (name, (_, _, share, path)) in zip(axes[0], planes.items()):
        if name == "whole model":
            draw_contours(figure, one, grid, z)
        for k in range(count):
            one.plot(*path[k].T, ".-", color=f"C{k}", ms=3, lw=1)
            label = f"{accuracy[k, -1]:.0%}" if ctx.name.endswith("functions") else f"{accuracy[k, -1]:.1%}"
            one.annotate(label, path[k, -1], fontsize=8, color="k", xytext=(3, 3), textcoords="offset points")
            one.plot(*path[k, 0], "o", mfc="w", color=f"C{k}", ms=5)
        one.set(title=f"{name}: the plane holds {share.sum():.0%} of the variance", xlabel="component 1")
        one.set_ylabel("component 2")
        one.margins(0.12)
    ctx.save(
        rows,
        figure,
        variance={name: plane[2] for name, plane in planes.items()},
        every=every,
        unit=unit,
        layer=layer_name,
    )
    run.write(ctx.out / f"{ctx.name}.gif", animate(grid, z, track, accuracy, every, unit, ctx.pick(26, 3)))


def contours_on_plane(f, mean, components, track, size):
    """((x values, y values), losses (size, size)) on the plane, a little larger than the paths."""
    low, high = track.min((0, 1)), track.max((0, 1))
    grid = [np.linspace(a - 0.15 * (b - a), b + 0.15 * (b - a), size) for a, b in zip(low, high)]
    xx, yy = np.meshgrid(*grid)
    w = torch.from_numpy(mean + xx.reshape(-1, 1) * components[0] + yy.reshape(-1, 1) * components[1]).float()
    with torch.no_grad():
        return grid, torch.cat([vmap(f)(part) for part in w.split(8)]).view(size, size).numpy()


def draw_contours(figure, axes, grid, z):
    z = np.log10(z)
    shown = axes.contourf(*grid, z, 20, cmap="Greys_r", alpha=0.8)
    if figure:
        figure.colorbar(shown, ax=axes, label="log10 of the training loss on the plane")


def animate(grid, z, track, accuracy, every, unit, frames) -> bytes:
    """A GIF of the paths as they grow."""
    images = []
    for last in np.unique(np.linspace(0, track.shape[1] - 1, frames).astype(int)):
        figure = Figure(figsize=(4.4, 3.6), layout="constrained")
        axes = figure.subplots()
        draw_contours(None, axes, grid, z)
        for k, path in enumerate(track):
            axes.plot(*path[: last + 1].T, "-", color=f"C{k}", lw=1.2)
            axes.plot(*path[last], "o", color=f"C{k}", ms=4)
        axes.set(title=f"{unit} {last * every}: mean accuracy {accuracy[:, last].mean():.0%}")
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
