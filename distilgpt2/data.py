"""Packed blocks of tokens: documents in a row, an end-of-text token after each, cut into blocks without any padding.

    python distilgpt2/data.py --data wikitext2 --model distilgpt2    # prepare it, print the counts
    python distilgpt2/data.py --data data.csv --model tiny

Where documents come from is in corpus.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from common import run
from common.options import option
from common.terminal import UserError

import torch
from torch import Tensor

import corpus
import pretrained

DATA_HELP = f"a CSV file with a column text, a text file or a folder of them, or one of {', '.join(corpus.DATASETS)}"
dataset_arg = run.dataset_arg(*corpus.DATASETS, files=True)


@dataclass
class Part:
    """The tokens of one part.

    ids: int32 (N,), every document followed by the end-of-text token; words: the number of words that the tokens stand
    for, in the units of the corpus; documents: how many of them are there, the last perhaps only in part.
    """

    ids: Tensor
    words: float
    documents: int


class Blocks(torch.utils.data.Dataset):
    """The blocks of a part: int64 (block_size + 1,) each, for inputs block[:-1] and targets block[1:].

    Consecutive blocks share one token, so every token but the first is a target once. The incomplete last block
    is dropped: `left_over` is the number of its tokens.
    """

    def __init__(self, ids: Tensor, block_size: int):
        self.ids, self.block_size = ids, block_size
        self.left_over = (len(ids) - 1) % block_size

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.block_size

    def __getitem__(self, i) -> Tensor:
        """The block `i`, or the blocks (B, block_size + 1) of a list or tensor of indices."""
        starts = torch.as_tensor(i) * self.block_size
        return self.ids[starts[..., None] + torch.arange(self.block_size + 1)].long()

    def order(self, seed: int, epoch: int) -> Tensor:
        """The order of all blocks in an epoch, int64 (len(self),): a function of (seed, epoch)."""
        generator = torch.Generator().manual_seed(run.seed_at(seed, epoch))
        return torch.randperm(len(self), generator=generator)


def check_blocks(name: str, part: Part, block_size: int):
    """Raise UserError if the tokens of a part do not fill a block."""
    if not len(Blocks(part.ids, block_size)):
        raise UserError(
            f"{name}: {len(part.ids)} training tokens fill no block of {block_size}; pass more text, or "
            "a smaller --block-size"
        )


def windows(count: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first) for a text of `count` tokens: from inputs [begin, end) the targets [first + 1, end + 1)
    are scored. Every token but the first is scored once, with a context of block_size - stride tokens or more as soon
    as that many tokens precede it."""
    begin = first = 0
    while first < count - 1:
        end = min(begin + block_size, count - 1)
        yield begin, end, first
        begin, first = begin + stride, end


def document_mask(blocks: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """(mask bool (B, 1, T, T), positions int64 (B, T)) for inputs `blocks` int64 (B, T): a token attends to itself and
    to what came before it in its own document. The end-of-text token belongs to the document that it ends."""
    ends = (blocks == eos).long()
    document = ends.cumsum(1) - ends  # (B, T): how many documents ended before
    T = blocks.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=blocks.device).tril()
    mask = (document[:, None, :, None] == document[:, None, None, :]) & causal  # (B, 1, T, T)
    place = torch.arange(T, device=blocks.device).expand_as(blocks)
    starts = torch.where(torch.nn.functional.pad(ends, (1, 0))[:, :-1] == 1, place, 0).cummax(1).values
    return mask, place - starts


def tokenize(documents: list[corpus.Document], tokenizer, limit: float = math.inf) -> Part:
    """The first `limit` tokens of documents, each followed by the end-of-text token. The words of a document that is
    cut count in proportion."""
    ids = []
    words = 0.0
    count = 0
    for document, tokens in zip(documents, tokens_of(documents, tokenizer)):
        whole = len(tokens) + 1
        kept = min(whole, limit - len(ids))
        ids += [*tokens, tokenizer.eos_token_id][:kept]
        words += document.words * kept / whole
        count += 1
        if len(ids) >= limit:
            break
    return Part(torch.tensor(ids, dtype=torch.int32), words, count)


def tokens_of(documents: list[corpus.Document], tokenizer, chunk: int = 64) -> Iterator[list[int]]:
    """Yield the tokens of each document; `chunk` documents are tokenized at a time."""
    for first in range(0, len(documents), chunk):
        texts = [document.text for document in documents[first : first + chunk]]
        yield from pretrained.encode(tokenizer, texts)


def load(
    name: str,
    data_dir: str | None,
    tokenizer,
    limit: int | None = None,
    fraction: float = 1.0,
    limits: dict | None = None,
) -> tuple[dict[str, Part], dict]:
    """({part: Part}, the dataset's entry in run.json) of the corpus `name`: see corpus.load.

    limit: only the first `limit` tokens of each part. limits: {part: a limit for that part; 0 skips it}.
    fraction: of the training documents. Raises UserError.
    """
    found = corpus.load(name, data_dir)
    facts = {
        "name": found.name,
        "digest": found.digest(),
        "builtin": found.name == "builtin",
        "form": found.form,
        "fraction": fraction,
        "dropped": found.dropped,
    }
    found.parts["train"] = corpus.take_fraction(found.parts["train"], fraction)
    facts["copies"] = found.copies()
    parts = {}
    for name_of_part, documents in found.parts.items():
        own_limit = (limits or {}).get(name_of_part)
        if own_limit == 0:
            continue
        part = tokenize(documents, tokenizer, min(limit or math.inf, own_limit or math.inf))
        if len(part.ids) < 2:
            raise UserError(f"{name}: its part {name_of_part} has {len(part.ids)} tokens; two or more are needed")
        parts[name_of_part] = part
        facts[name_of_part] = {"documents": part.documents, "tokens": len(part.ids), "words": round(part.words)}
    return parts, facts


def describe(facts: dict) -> str:
    """One line on a dataset: its name, form and counts."""
    counts = "; ".join(
        f"{part} {facts[part]['tokens']:,} tokens of {facts[part]['documents']:,} documents"
        for part in corpus.PARTS
        if part in facts
    )
    dropped = "".join(f"; {count:,} {reason} left out" for reason, count in facts["dropped"].items())
    copies = (
        f"; {facts['copies']:,} validation or test documents are in the training part, too" if facts["copies"] else ""
    )
    return f"{facts['name']} ({facts['form']}): {counts}{dropped}{copies}"


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("wikitext2", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N tokens of each part", above=0)
    model: str = option("auto", pretrained.MODEL_HELP, type=pretrained.model_arg, metavar="NAME|PATH")


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    name = pretrained.resolve(args.model, args.data_dir)
    _, facts = load(args.data, args.data_dir, pretrained.open_any_tokenizer(name, args.data_dir), args.limit)
    print(f"{describe(facts)}; tokens of {name}; digest {facts['digest']}")


if __name__ == "__main__":
    run.cli(main)
