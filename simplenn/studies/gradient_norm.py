"""Does a falling loss mean a falling gradient? Gradient norm and loss against iterations."""

import numpy as np
import torch

from model import MLP
from studies import tools, training

BLOCKS = 40  # points of a curve in the figure


def functions(ctx: tools.Context):
    """Full-batch Adam on the sinc, as in deep_vs_shallow: the norm of the exact gradient."""
    steps = ctx.pick(6000, 20)
    seeds = ctx.pick(5, 2)
    train_set, _ = ctx.points("sinc")
    nets = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        nets.append(MLP([1, 10, 18, 15, 4, 1]))
    stack = training.Stack(nets)
    losses = torch.empty(steps, seeds)
    norms = torch.empty(steps, seeds)
    for step, stack_losses, _ in training.fit_stack(stack, *train_set.tensors(), steps, lr=0.0012):
        losses[step - 1] = stack_losses
        norms[step - 1] = stack.gradient_norms()
    every = max(1, steps // 600)
    rows = [
        {
            "setting": "sinc",
            "seed": seed,
            "loss": losses[::every, seed].tolist(),
            "norm": norms[::every, seed].tolist(),
            "final": final_values(losses[:, seed], norms[:, seed]),
        }
        for seed in range(seeds)
    ]
    ctx.save(rows, draw, every=every)


def final_values(loss: torch.Tensor, norm: torch.Tensor) -> dict:
    """Means over the first and the last twentieth, and how often the norm rose while the loss fell."""
    n = max(1, len(loss) // 20)
    smooth = torch.stack([values[: len(values) // n * n].view(-1, n).mean(1) for values in (loss, norm)])
    falls, rises = smooth[0].diff() < 0, smooth[1].diff() > 0
    return {
        "loss_first": loss[:n].mean().item(),
        "loss_last": loss[-n:].mean().item(),
        "norm_first": norm[:n].mean().item(),
        "norm_last": norm[-n:].mean().item(),
        "rises_while_loss_falls": (falls & rises).float().sum().item() / max(1, falls.sum().item()),
    }


def train_one(train_set, seed, epochs):
    torch.manual_seed(seed)
    net, values = MLP([784, 64, 10]), []
    for _, loss in training.fit(net, *train_set.tensors(), epochs, 128, seed=seed):
        values.append((loss, torch.cat([p.grad.flatten() for p in net.parameters()]).norm()))
    loss, norm = (torch.stack(column) for column in zip(*values))
    return {
        "setting": "mnist",
        "seed": seed,
        "loss": loss.tolist(),
        "norm": norm.tolist(),
        "final": final_values(loss, norm),
    }


def mnist(ctx: tools.Context):
    """Adam on batches of 128 images: loss and norm of each batch."""
    train_set, _ = ctx.digits(10_000)
    rows = ctx.map(train_one, [(train_set, seed, ctx.pick(10, 2)) for seed in ctx.seeds_of()])
    every = max(1, len(rows[0]["loss"]) // 600)
    rows = [row | {k: row[k][::every] for k in ("loss", "norm")} for row in rows]
    ctx.save(rows, draw, every=every)


def draw(record):
    """Loss and gradient norm: of each block of steps the geometric mean, and a band from the lowest to the highest."""
    figure, axes = tools.panels(1, 2)
    every = record["every"]
    for i, row in enumerate(record["rows"]):
        for panel, name in zip(axes[0], ("loss", "norm")):
            values = np.log10(row[name])
            size = max(1, len(values) // BLOCKS)
            blocks = values[: len(values) // size * size].reshape(-1, size)
            x = (np.arange(len(blocks)) + 0.5) * size * every
            panel.fill_between(x, 10 ** blocks.min(1), 10 ** blocks.max(1), color=f"C{i}", alpha=0.12, lw=0)
            panel.plot(x, 10 ** blocks.mean(1), color=f"C{i}", label=f"seed {row['seed']}" if name == "loss" else None)
    title = f"mean and range of {size * every} iterations"
    axes[0, 0].set(xlabel="iteration", ylabel="training loss", yscale="log", title=title)
    axes[0, 1].set(xlabel="iteration", ylabel="norm of the gradient", yscale="log", title=title)
    tools.finish_axes(axes)
    if min(min(row["norm"]) for row in record["rows"]) > 0.01:
        for panel in axes[0]:
            tools.label_plainly(panel.yaxis)
    return figure


PARTS = {"functions": functions, "mnist": mnist}
