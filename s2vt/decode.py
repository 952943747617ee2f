"""From logits to a sentence: greedy search and beam search over a trained network.

Both never write <pad>, <bos> or <unk>, and end at <eos> or after `max_words` words.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model import BOS, EOS, PAD, S2VT, UNK, at_least_float32

MAX_WIDTH = 1000  # of the beam that a command line may ask for


class Caption(NamedTuple):
    """words: token ids without <eos>; log_likelihood: of the words and, if it was reached, <eos>, in nats;
    weights: (len(words), T), which frames each word looked at; None without attention."""

    words: list[int]
    log_likelihood: float
    weights: Tensor | None = None


def log_probabilities(model: S2VT, hidden: Tensor) -> Tensor:
    """(N, 1, H) -> (N, V), without the tokens that are not words."""
    logits = at_least_float32(model.head(hidden[:, 0]))
    logits[:, [PAD, BOS, UNK]] = -torch.inf
    return logits.log_softmax(1)


@torch.no_grad()
def greedy(model: S2VT, features: Tensor, max_words: int = 30) -> list[Caption]:
    """The most likely next word, again and again. features: (B, T, F)."""
    B, device = len(features), features.device
    encoding, clip = model.encode(features, max_words), torch.arange(B, device=device)
    words, state = torch.full((B, 1), BOS, device=device), None
    ended, total = torch.zeros(B, dtype=torch.bool, device=device), torch.zeros(B, device=device)
    chosen, looks = [], []
    for t in range(max_words):
        hidden, state, weights = model.decode(encoding, words, clip, t, state)
        best, word = log_probabilities(model, hidden).max(1)
        total = total + best.masked_fill(ended, 0)
        words = word.masked_fill(ended, EOS)[:, None]
        ended |= word == EOS
        chosen.append(words)
        looks.append(weights)
        if ended.all():
            break
    chosen = torch.cat(chosen, 1).tolist()
    found = []
    for i, row in enumerate(chosen):
        row = row[: row.index(EOS)] if EOS in row else row
        weights = None  # of the attention, (words, frames)
        if row and looks[0] is not None:
            weights = torch.cat([look[i] for look in looks[: len(row)]])
        found.append(Caption(row, total[i].item(), weights))
    return found


@torch.no_grad()
def beam_search(
    model: S2VT, features: Tensor, width: int = 5, max_words: int = 30, length_power: float = 0.6
) -> list[Caption]:
    """The caption with the highest log-likelihood / length ** length_power that a beam of `width` prefixes finds.

    The length counts the words and <eos>. Without that division short captions win, since every word makes a sentence
    less likely; validation preferred a power of 0.6 to 0, 0.3 and 1. A prefix that ends leaves the beam, and the
    next step fills its place. Width 1 is greedy search; a width above the number of all prefixes is
    an exhaustive search.
    """
    B, W = len(features), width
    device = features.device
    encoding = model.encode(features, max_words)
    clip = torch.arange(B, device=device).repeat_interleave(W)  # (B * W,)
    first = torch.arange(B, device=device)[:, None] * W
    # log-likelihoods of the prefixes
    live = torch.full((B, W), -torch.inf, dtype=model.head.weight.dtype, device=device)
    live[:, 0] = 0
    prefixes = torch.empty(B, W, 0, dtype=torch.int64, device=device)
    words, state = torch.full((B * W, 1), BOS, device=device), None
    best = [Caption([], -torch.inf)] * B
    best_score = [-torch.inf] * B
    for t in range(max_words):
        hidden, state, _ = model.decode(encoding, words, clip, t, state)
        scores = live[:, :, None] + log_probabilities(model, hidden).view(B, W, -1)  # (B, W, V)
        V = scores.shape[2]
        live, flat = scores.flatten(1).topk(W, 1)  # (B, W)
        source, word = flat // V, flat % V
        prefixes = torch.cat([prefixes.gather(1, source[..., None].expand(-1, -1, t)), word[..., None]], 2)
        ended = ((word == EOS) | (t + 1 == max_words)) & live.isfinite()
        normalized = (live / (t + 1) ** length_power).masked_fill(~ended, -torch.inf)
        for i, (score, k) in enumerate(zip(*(values.tolist() for values in normalized.max(1)))):
            if score > best_score[i]:
                row = prefixes[i, k].tolist()
                best_score[i] = score
                best[i] = Caption(row[:-1] if row[-1] == EOS else row, live[i, k].item())
        live = live.masked_fill(ended, -torch.inf)
        if not live.isfinite().any():
            break
        rows = (first + source).flatten()
        state, words = tuple(s[:, rows] for s in state), word.view(-1, 1)
    return best


def caption_all(model: S2VT, features: Tensor, width: int = 1, max_words: int = 30, bs: int = 100) -> list[Caption]:
    """The captions of all clips (N, T, F), `bs` at a time, by greedy search or, from width 2 on, by beam search. The
    model is put into evaluation mode."""
    model.eval()
    found = []
    for part in features.split(bs):
        part = part.to(model.mean.device)
        found += greedy(model, part, max_words) if width == 1 else beam_search(model, part, width, max_words)
    return found
