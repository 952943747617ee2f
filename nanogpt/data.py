"""Texts as token ids: tinyshakespeare, WikiText-2, OpenWebText, your own file or folder, and a built-in text.

    python nanogpt/data.py --data shakespeare                      # prepare it, print the counts
    python nanogpt/data.py --data wikitext2 --tokens word
    python nanogpt/data.py --data book.txt --tokens bpe            # byte pairs trained on the book itself
    python nanogpt/data.py --data openwebtext --tokens gpt2        # 9 billion tokens: hours; the same command continues

Each part (train, val, test) is one long 1-D uint16 tensor. `batch` takes blocks from random positions, `blocks` covers
the part once. A folder that `phi1.py prepare` wrote may hold exercises instead: rows with targets, see
corpora/prepared.py.
"""

import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import fetch, run
from common.options import option
from common.run import UserError

import numpy as np
import torch
from torch import Tensor

from corpora import openwebtext, prepared
from tokenizer import BytePairs, Characters, Words

TOKENS = ("char", "word", "gpt2", "bpe")
READS = {"char": ("char",), "word": ("word",), "bpe": ("bpe", "gpt2"), "hub": ("bpe", "hub")}  # kind of a tokenizer
BPE_VOCABULARY = 1024  # of --tokens bpe
SUFFIXES = {".txt", ".text", ".md", ".rst"}  # of the files that are read in a folder
NAMES = ("auto", "builtin", "shakespeare", "wikitext2", "openwebtext")
RAW = "https://raw.githubusercontent.com"
WIKITEXT = RAW + "/pytorch/examples/main/word_language_model/data/wikitext-2/{}.txt"
GPT2 = "https://huggingface.co/openai-community/gpt2/resolve/main/{}"
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{}"
PUBLISHED = {  # {corpus: {file in data_dir: (checksum, mirrors)}}; WikiText-2: train, validation, test
    "shakespeare": {
        "shakespeare/input.txt": (
            "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            [
                f"{RAW}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                f"{RAW}/karpathy/ng-video-lecture/master/input.txt",
            ],
        ),
    },
    "wikitext2": {
        "wikitext-2/wiki.train.tokens": (
            "sha256:9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            [WIKITEXT.format("train")],
        ),
        "wikitext-2/wiki.valid.tokens": (
            "sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            [WIKITEXT.format("valid")],
        ),
        "wikitext-2/wiki.test.tokens": (
            "sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
            [WIKITEXT.format("test")],
        ),
    },
    "gpt2_tokenizer": {
        "gpt2_tokenizer/vocab.json": (
            "sha256:196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            [GPT2.format("vocab.json"), OPENAI.format("encoder.json")],
        ),
        "gpt2_tokenizer/merges.txt": (
            "sha256:1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            [GPT2.format("merges.txt"), OPENAI.format("vocab.bpe")],
        ),
    },
}


@dataclass
class Text:
    """A text as tokens, in parts.

    train, val, test: uint16 (N,) each, or rows, int32 (N, 2, T), of corpora/prepared.py. test is None if there is no
    third part; the validation loss is then slightly optimistic, since it chooses the checkpoint. characters_per_token:
    {part: ratio} or None. The ratio converts a loss in nats per token to bits per character, loss / ln 2 / ratio, which
    is comparable between tokenizers that keep the whole text (not the words). bytes_per_token: the same for
    bits per byte, where the text is stored as tokens.
    """

    name: str
    level: str  # one of TOKENS
    tokenizer: Characters | Words | BytePairs  # see tokenizer.py
    train: Tensor
    val: Tensor
    test: Tensor | None
    digest: str
    characters_per_token: dict[str, float] | None = None
    bytes_per_token: dict[str, float] | None = None

    def facts(self) -> dict:
        """The text's entry in run.json."""
        facts = {
            "name": self.name,
            "digest": self.digest,
            "builtin": self.name == "builtin",
            "level": self.level,
            "vocabulary": self.tokenizer.vocab_size,
            "train": len(self.train),
            "val": len(self.val),
            "test": 0 if self.test is None else len(self.test),
            "selected_on": self.test is None,
            "characters_per_token": self.characters_per_token,
        }
        if self.bytes_per_token:
            facts["bytes_per_token"] = self.bytes_per_token
        if self.train.dim() == 3:
            facts["targets"] = n_targets(self.train)
        return facts

    def beginning(self) -> Tensor:
        """The tokens from which a sample starts, (1, T): the first one, or the prompt of the first exercise."""
        if self.train.dim() == 1:
            return self.train[None, :1].long()
        x, y = prepared.trimmed(self.val[:1])
        return x[:, : int((y[0] >= 0).nonzero()[0]) + 1]


