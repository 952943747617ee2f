"""What a step does to the weights: the optimizers, the schedule of the learning rate, and the average of weights."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def lr_factor(decay: str, progress: float, warmup: float = 0.0) -> float:
    """The factor of the peak learning rate at `progress` in [0, 1), the share of all steps that are done.

    warmup: the share over which the factor rises from 0 to 1. "onecycle" has its own: it rises for a fifth of the run,
    then falls to 0 (Smith and Topin 2017).
    """
    if decay == "onecycle":
        return min(progress / 0.2, (1 - progress) / 0.8)
    if progress < warmup:
        return progress / warmup
    if decay == "step":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return 1.0


class ConvMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) for the weights of convolutions, each as a matrix (c_out, k * k * c_in)."""

    def __init__(self, weights: list[nn.Parameter], **options):
        self.weights = weights  # channels last in memory: the matrices are views, and updates reach the weights
        super().__init__([nn.Parameter(w.detach().permute(0, 2, 3, 1).flatten(1)) for w in weights], **options)

    def zero_grad(self):
        for weight in self.weights:
            weight.grad = None

    def step(self):
        for weight, matrix in zip(self.weights, self.param_groups[0]["params"]):
            matrix.grad = weight.grad.permute(0, 2, 3, 1).flatten(1)
        super().step()


def build_optimizers(net: nn.Module, args) -> list[torch.optim.Optimizer]:
    """SGD for all weights; or Muon for all convolutions but the first, at a tenth of the learning rate, and SGD for
    the rest."""
    weights = []
    if args.optimizer == "muon":
        weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d) and m is not net.conv1]
    rest = [p for p in net.parameters() if not any(p is w for w in weights)]
    options = dict(momentum=0.9, weight_decay=args.weight_decay, nesterov=args.nesterov)
    optimizers = [torch.optim.SGD(rest, args.lr, fused=rest[0].device.type in ("cpu", "cuda"), **options)]
    if weights:
        optimizers.append(ConvMuon(weights, lr=args.lr / 10, momentum=0.9, weight_decay=args.muon_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float):
    """Set every learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def build_average(net: nn.Module, ema: float, steps: int) -> AveragedModel:
    """The exponential moving average of weights and buffers.

    Its horizon is 1 / (1 - ema) steps, at most a tenth of the run's `steps`; otherwise a short run's average would
    still contain its initial weights.
    """
    ema = max(0.0, min(ema, 1 - 10 / steps))
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
