"""Folders that `phi1.py prepare` writes: one tokenizer for all of them, and texts as tokens or exercises as rows.

A folder holds tokenizer.json (the state of a tokenizer that has the end token) and either train.bin and val.bin, token
ids as little-endian uint16, documents ended by the end token; or train.jsonl and val.jsonl, one exercise per line:

    {"prompt": "def add(a, b):\\n    \\"\\"\\"Add two numbers.\\"\\"\\"\\n", "completion": "    return a + b\\n"}

An exercise is a row of its own, never cut. The loss counts the completion and the end token after it; the
targets of the prompt and of the padding are -1. A part of rows is one int32 tensor (N, 2, T): inputs and targets.
"""

import hashlib
import json
from pathlib import Path

from common import run
from common.run import UserError

import numpy as np
import torch
from torch import Tensor

from tokenizer import END_OF_TEXT, tokenizer_from

TOKENIZER = "tokenizer.json"


def is_prepared(folder: str | Path) -> bool:
    """Is `folder` one that `phi1.py prepare` wrote?"""
    return (Path(folder) / TOKENIZER).is_file()


def end_token(tokenizer) -> int:
    """The id of the end token. Raises UserError if the tokenizer has none."""
    vocabulary = tokenizer.vocabulary
    if END_OF_TEXT not in vocabulary:
        raise UserError(f"the tokenizer has no end token {END_OF_TEXT}: use a model that phi1.py pretrained")
    return vocabulary[END_OF_TEXT] if isinstance(vocabulary, dict) else vocabulary.index(END_OF_TEXT)


def load(folder: str | Path, limit: int | None = None, tokenizer=None) -> tuple:
    """(tokenizer, train, val, digest) of a prepared folder; the parts are uint16 (N,) or int32 (N, 2, T).

    tokenizer: in place of the folder's own, for rows. limit: the first tokens or rows of each part. Raises UserError.
    """
    folder = Path(folder)
    digest = hashlib.blake2b(digest_size=16)
    parts = []
    own = tokenizer_from(run.read_json(folder / TOKENIZER))
    for name in ("train", "val"):
        files = [file for file in (folder / f"{name}.bin", folder / f"{name}.jsonl") if file.exists()]
        if len(files) != 1:
            raise UserError(f"{run.display_path(folder)}: needs either {name}.bin or {name}.jsonl")
        try:
            if not files[0].is_file():  # a FIFO would wait for ever
                raise OSError(0, "not a regular file")
            content = files[0].read_bytes()
        except OSError as error:
            raise UserError(f"{run.display_path(files[0])}: cannot be read ({error.strerror})") from error
        digest.update(content)
        if files[0].suffix == ".jsonl":
            parts.append(rows(read_exercises(files[0], content)[:limit], tokenizer or own))
            continue
        if tokenizer and tokenizer.state() != own.state():
            raise UserError(f"{run.display_path(folder)}: has the tokens of another tokenizer than the model's")
        if len(content) % 2 or len(content) < 4:
            raise UserError(f"{run.display_path(files[0])}: has fewer than two tokens of 16 bits")
        tokens = torch.from_numpy(np.frombuffer(content, dtype="<u2").astype(np.uint16))[:limit]
        if int(tokens.int().max()) >= own.vocab_size:
            raise UserError(f"{run.display_path(files[0])}: holds a token that is not in {TOKENIZER}")
        parts.append(tokens)
    digest.update(json.dumps(own.state()).encode())
    return tokenizer or own, *parts, digest.hexdigest()


def read_json_lines(file: Path, parse, what: str, content: bytes | None = None) -> list:
    """[parse(value), ...] of the JSON values in a file, one per line. Raises UserError, with the number of the first
    line that `parse` refuses because it is not `what`.

    A line ends at the newline alone: JSON may hold U+2028, at which str.splitlines() would cut. Blank lines count, but
    hold nothing. content: of the file, if it has been read already.
    """
    place = run.display_path(file)
    try:
        if file.exists() and not file.is_file():  # a FIFO would wait for ever
            raise OSError(0, "not a regular file")
        text = (file.read_bytes() if content is None else content).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{place}: is not in UTF-8 ({error})") from error
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        values.append(parse_json_line(line, f"{place}, line {number}", parse, what))
    return values