def n_targets(part: Tensor) -> int:
    """How many targets a part has."""
    return int((part[:, 1] >= 0).sum()) if getattr(part, "ndim", 1) == 3 else len(part) - 1


def check_batch_size(bs: int, text: Text):
    """Raise UserError if --bs exceeds the number of training examples, which is surely a mistake."""
    if bs > len(text.train):
        kind = "tokens" if text.train.dim() == 1 else "exercises"
        raise UserError(f"--bs {bs}: must be at most {len(text.train)}, the number of {kind} to train on")


def batch(
    tokens: Tensor, block_size: int, batch_size: int, seed: int, step: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Blocks from random positions, which are a function of (seed, step): x and y, int64 (batch_size, block_size) each.

    y is x shifted by one token: y[:, t] follows x[:, : t + 1]. Raises UserError if `tokens` (N,) are fewer than
    block_size + 1. Rows (N, 2, T) come in a random order, with targets of -1, which do not count.
    """
    if tokens.dim() == 3:
        return tuple(run.to_device(part, device) for part in prepared.batch(tokens, block_size, batch_size, seed, step))
    positions = len(tokens) - block_size
    if positions < 1:
        raise UserError(
            f"the text is too short: {len(tokens):,} tokens to train on, but one block and the token after it are "
            f"{block_size + 1}; use a longer text or smaller blocks, --block-size N"
        )
    generator = torch.Generator().manual_seed(run.seed_at(seed, step))
    start = torch.randint(positions, (batch_size,), generator=generator)
    # row i of the unfolded view is the window that starts at i, so one gather of rows takes all blocks
    window = tokens.unfold(0, block_size + 1, 1)[start].long()  # (N,) -> (B, T + 1)
    window = run.to_device(window, device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def blocks(
    tokens: Tensor, block_size: int, batch_size: int, device: str | torch.device = "cpu", limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x, y), int64 (B, block_size) each, until every token but the first has been a target exactly once.

    The blocks do not overlap. The last batch may be smaller, and the remaining tokens make one shorter block. To
    average losses, weight them by y.numel(). limit: at most `limit` targets, in blocks that are evenly spaced over the
    text, the same ones at every call. Rows (N, 2, T) are taken in their order.
    """
    if tokens.dim() == 3:
        prepared.check_rows(tokens, block_size)
        for rows in prepared.spaced(tokens, limit).split(batch_size):
            yield tuple(run.to_device(part, device) for part in prepared.trimmed(rows))
        return
    if limit is not None and limit < block_size:
        tokens = tokens[: limit + 1]
    n_blocks = (len(tokens) - 1) // block_size
    whole = limit is None or limit >= len(tokens) - 1
    n_chosen = n_blocks if whole else limit // block_size
    chosen = torch.arange(n_chosen) * n_blocks // max(1, n_chosen)
    for rows in chosen.split(batch_size) if n_chosen else ():
        window = tokens.unfold(0, block_size + 1, block_size)[rows].long()  # (N,) -> (B, T + 1)
        window = run.to_device(window, device)
        yield window[:, :-1], window[:, 1:]
    if whole and len(rest := tokens[n_blocks * block_size :].long().to(device)) > 1:
        yield rest[None, :-1], rest[None, 1:]


# ---------------------------------------------------------------------------------------------------- parts and tokens


def load(
    name: str,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    tokens: str = "char",
    tokenizer=None,
    held_out: bool = False,
) -> Text:
    """Load, split and tokenize the text `name`.

    name: one of NAMES, or the path of a text file or of a folder of text files. "auto" is shakespeare if it is there or
    can be downloaded, else the built-in text, with a warning on standard error.
    tokens: "char", "word", "gpt2", or "bpe" (byte pairs trained on the training part).
    limit: only the first `limit` tokens of each part. tokenizer: the tokenizer of a model to start
    from, in place of `tokens`. held_out: validate on the last tenth of the training part, and read no other part.
    Raises UserError.
    """
    data_dir = run.data_dir(data_dir)
    name = choose(name, data_dir)
    if held_out and prepared.is_prepared(name):
        raise UserError(f"--held-out: is for texts, and {display_name(name)} holds exercises")
    if prepared.is_prepared(name):
        if tokens != "bpe":
            raise UserError(f"{display_name(name)}: is stored as byte pairs: use --tokens bpe, not {tokens}")
        tokenizer, train, val, digest = prepared.load(name, limit, tokenizer)
        return Text(Path(name).name, tokens, tokenizer, train, val, None, digest)
    if name == "openwebtext":
        if tokens != "gpt2":
            raise UserError(f"openwebtext is stored as GPT-2 tokens: use --tokens gpt2, not {tokens}")
        tokenizer = gpt2_tokenizer(data_dir)
        train, val, digest = openwebtext.memory_maps(data_dir / "openwebtext", tokenizer, limit)
        if held_out:
            first_nine_tenths = int(0.9 * len(train))
            train, val = train[:first_nine_tenths], train[first_nine_tenths:][: openwebtext.VAL_TOKENS]
            if len(val) < 2:
                raise UserError("openwebtext: is too short: the last tenth for training has one token, and needs 2")
            digest = hashlib.blake2b(f"held out of {digest}".encode(), digest_size=16).hexdigest()
        val_bytes = openwebtext.count_bytes(val, tokenizer)
        return Text(name, tokens, tokenizer, train, val, None, digest, bytes_per_token={"val": val_bytes / len(val)})
    if tokenizer is not None:
        kind = tokenizer.state()["kind"]
        if tokens not in READS[kind]:
            raise UserError(f"--tokens {tokens}: the model of --init reads {kind} tokens")
    parts = read_parts(name, data_dir)
    if held_out:
        parts = split(parts[0], 0.9)
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
    if tokenizer is not None and tokens == "char":
        check_characters(name, parts, tokenizer)
    tokenizer = tokenizer or make_tokenizer(tokens, name, parts, data_dir)
    if tokenizer.vocab_size > 2**16:
        raise UserError(f"the model of --init has {tokenizer.vocab_size:,} tokens; texts are kept as 16-bit numbers")
    encoded = {}
    characters_per_token = {}
    for part, text in zip(("train", "val", "test"), parts):
        ids = torch.from_numpy(np.array(tokenizer.encode(text), dtype=np.uint16))
        if len(ids) < 2:
            raise UserError(f"{display_name(name)}: is too short: {part} has {len(ids)} tokens, and needs 2")
        encoded[part] = ids[:limit]
        characters_per_token[part] = round(len(text) / len(ids), 4)
    if tokenizer.vocab_size < 2 or len(set(parts[0])) < 2:
        raise UserError(f"{display_name(name)}: repeats one character; the training part needs two different ones")
    train, val, test = (encoded.get(part) for part in ("train", "val", "test"))
    return Text(Path(name).stem, tokens, tokenizer, train, val, test, digest, characters_per_token)


def display_name(name: str) -> str:
    """A path relative to the working directory, any other name as it is."""
    return run.display_path(name) if os.path.isabs(name) else name


def check_characters(name, parts, tokenizer):
    """Raise UserError if a text has characters that the model to start from does not know."""
    unknown = tokenizer.missing("".join(parts))
    if unknown:
        raise UserError(
            f"{display_name(name)}: has the character {unknown[0]!r}, which the model of --init does not know; start "
            "from one of byte pairs (--tokens bpe), which reads any text"
        )


def make_tokenizer(level: str, name: str, parts: list[str], data_dir: Path) -> Characters | Words | BytePairs:
    """The tokenizer for `level`, one of TOKENS. Words and byte pairs are learned from parts[0], the training part."""
    if level == "char":  # of all parts, as is usual: a character that is only in the validation part is never trained
        return Characters.of("".join(parts))
    if level == "word" and name == "wikitext2":  # already split into words, with rare ones replaced by <unk>
        return Words.of(parts[0], "spaces", min_count=1)
    if level == "word":
        return Words.of(parts[0])
    if level == "bpe":
        return BytePairs.train(parts[0], BPE_VOCABULARY)
    return gpt2_tokenizer(data_dir)


def gpt2_tokenizer(data_dir: str | Path | None = None) -> BytePairs:
    """GPT-2's tokenizer, downloaded if it is not there. Raises UserError."""
    return BytePairs.read(*prepare("gpt2_tokenizer", run.data_dir(data_dir)))


def read_parts(name: str, data_dir: Path) -> list[str]:
    """The parts of the text `name`: [train, val, test], or [train, val] for tinyshakespeare."""
    if name == "wikitext2":
        return [path.read_text(encoding="utf-8") for path in prepare(name, data_dir)]
    if name == "shakespeare":
        text = prepare(name, data_dir)[0].read_text(encoding="utf-8")
        return split(text, 0.9)  # as nanoGPT does
    if name == "builtin":
        text = builtin()
    elif name in PUBLISHED:
        text = prepare(name, data_dir)[0].read_text(encoding="utf-8")
    else:
        text = read_path(Path(name))
    return split(text, 0.8, 0.9)


def split(text: str, *shares: float) -> list[str]:
    """The parts of a text that end after these shares of it, and the rest: 0.8, 0.9 make 80%, 10% and 10%."""
    ends = [0, *(int(share * len(text)) for share in shares), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def read_path(path: Path) -> str:
    """The text of a file, or of all text files of a folder and its subfolders. Raises UserError."""
    if not path.is_dir():
        return read_file(path)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{display_name(str(path))}: holds no text files ({', '.join(sorted(SUFFIXES))})")
    articles = [read_file(file).strip("\n") for file in files]
    different = list(dict.fromkeys(articles))
    if len(different) < len(articles):  # else a copy might be in the training part and in another
        copies = len(articles) - len(different)
        where = display_name(str(path))
        print(f"{where}: {copies:,} files repeat the text of another; each is read once", file=sys.stderr)
    return in_random_order(different)


def read_file(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError."""
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise OSError(0, "not a regular file")
        content = path.read_bytes()
        if b"\0" in content:
            raise ValueError("it has zero bytes")
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{display_name(str(path))}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{display_name(str(path))}: is not a text file in UTF-8 ({error})") from error


def in_random_order(articles: Iterable[str]) -> str:
    """Articles as one text, ordered by their digests: a random order that is the same for everyone.

    In another order, the training and validation parts might be about different subjects or years.
    """
    articles = [article.strip("\n") for article in articles]
    return "\n\n\n".join(sorted(articles, key=lambda article: hashlib.blake2b(article.encode()).digest())) + "\n"


def builtin() -> str:
    """The language reference that Python's help() shows, some 370,000 characters.

    Its topics quote each other at length. Only the first copy of a paragraph is kept; otherwise the validation part
    would contain text of the training part.
    """
    from pydoc_data.topics import topics

    seen = set()
    articles = []
    for topic in sorted(topics):
        paragraphs = [paragraph.strip("\n") for paragraph in topics[topic].split("\n\n")]
        paragraphs = [paragraph for paragraph in paragraphs if paragraph and paragraph not in seen]
        seen.update(paragraphs)
        if paragraphs:
            articles.append("\n\n".join(paragraphs))
    return in_random_order(articles)


# ----------------------------------------------------------------------------------------------------------- downloads


dataset_arg = run.dataset_arg(*NAMES, files=True)  # the argparse type of --data
DATA_HELP = f"{', '.join(NAMES)}, a text file, or a folder of text files"


def choose(name: str, data_dir: Path) -> str:
    """`name` itself; for "auto", shakespeare if it is there or can be downloaded, else builtin with a warning."""
    if name != "auto":
        return name
    try:
        prepare("shakespeare", data_dir)
        return "shakespeare"
    except fetch.Unreachable as error:
        print(
            f"*** {error}\n*** TRAINING ON THE BUILT-IN TEXT INSTEAD (the reference of "
            "the Python language): its results say nothing about Shakespeare.",
            file=sys.stderr,
        )
        return "builtin"


def prepare(name: str, data_dir: Path) -> list[Path]:
    """The verified files of the corpus `name` in `data_dir`, downloaded if they are not there. Raises UserError."""
    files = PUBLISHED[name]
    try:
        return [fetch.download(mirrors, data_dir / file, checksum) for file, (checksum, mirrors) in files.items()]
    except fetch.Unreachable as error:
        missing = ", ".join(file for file in files if not (data_dir / file).exists())
        raise fetch.Unreachable(name, [f"no {missing} in {run.display_path(data_dir)}", *error.reasons]) from None


# ---------------------------------------------------------------------------------------------------------------- main


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("shakespeare", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    limit: int | None = option(None, "only the first N tokens of each part; openwebtext: also fetch no more", above=0)
    tokens: str = option("char", "what a token is", choices=TOKENS)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    text = load(args.data, args.data_dir, args.limit, args.tokens)
    print(f"{text.name}, --tokens {text.level}: vocabulary {text.tokenizer.vocab_size:,}, content digest {text.digest}")
    for name, part in (("train", text.train), ("val", text.val), ("test", text.test)):
        if part is not None:
            ratio = f", {text.characters_per_token[name]:.2f} characters each" if text.characters_per_token else ""
            print(f"{name:>6}: {len(part):13,} tokens{ratio}")


if __name__ == "__main__":
    run.cli(main)
