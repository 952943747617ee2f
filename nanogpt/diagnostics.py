"""Debugging that teaches: the first loss, causality, gradient norms and update-to-weight ratios of every layer."""

import math
from collections.abc import Callable

from common.run import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def check_start(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The first loss on x, y (B, T). Raises UserError if it is far from that of a uniform prediction, ln V, or if the
    model is not causal: wrong targets or initial weights that are too large show here, before any training."""
    model.eval()
    loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten()).item()
    uniform = math.log(model.vocab_size)
    if not abs(loss - uniform) < 0.3:
        raise UserError(
            f"the first loss is {loss:.3f}, but a uniform prediction over {model.vocab_size:,} tokens has "
            f"ln {model.vocab_size} = {uniform:.3f}: the initial weights or the targets are wrong"
        )
    check_causal(model, x[:1])
    return loss


@torch.no_grad()
def check_causal(model: nn.Module, idx: Tensor):
    """Raise UserError if a logit depends on a later token; idx: (B, T). The model should be in eval mode.

    Changes the last token. The logits at all earlier positions must stay the same, bit for bit.
    """
    changed = idx.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.vocab_size
    if not torch.equal(model(idx)[:, :-1], model(changed)[:, :-1]):
        raise UserError("the model is not causal: a later token changes earlier logits")


def layer_of(name: str) -> str:
    """blocks.3.mlp.up.weight -> block3, tokens.weight -> tokens"""
    first, second, *_ = name.split(".")
    return f"block{second}" if first == "blocks" else first


def layer_norms(model: nn.Module, tensor_of: Callable[[int, nn.Parameter], Tensor]) -> dict[str, float]:
    """{layer: norm} of the tensors tensor_of(i, p), for the i-th parameter p, of every layer."""
    layers = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        layers.setdefault(layer_of(name), []).append(tensor_of(i, p).detach().float())
    return {layer: torch.stack(torch._foreach_norm(tensors)).norm().item() for layer, tensors in layers.items()}


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """{"grad_LAYER": norm of its gradient}"""
    return {f"grad_{layer}": norm for layer, norm in layer_norms(model, lambda i, p: p.grad).items()}


def update_ratios(model: nn.Module, before: list[Tensor]) -> dict[str, float]:
    """{"update_LAYER": norm of the last update divided by the norm of the weights}, where `before` are the parameters
    before that update. About 1e-3 is healthy."""
    updates, weights = layer_norms(model, lambda i, p: p - before[i]), layer_norms(model, lambda i, p: before[i])
    return {f"update_{layer}": updates[layer] / weights[layer] for layer in updates}


def draw_layers(rows: list[dict]):
    """A matplotlib figure of the gradient norms and update-to-weight ratios in the metrics `rows`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    titles = {"grad_": "gradient norm", "update_": "update-to-weight ratio of one step"}
    for axes, (prefix, title) in zip(figure.subplots(1, 2), titles.items()):
        for column in [name for name in rows[-1] if name.startswith(prefix)] if rows else []:
            points = [(row["iter"], row[column]) for row in rows if {"iter", column} <= row.keys()]
            axes.plot(*zip(*points), label=column.removeprefix(prefix))
            axes.legend(fontsize=7, ncols=2)
        axes.set(xlabel="iteration", title=title, yscale="log")
        axes.grid(alpha=0.3)
    return figure
