"""Decoding written out: from logits to text, one token at a time; and measures of the result.

Every function here gives the tokens of `transformers`' own generate(), if it has the strategy; tests check it.
Contrastive search is only here: transformers no longer carries it. Logits are (V,), ids are lists of token numbers.
"""

import copy
import inspect
import math
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------- what changes the distribution of the next token


def top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k most likely tokens (Fan et al. 2018)."""
    return logits.masked_fill(logits < logits.topk(min(k, len(logits))).values[-1], -math.inf)


def keep_until(logits: Tensor, order: Tensor, mass: float) -> Tensor:
    """Only the first tokens in `order`, as many as it takes for their probabilities to add up to `mass`."""
    before = F.softmax(logits, 0)[order].cumsum(0) - F.softmax(logits, 0)[order]
    dropped = order[before >= mass]
    return logits.index_fill(0, dropped, -math.inf) if len(dropped) < len(logits) else logits


def top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling: the most likely tokens whose probabilities add up to p (Holtzman et al. 2019)."""
    return keep_until(logits, logits.argsort(descending=True), p)


def typical(logits: Tensor, mass: float) -> Tensor:
    """Locally typical sampling: the tokens whose surprise, -log p, is closest to the entropy of the distribution, until
    their probabilities add up to `mass` (Meister et al. 2022). The most likely token need not be among them."""
    log_p = F.log_softmax(logits, 0)
    entropy = -torch.nansum(log_p.exp() * log_p)
    return keep_until(logits, (-log_p - entropy).abs().argsort(), mass)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Only tokens of at least p times the probability of the most likely one (Nguyen et al. 2024)."""
    probabilities = F.softmax(logits, 0)
    return logits.masked_fill(probabilities < p * probabilities.max(), -math.inf)


def repetition_penalty(logits: Tensor, ids: list[int], penalty: float) -> Tensor:
    """Positive logits of tokens that have occurred are divided by the penalty, negative ones multiplied (Keskar et al.
    2019)."""
    seen = torch.tensor(sorted(set(ids)), device=logits.device)
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def block_ngrams(logits: Tensor, ids: list[int], n: int) -> Tensor:
    """No sequence of n tokens twice: every token that would complete one is excluded (Paulus et al. 2017)."""
    end = ids[len(ids) - n + 1 :]
    banned = [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == end]
    return logits.index_fill(0, torch.tensor(sorted(set(banned)), dtype=torch.long, device=logits.device), -math.inf)


def penalized(logits: Tensor, ids: list[int], repetition=1.0, ngram=0) -> Tensor:
    """The logits after the penalties, which greedy search and sampling share."""
    if repetition != 1.0:
        logits = repetition_penalty(logits, ids, repetition)
    return block_ngrams(logits, ids, ngram) if ngram else logits


# --------------------------------------------------------------------------------------------------- the ways to decode


def forward(net, tokens: list[list[int]], cache, **options) -> tuple:
    """(output, cache) of the model on the new `tokens` (B, T) after those whose keys and values the cache holds."""
    inner = net.get_base_model() if hasattr(net, "get_base_model") else net  # of peft
    # its name depends on the version of transformers
    name = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
    out = net(input_ids=torch.tensor(tokens, device=net.device), use_cache=True, **{name: cache}, **options)
    return out, out[name]


@torch.no_grad()
def sample(
    net,
    ids: list[int],
    length: int,
    eos: int,
    temperature=None,
    k=0,
    p=None,
    mass=None,
    floor=None,
    repetition=1.0,
    ngram=0,
    greedy=False,
) -> Iterator[int]:
    """Yield up to `length` tokens after `ids`, until the end-of-text token, which is yielded too.

    k, p, mass, floor: for top_k, top_p, typical, min_p. greedy: always the most likely token, else one at random from
    torch's generator. The cache holds the keys and values of earlier tokens, so that each step computes one.
    """
    ids = list(ids)
    new = list(ids)  # the tokens that the cache does not hold yet
    cache = None
    for _ in range(length):
        out, cache = forward(net, [new], cache)
        logits = penalized(out.logits[0, -1].float(), ids, repetition, ngram)
        logits = logits / temperature if temperature else logits
        for limit, value in ((top_k, k), (top_p, p), (min_p, floor), (typical, mass)):
            logits = limit(logits, value) if value else logits
        token = logits.argmax() if greedy else torch.multinomial(F.softmax(logits, 0), 1)
        new = [int(token)]
        ids += new
        yield new[0]
        if new[0] == eos:
            return


@torch.no_grad()
def beam_search(net, ids: list[int], length: int, eos: int, beams: int = 5) -> list[int]:
    """The tokens after `ids`, up to `length`, of the hypothesis with the highest log-probability per token, among those
    that the `beams` best prefixes of every length lead to."""
    n_prompt = len(ids)
    running = [list(ids)]  # the best prefixes
    scores = torch.zeros(1, device=net.device)  # their log-probabilities
    finished = []
    new = [list(ids)]  # the tokens that the cache does not hold yet
    cache = None
    for n in range(1, length + 1):
        out, cache = forward(net, new, cache)
        total = scores[:, None] + F.log_softmax(out.logits[:, -1].float(), 1)  # (beams, V)
        best = total.flatten().topk(min(2 * beams, total.numel()))
        kept = []
        for place, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            beam, token = divmod(index, total.shape[1])
            if place < beams and (token == eos or n == length):
                finished.append((score / n, [*running[beam], token]))
            if token != eos and len(kept) < beams:
                kept.append((score, beam, token))
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        if not kept or len(finished) == beams and kept[0][0] / n <= finished[-1][0]:
            break
        scores = torch.tensor([score for score, _, _ in kept], device=net.device)
        cache.reorder_cache(torch.tensor([beam for _, beam, _ in kept], device=net.device))
        running = [[*running[beam], token] for _, beam, token in kept]
        new = [[token] for _, _, token in kept]
    return finished[0][1][n_prompt:]


@torch.no_grad()
def contrastive_search(net, ids: list[int], length: int, eos: int, k: int = 4, alpha: float = 0.6) -> Iterator[int]:
    """Yield tokens by contrastive search (Su et al. 2022, equation 5): of the k most likely tokens the one with

        (1 - alpha) p(token) - alpha max_j cosine(h_token, h_j)

    where h are hidden states of the last layer, and j runs over everything before. What is likely wins, unless its
    hidden state repeats an earlier one.
    """
    out, cache = forward(net, [ids], None, output_hidden_states=True)
    hidden, logits = out.hidden_states[-1][0], out.logits[0, -1].float()  # (T, D), (V,)
    for _ in range(length):
        p, tokens = F.softmax(logits, 0).topk(k)
        branches = copy.deepcopy(cache)
        branches.batch_repeat_interleave(k)
        out, branches = forward(net, tokens[:, None].tolist(), branches, output_hidden_states=True)
        h = out.hidden_states[-1][:, 0]  # (k, D)
        similarity = F.normalize(h.float(), dim=1) @ F.normalize(hidden.float(), dim=1).T  # (k, T)
        best = int(((1 - alpha) * p - alpha * similarity.max(1).values).argmax())
        branches.batch_select_indices(torch.tensor([best], device=net.device))
        cache = branches
        hidden = torch.cat([hidden, h[best][None]])
        logits = out.logits[best, -1].float()
        yield int(tokens[best])
        if int(tokens[best]) == eos:
            return


# ---------------------------------------------------------------------------------------------------------- the numbers


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams of words divided by all of them, over the texts together (Li et al. 2016)."""
    counts = sum((ngrams(text.split(), n) for text in texts), Counter())
    return len(counts) / max(1, counts.total())


def self_bleu(texts: list[str]) -> float | None:
    """The mean BLEU, in percent, of each text with all others as references (Zhu et al. 2018): high if a model says
    the same everywhere. None for fewer than two texts."""
    import sacrebleu

    if len(texts) < 2:
        return None
    scores = [sacrebleu.sentence_bleu(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores)


@torch.no_grad()
def surprise(net, prompt: list[int], continuation: list[int]) -> float:
    """The sum of -log p, in nats, of the tokens of a continuation under the model itself."""
    ids = torch.tensor([[*prompt, *continuation]], device=net.device)
    logits = net(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()  # (continuation, V)
    return F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
