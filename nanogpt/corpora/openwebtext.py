"""OpenWebText as GPT-2 tokens: streamed from the hub into two files, which are then memory-mapped.

The files train.bin and val.bin have nanoGPT's format, uint16 tokens, each document followed by <|endoftext|>.
"""

import hashlib
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from common import run

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from corpora.prepared import parse_json_line
from tokenizer import END_OF_TEXT, BytePairs

# `datasets` no longer runs the script in the data's repository. Pull request 18 there, by its publisher, holds the same
# data as 93 Parquet files. (The hub's own conversion ends after the first five gigabytes.)
SOURCE = dict(
    path="parquet",
    split="train",
    streaming=True,
    data_files="hf://datasets/Skylion007/openwebtext@c6680bb039f28c472e44d33acb240c3068b89a82/data/train-*.parquet",
)
OWN = "documents.jsonl"  # in the corpus's folder, a line {"text": ...} for each document: read instead of the hub
DOCUMENTS = 8_013_769
VAL_DOCUMENTS = 1_000  # the first ones, so the validation set does not depend on how much was fetched; or a tenth
VAL_TOKENS = 2**20  # of these documents; GPT-2 evaluates 2**20 tokens in a minute on a GPU
TOO_SHORT = "is shorter than it should be; remove its folder to start again"


def memory_maps(folder: Path, tokenizer: BytePairs, limit: int | None = None) -> tuple[Tensor, Tensor, str]:
    """(train, val, digest): two memory-mapped uint16 tensors (N,) and a digest of their lengths and first tokens.

    Streams what is missing first. limit: at most `limit` tokens of each. Files that nanoGPT's prepare.py wrote are used
    as they are. Raises UserError.
    """
    progress = prepare(folder, tokenizer, limit)
    parts, digest = [], hashlib.blake2b(digest_size=16)
    for part in ("train", "val"):
        file = folder / f"{part}.bin"
        available = file.stat().st_size // 2 if file.exists() else 0
        n = progress.get(part, available)
        if available < n or available == 0:
            raise run.UserError(f"{run.display_path(file)}: {TOO_SHORT}")
        if n < 2:
            raise run.UserError(f"{run.display_path(file)}: has one token, and needs two")
        tokens = torch.from_file(str(file), shared=False, size=n, dtype=torch.uint16)
        parts.append(tokens[: min(limit or n, VAL_TOKENS if part == "val" else n)])
        if parts[-1][:VAL_TOKENS].numpy().max() >= tokenizer.vocab_size:
            raise run.UserError(f"{run.display_path(file)}: is damaged: it holds tokens that GPT-2 does not have")
        digest.update(len(parts[-1]).to_bytes(8, "little") + parts[-1][:VAL_TOKENS].numpy().tobytes())
    return *parts, digest.hexdigest()


def count_bytes(tokens: Tensor, tokenizer: BytePairs) -> int:
    """The number of bytes of the text that `tokens` (N,) stand for, without <|endoftext|>."""
    ids = tokens.long()
    ids = ids[ids != tokenizer.vocabulary[END_OF_TEXT]]
    characters = [tokenizer.token[i] for i in range(tokenizer.vocab_size)]  # each of which stands for a byte
    lengths = torch.tensor([len(token) for token in characters])
    return int(lengths[ids].sum())