def parse_json_line(line: str | bytes, place: str, parse, what: str):
    """What `parse` makes of the JSON value in a line at `place`. Raises UserError: with the words of `parse`, or that
    the line is not `what`."""
    try:
        return parse(json.loads(line))
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{place}: is not {what}") from error


def parse_exercise(value: dict) -> dict:
    """An exercise, with texts that are not empty and can be encoded. Raises ValueError, KeyError or TypeError."""
    exercise = {name: value[name] for name in ("prompt", "completion")}
    for text in exercise.values():
        if not isinstance(text, str) or not text:
            raise TypeError
        text.encode()
    return exercise


def read_exercises(file: Path, content: bytes | None = None) -> list[dict]:
    """The exercises of a .jsonl file: dicts with the texts "prompt" and "completion". Raises UserError."""
    what = "an exercise, a JSON object with the texts prompt and completion"
    exercises = read_json_lines(file, parse_exercise, what, content)
    if not exercises:
        raise UserError(f"{run.display_path(file)}: holds no exercise")
    return exercises


def row(exercise: dict, tokenizer) -> tuple[list[int], list[int]]:
    """The input and the targets of an exercise, of equal length: target -1 where the next token is of the prompt."""
    prompt = tokenizer.encode(exercise["prompt"])
    ids = [*prompt, *tokenizer.encode(exercise["completion"]), end_token(tokenizer)]
    return ids[:-1], [-1] * (len(prompt) - 1) + ids[len(prompt) :]


def rows(exercises: list[dict], tokenizer) -> Tensor:
    """Exercises as int32 (N, 2, T), padded to the longest: inputs with the end token, targets with -1."""
    pairs = [row(exercise, tokenizer) for exercise in exercises]
    table = np.full((len(pairs), 2, max(len(x) for x, _ in pairs)), -1, np.int32)
    table[:, 0] = end_token(tokenizer)
    for i, (x, y) in enumerate(pairs):
        table[i, 0, : len(x)], table[i, 1, : len(y)] = x, y
    return torch.from_numpy(table)


def trimmed(part: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, 2, T) as x and y, int64 (B, longest of these rows) each."""
    longest = int((part[:, 1] >= 0).any(0).nonzero().max()) + 1
    x, y = part[:, :, :longest].long().unbind(1)
    return x.contiguous(), y.contiguous()


def check_rows(part: Tensor, block_size: int):
    """Raise UserError if a row is longer than a block."""
    if part.shape[2] > block_size:
        raise UserError(
            f"the longest exercise has {part.shape[2]} tokens, but a block has {block_size}, and exercises are never "
            "cut; use a model with larger blocks, or shorter exercises"
        )


def batch(part: Tensor, block_size: int, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The rows of `step`, as `trimmed`: every epoch is a random order of all rows, a function of (seed, epoch)."""
    check_rows(part, block_size)
    chosen = []
    for i in range(step * batch_size // len(part), ((step + 1) * batch_size - 1) // len(part) + 1):
        generator = torch.Generator().manual_seed(run.seed_at(seed, i))
        chosen.append(torch.randperm(len(part), generator=generator))
    first = step * batch_size % len(part)
    return trimmed(part[torch.cat(chosen)[first : first + batch_size]])


def spaced(part: Tensor, limit: int | None) -> Tensor:
    """All rows, or evenly spaced ones with about `limit` targets, at least one."""
    targets = int((part[:, 1] >= 0).sum())
    if limit is None or limit >= targets:
        return part
    n = max(1, limit * len(part) // targets)
    return part[torch.arange(n) * len(part) // n]
