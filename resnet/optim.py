"""The update of the weights: the optimizers and their learning rates."""

from common import run

import torch
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def orthogonalize(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An approximation of the nearest orthogonal matrix to g (rows, columns): U V^T, where g = U S V^T.

    Five steps of a quintic Newton-Schulz iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon),
    which move every singular value that is not tiny to between 0.7 and 1.2.
    """
    a = 3.4445
    b = -4.7750
    c = 2.0315
    x = g.to(dtype)
    x = x.mT if len(g) > g.shape[1] else x  # the Gram matrix of the shorter side is cheaper
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if len(g) > g.shape[1] else x


class ConvMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the weights of convolutions, each as a matrix (c_out, k * k * c_in).

    Orthogonalized momentum: a step has the same size in every direction of the matrix. The same as torch.optim.Muon on
    that matrix with Nesterov momentum, where `precision` is bf16.
    """

    def __init__(self, weights, lr, momentum=0.9, weight_decay=0.0, precision="bf16"):
        super().__init__(weights, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, precision=precision))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:  # (c_out, c_in, k, k)
                buffer = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                buffer.lerp_(w.grad, 1 - group["momentum"])
                update = w.grad.lerp(buffer, group["momentum"]).permute(0, 2, 3, 1)  # (c_out, k, k, c_in)
                matrix = orthogonalize(update.flatten(1), DTYPES[group["precision"]]).to(w.dtype)
                w.mul_(1 - group["lr"] * group["weight_decay"])
                scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                w.add_(matrix.view(update.shape).permute(0, 3, 1, 2), alpha=-group["lr"] * scale)


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
        precision = precision_on(weights[0].device)
        optimizers.append(ConvMuon(weights, args.lr / 10, weight_decay=args.muon_decay, precision=precision))
    set_peaks(optimizers)
    return optimizers


def precision_on(device: torch.device) -> str:
    """In what Muon multiplies on a device: emulated bfloat16 is 20 times slower than float32."""
    return "bf16" if run.native_bf16(device) else "fp32"


def set_peaks(optimizers: list[torch.optim.Optimizer]):
    """Every learning rate now is the peak that `set_lr` scales."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float):
    """Set every learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