def prepare(folder: Path, tokenizer: BytePairs, limit: int | None = None, stream=None, chunk_size: int = 1000) -> dict:
    """Stream documents and append their tokens to val.bin (the first VAL_DOCUMENTS documents) and train.bin. Of
    a corpus that has no more, the first tenth of the documents is for validation.

    Stops when train.bin has `limit` tokens; without a limit, at the end. After every `chunk_size` documents the files
    are synced, and progress.json records their lengths and the state of the stream. After an interruption the same call
    truncates the files to those lengths and continues; they end up the same, byte for byte.
    stream: documents {"text": ...} with state_dict() and load_state_dict(), as in `datasets`.
    Returns {"train": tokens, "val": tokens, "documents": ..., "complete": ...}, or {} if another program wrote the
    files. Raises UserError.
    """
    file = folder / "progress.json"
    if not file.exists() and (folder / "train.bin").exists():
        return {}
    progress = {"documents": 0, "train": 0, "val": 0, "complete": False, "stream": None}
    if file.exists():
        progress |= run.read_json(file)
        counts = [progress[part] for part in ("documents", "train", "val")]
        if not all(type(n) is int and n >= 0 for n in counts) or type(progress["complete"]) is not bool:
            raise run.UserError(f"{run.display_path(file)}: is damaged; remove its folder to start again")
    if progress["complete"] or (limit and progress["train"] >= limit):
        return progress
    chunks = read_stream(stream, folder / OWN, progress["stream"], chunk_size)
    first = list(islice(chunks, 1))  # before anything is created, which would be in vain without a network
    lock = run.lock_folder(run.make_folder(folder))
    run.write_json(file, progress)  # marks the token files as ours
    bar = tqdm(desc="OpenWebText", total=DOCUMENTS, initial=progress["documents"], unit=" documents", disable=None)
    try:
        for part in ("train", "val"):
            with open(folder / f"{part}.bin", "ab") as output:
                if output.tell() < 2 * progress[part]:
                    raise run.UserError(f"{output.name}: {TOO_SHORT}")
                output.truncate(2 * progress[part])
        for documents, state in chain(first, chunks):
            tokens = {"train": [], "val": []}
            for number, document in enumerate(documents, progress["documents"]):
                part = "val" if number < VAL_DOCUMENTS else "train"
                tokens[part] += [*tokenizer.encode(document["text"]), tokenizer.vocabulary[END_OF_TEXT]]
            for part, ids in tokens.items():
                with open(folder / f"{part}.bin", "ab") as output:
                    output.write(np.array(ids, dtype=np.uint16).tobytes())
                    output.flush()
                    os.fsync(output.fileno())
                progress[part] += len(ids)
            progress |= {"documents": progress["documents"] + len(documents), "stream": state}
            run.write_json(file, progress)
            bar.update(len(documents))
            bar.set_postfix(tokens=f"{progress['train'] / 1e6:,.0f} M")
            if limit and progress["train"] >= limit:
                break
        else:
            if progress["train"] == 0:
                progress |= split_small(folder, progress, tokenizer.vocabulary[END_OF_TEXT])
            progress |= {"complete": True, "stream": None}
            run.write_json(file, progress)
            os.truncate(folder / "val.bin", 2 * progress["val"])  # nanoGPT's script reads the whole file
    except OSError as error:
        raise run.UserError(f"{folder}: cannot be written ({error.strerror}); the same command continues") from error
    finally:
        bar.close()
        lock.release()
    return progress


def split_small(folder: Path, progress: dict, end: int) -> dict:
    """Write all but the first tenth of the documents in val.bin to train.bin: a corpus of VAL_DOCUMENTS documents or
    fewer has come to its end. Returns {"train": tokens, "val": tokens}; until they are recorded, val.bin is whole, so
    that this can be done again."""
    n = progress["documents"] // 10 or 1
    if progress["documents"] < 2:
        raise run.UserError(f"openwebtext: {progress['documents']} documents cannot be split; two are needed")
    tokens = np.fromfile(folder / "val.bin", dtype=np.uint16)
    first_tenth = int(np.flatnonzero(tokens == end)[n - 1]) + 1
    with open(folder / "train.bin", "wb") as output:
        output.write(tokens[first_tenth:].tobytes())
        output.flush()
        os.fsync(output.fileno())
    return {"train": len(tokens) - first_tenth, "val": first_tenth}


def read_stream(stream, own: Path, state: dict | None, chunk_size: int) -> Iterator[tuple[list[dict], dict]]:
    """Yield (up to chunk_size documents, the state of the stream after them), continuing from `state`.

    Raises UserError for whatever goes wrong in the stream: errors of the network have no base class in common.
    """
    try:
        stream = stream or open_stream(own)
        if state:
            stream.load_state_dict(state)
        documents = iter(stream)
        while chunk := list(islice(documents, chunk_size)):
            yield chunk, stream.state_dict()
    except run.UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:120].strip()}".splitlines()[0]
        raise run.UserError(f"openwebtext: the stream broke off ({reason}); the same command continues") from error


def open_stream(own: Path):
    """The documents, an iterable of {"text": ...}: of the file `own` if there is one, else as the hub streams them."""
    if own.exists():
        return Documents(own)
    import datasets

    return datasets.load_dataset(**SOURCE)


class Documents:
    """The documents in a file of JSON lines, {"text": ...} each, as a stream like those of `datasets`."""

    def __init__(self, file: Path):
        self.file = file
        self.lines = 0  # that have been read

    def __iter__(self) -> Iterator[dict]:
        if not self.file.is_file():  # a FIFO would wait for ever
            raise run.UserError(f"{run.display_path(self.file)}: cannot be read (not a regular file)")
        with open(self.file, "rb") as file:
            for line in islice(file, self.lines, None):
                self.lines += 1
                if line.strip():
                    place = f"{run.display_path(self.file)}, line {self.lines:,}"
                    yield parse_json_line(line, place, parse_document, "JSON in UTF-8")

    def state_dict(self) -> dict:
        return {"lines": self.lines}

    def load_state_dict(self, state: dict):
        self.lines = state["lines"]


def parse_document(value) -> dict:
    """A document {"text": ...}. Raises UserError."""
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise run.UserError('is not of the form {"text": "..."}')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise run.UserError(f"its text is not Unicode ({error.reason})") from error
    return {"text": text}
