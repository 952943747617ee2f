"""Training loops for hundreds of small networks whose data are tensors in memory.

train.py has the loop of a run, with its folder, checkpoints and schedules. A study has none of these, but looks at its
networks while they train, so these loops are generators.
"""

import copy
from collections.abc import Iterator

from common import run

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    bs: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    optimizer: str = "adam",
    weight_decay: float = 0.0,
) -> Iterator[tuple[int, Tensor]]:
    """Train a classifier on (x, y); yields (step, loss of its batch) after every step, with the gradients in place.

    An epoch's order is a function of (seed, epoch), and smaller last batches are left out.
    """
    if optimizer == "adam":
        optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=weight_decay, fused=True)
    bs = min(bs, len(x))
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(run.seed_at(seed, epoch)))
        for index in order[: len(x) // bs * bs].view(-1, bs):
            net.train()
            loss = F.cross_entropy(net(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            yield step, loss.detach()


def epochs_of(steps: Iterator, steps_per_epoch: int) -> Iterator[tuple[int, float]]:
    """(epoch, mean training loss while the weights changed) from the steps of `fit`."""
    total = 0.0
    for step, loss in steps:
        total = total + loss
        if step % steps_per_epoch == 0:
            yield step // steps_per_epoch, float(total) / steps_per_epoch
            total = 0.0


@torch.no_grad()
def evaluate(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(mean cross-entropy, accuracy)"""
    net.eval()
    logits = torch.cat([net(part) for part in x.split(2000)])
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def evaluate_parts(net: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Mean cross-entropy and accuracy on training and on test examples, each (inputs, labels)."""
    train_loss, train_accuracy = evaluate(net, *train)
    test_loss, test_accuracy = evaluate(net, *test)
    return {
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
    }


def curves_of(points: list[dict]) -> dict[str, list]:
    """{name: its value at each of `points`}"""
    return {name: [point[name] for point in points] for name in points[0]}


class Stack:
    """K networks of one architecture as one: every parameter has a leading dimension K.

    Adam and SGD work on each number by itself, so an optimizer of the stack trains the K networks independently.
    """

    def __init__(self, nets: list[nn.Module]):
        self.parameters, _ = stack_module_state(nets)
        self.template = copy.deepcopy(nets[0]).to("meta")
        self.size = len(nets)

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, inputs), the same for all -> (K, N, outputs)."""
        return vmap(lambda p: functional_call(self.template, p, (x,)))(self.parameters)

    def vectors(self, only: str = "") -> Tensor:
        """The parameters of each network as a row, (K, P); `only` those whose name begins so. A copy."""
        parts = [p.detach().flatten(1) for name, p in self.parameters.items() if name.startswith(only)]
        return torch.cat(parts, 1)

    def gradient_norms(self) -> Tensor:
        """(K,)"""
        return torch.cat([p.grad.flatten(1) for p in self.parameters.values()], 1).norm(dim=1)


def fit_stack(
    stack: Stack, x: Tensor, y: Tensor, steps: int, lr: float, weight_decay: float = 0.0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Full-batch Adam on mean squared errors. x (N, 1); y (N, 1) or (K, N, 1) for targets of each network.
    weight_decay: this times a weight is added to its gradient (L2, not decoupled).

    Yields (step, losses (K,) before the step, outputs (K, N, 1) before the step).
    """
    optimizer = torch.optim.Adam(list(stack.parameters.values()), lr, weight_decay=weight_decay, fused=True)
    for step in range(1, steps + 1):
        outputs = stack(x)
        losses = (outputs - y).square().mean((1, 2))
        optimizer.zero_grad()
        losses.sum().backward()  # no loss depends on another network's parameters
        optimizer.step()
        yield step, losses.detach(), outputs.detach()
