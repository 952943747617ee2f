"""Generation: how the next token is chosen, how a text grows token by token, and how it is shown as it grows."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice

from common.run import UserError

import torch
from torch import Tensor, nn


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits (..., V) / temperature, for a softmax. A quotient that overflows is shifted, which the softmax ignores."""
    quotient = logits / temperature
    if quotient.isfinite().all():
        return quotient
    logits = logits.double()
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def check_logits(logits: Tensor):
    """Raise UserError if a logit is NaN or infinite."""
    if not logits.isfinite().all():
        raise UserError("the logits are not finite: the weights of this model are damaged, or its training diverged")


def choose(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """The next token from logits (V,): the most likely one at temperature 0, else a sample.

    top_k: sample from the k most likely tokens. top_p: from the smallest set of most likely tokens whose probabilities
    add up to top_p (nucleus sampling, Holtzman et al. 2020). With both, from the tokens that both allow.
    """
    check_logits(logits)
    if temperature == 0:
        return int(logits.argmax())
    logits, order = tempered(logits.float(), temperature).sort(descending=True, stable=True)
    probabilities = logits[:top_k].softmax(0)
    if top_p is not None:  # the token that crosses the threshold is included
        probabilities = probabilities * (probabilities.cumsum(0) - probabilities < top_p)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue the tokens idx (1, T), T >= 1: yield `max_new_tokens` ids, each as soon as it is chosen.

    repetition_penalty (Keskar et al. 2019, section 4.1) divides the logits of tokens that have occurred if they are
    positive, and multiplies them if they are negative. With a cache of keys and values each step computes one token
    instead of the whole sequence. When the sequence exceeds `block_size`, with or without a cache, it continues from
    its last block_size / 2 tokens.
    """
    model.eval()
    window, cache = idx[0, -model.block_size :].tolist(), None
    seen = torch.zeros(model.vocab_size, dtype=torch.bool, device=idx.device)
    seen[idx[0]] = True
    use_cache = use_cache and hasattr(model, "new_cache")
    for _ in range(max_new_tokens):
        if len(window) > model.block_size:
            window, cache = window[-max(1, model.block_size // 2) :], None
        if use_cache:
            new = window if cache is None else window[-1:]
            cache = cache or model.new_cache()
            logits = model(torch.tensor([new], device=idx.device), cache)
        else:
            logits = model(torch.tensor([window], device=idx.device))
        logits = logits[0, -1]  # (1, T, V) -> (V,)
        if repetition_penalty != 1.0:
            penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(seen, penalized, logits)
        token = choose(logits, temperature, top_k, top_p, generator)
        seen[token] = True
        window.append(token)
        yield token


def stream(tokenizer, prompt: list[int], ids: Iterable[int], stop: str | None = None) -> Iterator[str]:
    """Yield the text of the tokens `ids`, which continue `prompt`, in pieces, each as soon as it is final.

    Incomplete characters (of which some bytes are still to come) are held back, and so is what may be the beginning of
    `stop`. The text ends before `stop`. Each token is decoded once.
    """
    pieces = tokenizer.pieces(chain(prompt, ids))
    held = ""
    for piece in islice(pieces, len(prompt), None):
        held += piece
        if stop and (end := held.find(stop)) >= 0:
            yield held[:end]
            return
        final = len(held)
        if stop:
            final -= max((n for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        if final:
            yield held[:final]
            held = held[final:]
    if held:
        yield held
