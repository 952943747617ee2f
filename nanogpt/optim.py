"""The optimizers: AdamW, as in GPT-2's training, and Muon for the matrices in the blocks, batched. The schedule."""

from common import run
from common.schedules import cosine

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def lr_factor(args, step: int) -> float:
    """The factor of the peak learning rates at `step`: warm-up, then constant, then decay."""
    warmup = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    start = max(args.warmup, (1 - args.cooldown) * args.iters)
    progress = min(max((step - start) / max(1.0, args.iters - start), 0.0), 1.0)
    decay = cosine(progress) if args.decay == "cosine" else 1 - progress
    return warmup * (args.final_lr + (1 - args.final_lr) * decay)


def orthogonalize(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An approximation of the nearest orthogonal matrix to each of g (N, rows, columns): U V^T, where g = U S V^T.

    A quintic Newton-Schulz iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) that moves every
    singular value that is not tiny to between 0.7 and 1.2. bfloat16 is accurate enough for this, and fast if the
    hardware has it.
    """
    a, b, c = COEFFICIENTS
    x = g.to(dtype)
    x = x.mT if g.shape[1] > g.shape[2] else x  # the Gram matrix of the shorter side is cheaper
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (N, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g.shape[1] > g.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024): a step has the same size in every direction of a matrix.

    Equivalent to torch.optim.Muon with the "original" adjustment of the learning rate, but matrices of one shape (or
    its transpose) are orthogonalized in one batch: 16 small products take hardly longer than one.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, ns_steps=5, precision="bf16"):
        options = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps, precision=precision)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffers, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov momentum
            batches = {}  # shape -> [(parameter, update)], all updates wider than tall
            for p, update in zip(params, updates):
                wide = update if p.shape[0] <= p.shape[1] else update.mT
                batches.setdefault(wide.shape, []).append((p, wide))
            dtype = DTYPES[group["precision"]]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for batch in batches.values():
                orthogonal = orthogonalize(torch.stack([wide for _, wide in batch]), group["ns_steps"], dtype)
                for (p, _), update in zip(batch, orthogonal.to(params[0].dtype)):
                    tall = p.shape[0] > p.shape[1]
                    scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                    p.add_(update.mT if tall else update, alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, args, device: torch.device) -> list[torch.optim.Optimizer]:
    """[AdamW] for all parameters, or with args.muon > 0 [AdamW, Muon], where Muon has the matrices of the blocks.

    Every parameter group has a "peak", the learning rate that the schedule scales. Vectors (biases and norms) have no
    weight decay.
    """
    muon = []
    matrices = []
    vectors = []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif args.muon and name.startswith("blocks."):
            muon.append(p)
        else:
            matrices.append(p)
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = device.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], args.lr, (0.9, args.beta2), fused=fused)]
    if muon:
        precision = "bf16" if run.native_bf16(device) else "fp32"  # emulated bfloat16 is 20 times slower
        options = dict(weight_decay=args.weight_decay, ns_steps=args.ns_steps, precision=precision)
        optimizers.append(Muon(muon, args.muon * args.lr, **options))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
