"""The loss, and its mean over a validation text or part of it. train.py takes all of these."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data

ESTIMATE_BATCHES = 20  # as in nanoGPT's laptop run
EVAL_COST = 0.1  # evaluations may take this fraction of the training time
SMALL, SMALL_COST = 2**17, 0.4  # a validation text of up to SMALL characters is evaluated whole, within SMALL_COST


def loss_of(model: nn.Module, x: Tensor, y: Tensor, r) -> Tensor:
    """The mean cross-entropy, in nats per target, of predicting y from x; int64 (B, T) each. Targets of -1 do not
    count."""
    with r.autocast():
        logits = model(x)  # (B, T) -> (B, T, V)
    logits = logits.float() if r.precision == "bf16" else logits
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


def steps_between_evaluations(args) -> int:
    """How many training steps lie between two evaluations, of which there are args.evals at most."""
    return math.ceil(args.iters / args.evals)


def eval_tokens(args, text, block_size: int) -> int:
    """How many targets of the validation part one evaluation during the run predicts, so that all of them cost at most
    EVAL_COST of the training. The forward pass costs about a third of a training step."""
    everything = data.n_targets(text.val)
    evals = math.ceil(args.iters / steps_between_evaluations(args))
    trained = args.iters * args.bs * block_size / evals  # tokens, between two evaluations
    if text.level == "char" and everything <= min(SMALL, 3 * SMALL_COST * trained):
        return everything
    return max(1, min(everything, int(3 * EVAL_COST * trained)))


@torch.no_grad()
def evaluate(model: nn.Module, part: Tensor, batch_size: int, r, limit: int | None = None) -> float:
    """The mean cross-entropy, in nats per target, over all of `part`, or over `limit` targets, evenly spaced.

    The blocks of a text do not overlap. The processes share the batches.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # the sum of losses, the number of targets
    batches = data.blocks(part, model.block_size, max(batch_size, 4096 // model.block_size), r.device, limit)
    for i, (x, y) in enumerate(batches):
        if i % r.world == r.rank:
            n = int((y >= 0).sum())
            total += torch.tensor([loss_of(model, x, y, r).item() * n, n], dtype=torch.float64)
    loss, count = r.all_reduce(total).tolist()
    return loss / count  # the same value in every process, bit for bit


@torch.no_grad()
def estimate(model: nn.Module, tokens: Tensor, batch_size: int, seed: int, r) -> float | None:
    """The loss as nanoGPT estimates it: the mean of 20 random batches. None for rows, and for a text that is no longer
    than a block."""
    if tokens.dim() > 1 or len(tokens) <= model.block_size:
        return None
    model.eval()
    x, y = data.batch(tokens, model.block_size, ESTIMATE_BATCHES * batch_size, seed, 0, r.device)
    losses = [loss_of(model, *part, r).item() for part in zip(x.split(batch_size), y.split(batch_size))]
    return sum(losses) / ESTIMATE_BATCHES


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond that a float overflows
