"""Debugging that teaches: the first loss, causality, gradient norms and update-to-weight ratios of every layer."""

import math
from collections.abc import Callable

from common.run import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_TOKENS = 2048  # on which the initial weights are checked; enough for an error of 0.01


@torch.no_grad()
def check_start(model: nn.Module, x: Tensor, y: Tensor, trained: bool = False) -> float:
    """The first loss on x, y (B, T). Raises UserError if the targets y are not x shifted by one token (or -1), if the
    loss on random tokens is far from the loss of a uniform prediction, or if the model is not causal: these mistakes
    show here, before any training. A model that is `trained` already does not predict uniformly."""
    known = y[:, :-1] >= 0
    if not torch.equal(y[:, :-1][known], x[:, 1:][known]):
        raise UserError("the targets are wrong: the target of a token is not the token after it")
    model.eval()
    if not trained:
        check_initial_weights(model, x.shape[1], x.device)
    check_causal(model, x[:1])
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten(), ignore_index=-1).item()


@torch.no_grad()
def check_initial_weights(model: nn.Module, length: int, device: torch.device | str = "cpu"):
    """Raise UserError if the first loss on random sequences of `length` tokens is far from the loss of a uniform
    prediction. The model should be in eval mode.

    A tied head favours the input token itself, and in a text of few different tokens this moves the loss away from
    ln V. Here the input token is excluded from the prediction, which leaves V - 1 tokens and ln(V - 1).
    """
    V, generator = model.vocab_size, torch.Generator().manual_seed(0)
    shape = (max(1, SAMPLE_TOKENS // length), length)
    x = torch.randint(V, shape, generator=generator)
    y = (x + torch.randint(1, V, shape, generator=generator)) % V  # any token but x
    x, y = x.to(device), y.to(device)
    logits = model(x).float().scatter(2, x[:, :, None], -math.inf)  # (B, T, V)
    loss, uniform = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item(), math.log(V - 1)
    if not abs(loss - uniform) < 0.3:
        raise UserError(
            f"the first loss on random tokens is {loss:.3f}, but a uniform prediction over the {V - 1:,} tokens other "
            f"than the last one has ln {V - 1} = {uniform:.3f}: the initial weights are wrong"
        )


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
    before that update. About 1e-3 is healthy with AdamW, 1e-2 at the start with Muon."""
    updates, weights = layer_norms(model, lambda i, p: p - before[i]), layer_norms(model, lambda i, p: before[i])
    return {f"update_{layer}": updates[layer] / weights[layer] for layer in updates}


def draw_layers(rows: list[dict]):
    """A matplotlib figure of the gradient norms and update-to-weight ratios in the metrics `rows`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, prefix, name in (
        (left, "grad_", "gradient norm"),
        (right, "update_", "update-to-weight ratio of one step"),
    ):
        for column in [column for column in rows[-1] if column.startswith(prefix)] if rows else []:
            points = [(row["iter"], row[column]) for row in rows if {"iter", column} <= row.keys()]
            axes.plot(*zip(*points), ".-", label=column.removeprefix(prefix))
        axes.set(xlabel="step", ylabel=name, yscale="log")
        axes.grid(alpha=0.3)
    if rows:
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def draw_record(record: dict):
    """The same of a record that keeps the metrics of a run, such as results/layers.json."""
    return draw_layers(record["metrics"])
