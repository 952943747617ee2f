"""The loss and the perplexity of a text: in the blocks of training, or in windows that overlap."""

import inspect
import math
from collections.abc import Iterator

from common.terminal import UserError

import torch
from torch import Tensor

import data
import model


def logits_of(net, inputs: Tensor, r, across: bool, eos: int) -> Tensor:
    """(B, T) -> (B, T, V). across: attention across documents; else `keep_apart`. r: what has autocast(), such as a
    run."""
    options = {} if across else keep_apart(net, inputs, eos)
    with r.autocast():
        return net(input_ids=inputs, use_cache=False, **options).logits


def keep_apart(net, inputs: Tensor, eos: int) -> dict:
    """The keywords of a forward pass in which no token attends to another document: see `data.document_mask`.

    The mask is added to the attention scores, 0 or the lowest number: several models would add one of booleans as 0
    and 1.
    """
    mask, positions = data.document_mask(inputs, eos)
    lowest = torch.finfo(torch.bfloat16).min  # finite in float32, too
    dtype = next(net.parameters()).dtype
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    options = {"attention_mask": additive, "position_ids": positions}
    network = getattr(net, "module", net)  # of DistributedDataParallel
    network = network.get_base_model() if hasattr(network, "get_base_model") else network  # of peft
    taken = inspect.signature(network.forward).parameters
    return {name: value for name, value in options.items() if name in taken}


@torch.no_grad()
def check_apart(net, eos: int):
    """Raise UserError if the model does not keep documents apart: packed, they must have the logits that they have
    alone."""
    net.eval()
    a, b, c, d = [token for token in range(1, 6) if token != eos][:4]
    texts = [torch.tensor([a, b, c, eos]), torch.tensor([c, a, b, d, eos])]
    name = type(net).__name__
    packed = torch.cat(texts)[None]  # (1, T)
    try:
        alone = torch.cat([net(input_ids=text[None], use_cache=False).logits[0] for text in texts])
        together = net(input_ids=packed, use_cache=False, **keep_apart(net, packed, eos)).logits[0]
        error = (together - alone).abs().max() / alone.abs().max()
    except (RuntimeError, ValueError, TypeError, IndexError):  # of a mask with a row for each token
        error = math.inf
    if not error < 1e-3:
        raise UserError(f"--no-across: {name} cannot keep the documents of a block apart; train it with --across")


@torch.no_grad()
def block_loss(net, part, args, r, eos: int) -> float:
    """The mean cross-entropy, in nats per token, over a part in the blocks of training, which do not overlap. Every
    token but the first counts once. The processes share the batches."""
    net.eval()
    blocks = data.Blocks(part.ids, args.block_size)
    size = max(args.micro_batch or args.bs, 1024 // args.block_size)
    batches = [blocks[index] for index in torch.arange(len(blocks)).split(size) if len(index)]
    if blocks.left_over:  # the end, shorter than a block
        batches.append(part.ids[-blocks.left_over - 1 :].long()[None])
    total = torch.zeros(2, dtype=torch.float64)  # the sum of losses, the number of tokens
    for batch in batches[r.rank :: r.world]:
        if r.world == 1 and r.should_stop():  # it may take minutes; the run continues from its last checkpoint
            r.stop()
        inputs, targets = batch[:, :-1].to(r.device), batch[:, 1:].to(r.device)
        loss = model.cross_entropy(logits_of(net, inputs, r, args.across, eos), targets).item()
        total += torch.tensor([loss * targets.numel(), targets.numel()], dtype=torch.float64)
    loss, count = r.all_reduce(total).tolist()
    return loss / count


@torch.no_grad()
def strided_loss(net, ids: Tensor, block_size: int, stride: int, r) -> Iterator[tuple[float, int]]:
    """Yield (sum of the cross-entropies in nats, number of targets) of each of `data.windows` of a text (N,): with a
    stride below the block size, every token is predicted from a longer context, at the price of more computing."""
    net.eval()
    for begin, end, first in data.windows(len(ids), block_size, stride):
        inputs = ids[begin:end].long()[None].to(r.device)  # (1, T)
        targets = ids[first + 1 : end + 1].long()[None].to(r.device)
        logits = logits_of(net, inputs, r, True, -1)[:, first - begin :]
        yield model.cross_entropy(logits, targets).item() * targets.numel(), targets.numel()


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond that a float overflows


def scores(name: str, loss: float, part) -> dict[str, float]:
    """{name_loss, name_perplexity per token, name_word_perplexity} of a part whose mean loss is `loss`."""
    per_word = loss * (len(part.ids) - 1) / max(1.0, part.words)
    return {
        f"{name}_loss": loss,
        f"{name}_perplexity": perplexity(loss),
        f"{name}_word_perplexity": perplexity(per_word),
    }
