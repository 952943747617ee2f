"""The optimizers of the two networks, and one step."""

import torch
from torch import nn


def build_optimizers(args, gan: nn.Module) -> list[torch.optim.Optimizer]:
    """[the discriminator's, the generator's]: RMSprop for WGAN, Adam for the others."""
    optimizers = []
    for net, lr in ((gan.discriminator, args.lr * args.lr_ratio), (gan.generator, args.lr)):
        device = next(net.parameters()).device.type
        if args.model == "wgan":
            optimizers.append(torch.optim.RMSprop(net.parameters(), lr, foreach=True))
        else:
            fused = device in ("cpu", "cuda")
            optimizers.append(torch.optim.Adam(net.parameters(), lr, tuple(args.betas), fused=fused))
        for group in optimizers[-1].param_groups:
            group["peak"] = lr
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float):
    """Set every learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def step_of(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """One step of the optimizer. Returns the norm of the gradient."""
    optimizer.zero_grad()
    loss.backward()
    weights = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    optimizer.step()
    return norm
