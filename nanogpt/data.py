"""Texts as integers: tinyshakespeare, WikiText-2, OpenWebText, any file or folder of your own, and one built in.

    python nanogpt/data.py --data shakespeare                      # prepare it, print the counts
    python nanogpt/data.py --data wikitext2 --tokens word
    python nanogpt/data.py --data book.txt --tokens bpe            # byte pairs trained on the book itself
    python nanogpt/data.py --data openwebtext --tokens gpt2        # 9 billion tokens: hours; give it again to go on

Every part of a text is one long 1-D uint16 tensor. `batch` cuts blocks out of it at random places, `blocks` covers it
once from beginning to end.
"""

import argparse
import hashlib
import json
import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fetch
import run
from run import UserError
from tokenizer import END_OF_TEXT, BytePairs, Characters, Words, tokenizer_from  # noqa: F401, part of what this offers

TOKENS = ("char", "word", "gpt2", "bpe")
BPE_VOCABULARY = 1024  # of --tokens bpe
SUFFIXES = {".txt", ".text", ".md", ".rst"}  # what counts as text in a folder
RAW = "https://raw.githubusercontent.com"
WIKITEXT = RAW + "/pytorch/examples/main/word_language_model/data/wikitext-2/{}.txt"
GPT2 = "https://huggingface.co/openai-community/gpt2/resolve/main/{}"
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{}"
PUBLISHED = {  # {corpus: {file under data_dir: (checksum, mirrors)}}, in the order train, validation, test
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
# `datasets` no longer runs the script that lies beside the data; its publisher's pull request 18 has them as 93 Parquet
# files, which are read without it. What the hub itself converts ends after the first five gigabytes.
OPENWEBTEXT = dict(
    path="parquet",
    split="train",
    streaming=True,
    data_files="hf://datasets/Skylion007/openwebtext@c6680bb039f28c472e44d33acb240c3068b89a82/data/train-*.parquet",
)
DOCUMENTS = 8_013_769  # in OpenWebText
HELD_OUT = 1_000  # its first documents validate, so that they are the same however much of the rest is at hand
VALIDATED = 2**20  # and of their tokens these many: a minute's work for GPT-2 on a GPU


class Text:
    """A text, cut into parts and turned into integers.

    train, val, test: uint16 (N,) each; test is None where the corpus has no third part, and then whatever is reported
    of val has been selected on. tokenizer: see tokenizer.py. characters_per_token: {part: ratio}, which turns a loss
    in nats a token into bits a character, loss / ln 2 / ratio, so that tokenizers can be compared; None if not known.
    """

    def __init__(self, name, level, tokenizer, parts, digest, characters_per_token=None):
        self.name, self.level, self.tokenizer, self.digest = name, level, tokenizer, digest
        self.train, self.val, self.test = parts
        self.characters_per_token = characters_per_token

    def facts(self):
        """What a record says of the text."""
        return {
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


def batch(tokens, block_size, batch_size, seed, step, device="cpu"):
    """Blocks at random places, which are a function of (seed, step): x and y, int64 (batch_size, block_size) each.

    y is x moved on by one: y[:, t] is what follows x[:, : t + 1]. Raises UserError where no block fits.
    """
    places = len(tokens) - block_size
    if places < 1:
        raise UserError(
            f"the text is too short: {len(tokens):,} tokens to train on, and a block of {block_size} with "
            "the token that follows it does not fit; take a longer text or a smaller block"
        )
    generator = torch.Generator().manual_seed(run.seed_at(seed, step))
    start = torch.randint(places, (batch_size,), generator=generator)
    # row i of the unfolded view is the window that begins at i, so that all blocks together are one gather of rows
    window = tokens.unfold(0, block_size + 1, 1)[start].long()  # (B, T + 1)
    if torch.device(device).type == "cuda":
        window = window.pin_memory().to(device, non_blocking=True)
    window = window.to(device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def blocks(tokens, block_size, batch_size, device="cpu"):
    """Yield (x, y), int64 (B, block_size) each, until every token but the first has been a target exactly once.

    The blocks do not overlap; the last batch may have fewer of them, and what is left at the very end is a batch of
    one shorter block. Weight the losses by y.numel().
    """
    whole = (len(tokens) - 1) // block_size
    for first in range(0, whole, batch_size):
        n = min(batch_size, whole - first)
        window = tokens[first * block_size : (first + n) * block_size + 1].long().to(device)
        yield window[:-1].view(n, block_size), window[1:].view(n, block_size)
    if len(rest := tokens[whole * block_size :].long().to(device)) > 1:
        yield rest[None, :-1], rest[None, 1:]


# --------------------------------------------------------------------------------------------------- parts and tokens


def load(name, data_dir=None, limit=None, tokens="char"):
    """The text `name` as a Text.

    name: shakespeare, wikitext2, openwebtext, builtin, the path of a text file or of a folder of them, or "auto":
    shakespeare if it is there or a mirror delivers it, else the built-in text, said on standard error.
    tokens: "char", "word", "gpt2", or "bpe" (byte pairs trained on this text's training part).
    limit: only the first so many tokens of each part. Raises UserError.
    """
    data_dir = run.data_dir(data_dir)
    name = choose(name, data_dir)
    if name == "openwebtext":
        if tokens != "gpt2":
            raise UserError(f"openwebtext is kept as GPT-2's tokens: --tokens gpt2, not {tokens}")
        return open_openwebtext(data_dir, limit)
    parts = read(name, data_dir)
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
    tokenizer = make_tokenizer(tokens, name, parts, data_dir)
    ids = [torch.from_numpy(np.array(tokenizer.encode(part), dtype=np.uint16)) for part in parts]
    if min(map(len, ids)) < 2 or tokenizer.vocab_size < 2 or len(set(parts[0])) < 2:
        raise UserError(
            f"{shown(name)}: is too short, or has too little in it: {sum(map(len, parts)):,} characters, "
            f"{tokenizer.vocab_size} different tokens, in {len(parts)} parts of at least 2"
        )
    ratios = {part: round(len(text) / len(i), 4) for part, text, i in zip(("train", "val", "test"), parts, ids)}
    ids = [i[:limit] for i in ids] + [None] * (3 - len(ids))
    return Text(Path(name).stem, tokens, tokenizer, ids, digest, ratios)


def shown(name):
    """A path as one would type it here, any other name as it is."""
    return run.shown(name) if os.path.isabs(name) else name


def make_tokenizer(level, name, parts, data_dir):
    """The tokenizer of that level; what has to be learned is learned from the training part, parts[0]."""
    if level == "char":  # of all parts, as is usual: a symbol that is never trained on costs what it costs
        return Characters.of("".join(parts))
    if level == "word" and name == "wikitext2":  # it comes cut into words, the rare ones replaced already
        return Words.of(parts[0], "spaces", at_least=1)
    if level == "word":
        return Words.of(parts[0])
    if level == "bpe":
        return BytePairs.train(parts[0], BPE_VOCABULARY)
    return gpt2_tokenizer(data_dir)


def gpt2_tokenizer(data_dir=None):
    """GPT-2's own, fetched if it is not there. Raises UserError."""
    return BytePairs.read(*prepare("gpt2_tokenizer", run.data_dir(data_dir)))


def read(name, data_dir):
    """The parts of the text `name`: [train, val, test], or [train, val] of tinyshakespeare."""
    if name == "wikitext2":
        return [path.read_text(encoding="utf-8") for path in prepare(name, data_dir)]
    if name == "shakespeare":
        text = prepare(name, data_dir)[0].read_text(encoding="utf-8")
        return [text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]]  # as nanoGPT cuts it
    text = builtin() if name == "builtin" else read_own(Path(name))
    first, second = int(0.8 * len(text)), int(0.9 * len(text))
    return [text[:first], text[first:second], text[second:]]


def read_own(path):
    """A text file, or all the text files of a folder and the folders in it."""
    if not path.is_dir():
        return read_file(path)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{shown(path)}: holds no text (files that end in {', '.join(sorted(SUFFIXES))})")
    return in_order(read_file(file) for file in files)


def read_file(path):
    """The text of a UTF-8 file. Raises UserError."""
    try:
        content = path.read_bytes()
        if b"\0" in content:
            raise ValueError("it has bytes that are zero")
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{shown(path)}: is no text in UTF-8 ({error})") from None


def in_order(articles):
    """Articles as one text, in the order of their digests: a random one, but the same for everyone, so that the cut
    into parts is not a cut between subjects or years."""
    articles = [article.strip("\n") for article in articles]
    return "\n\n\n".join(sorted(articles, key=lambda article: hashlib.blake2b(article.encode()).digest())) + "\n"


def builtin():
    """The language reference that every Python carries for its help(), some 370,000 characters.

    Its topics quote each other at length: a paragraph is kept where it comes first, else the same text would be
    trained on and validated on.
    """
    from pydoc_data.topics import topics

    seen, articles = set(), []
    for topic in sorted(topics):
        paragraphs = [p for p in (p.strip("\n") for p in topics[topic].split("\n\n")) if p and p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            articles.append("\n\n".join(paragraphs))
    return in_order(articles)


# ---------------------------------------------------------------------------------------------- where they come from


DATA_HELP = "shakespeare, wikitext2, openwebtext, builtin, auto, a text file, or a folder of them"


def known(name):
    """The argparse type of --data: a name as it is, a file or folder as an absolute path."""
    if name in ("auto", "builtin", "shakespeare", "wikitext2", "openwebtext"):
        return name
    if Path(name).exists():
        return str(Path(name).resolve())
    raise argparse.ArgumentTypeError(
        f"{name} is neither auto, builtin, shakespeare, wikitext2, openwebtext, nor a file or folder"
    )


def choose(name, data_dir):
    """What `name` stands for: itself, or for "auto" shakespeare if it can be had, else builtin, said loudly."""
    if name != "auto":
        return name
    try:
        prepare("shakespeare", data_dir)
        return "shakespeare"
    except fetch.Unreachable as error:
        why = str(error).removeprefix("error: ")
        print(
            f"*** {why}\n*** TRAINING ON THE BUILT-IN TEXT INSTEAD, the reference of the Python language: its "
            "numbers say nothing of Shakespeare.",
            file=sys.stderr,
        )
        return "builtin"


def prepare(name, data_dir):
    """The verified files of the corpus `name` under `data_dir`, fetched if they are not there. Raises UserError."""
    return [fetch.download(mirrors, data_dir / file, checksum) for file, (checksum, mirrors) in PUBLISHED[name].items()]


# -------------------------------------------------------------------------------------------------------- OpenWebText


def open_openwebtext(data_dir, limit=None):
    """OpenWebText as memory maps of train.bin and val.bin, made or continued first where more is wanted than is there.

    Files that nanoGPT's prepare.py has made are taken as they are: the format is the same.
    """
    folder = data_dir / "openwebtext"
    tokenizer = gpt2_tokenizer(data_dir)
    have = prepare_openwebtext(folder, tokenizer, limit)
    parts, digest = [], hashlib.blake2b(digest_size=16)
    for part in ("train", "val"):
        file = folder / f"{part}.bin"
        there = file.stat().st_size // 2 if file.exists() else 0
        wanted = have.get(part, there)
        if there < max(wanted, 2):
            raise UserError(f"{shown(file)}: is shorter than when it was written; remove its folder to begin again")
        ids = torch.from_file(str(file), shared=False, size=wanted, dtype=torch.uint16)
        parts.append(ids[: min(limit or wanted, VALIDATED if part == "val" else wanted)])
        digest.update(len(parts[-1]).to_bytes(8, "little") + parts[-1][:VALIDATED].numpy().tobytes())
    return Text("openwebtext", "gpt2", tokenizer, [*parts, None], digest.hexdigest())


def prepare_openwebtext(folder, tokenizer, limit=None, stream=None, at_once=1000):
    """Stream the documents, and append their tokens to val.bin (the first HELD_OUT) and train.bin (the others).

    Each document ends with <|endoftext|>. After every `at_once` documents the files are on the disk, and
    progress.json says how far they go and where the stream was: what an interruption left behind that is cut off, and
    the files end up the same to the byte. Stops when train.bin has `limit` tokens; without one, at the end.
    stream: documents {"text": ...} with state_dict() and load_state_dict(), as `datasets` has them.
    Returns {"train": tokens, "val": tokens, "documents": ..., "complete": ...}. Raises UserError.
    """
    progress = folder / "progress.json"
    if not progress.exists() and (folder / "train.bin").exists():
        return {}  # made by something else: whatever is there
    have = {"documents": 0, "train": 0, "val": 0, "complete": False, "stream": None}
    if progress.exists():
        have = json.loads(progress.read_text(encoding="utf-8"))
    if have["complete"] or (limit and have["train"] >= limit):
        return have
    lock = run.hold(run.make_folder(folder))
    end = tokenizer.vocabulary[END_OF_TEXT]
    try:
        stream = stream or open_stream()
        if have["stream"]:
            stream.load_state_dict(have["stream"])
        run.write_json(progress, have)  # from here on the files are ours
        files = {}
        for part in ("train", "val"):
            files[part] = open(folder / f"{part}.bin", "ab")
            files[part].truncate(2 * have[part])
        bar = tqdm(desc="OpenWebText", total=DOCUMENTS, initial=have["documents"], unit=" documents", disable=None)
        documents = iter(stream)
        while some := list(islice(documents, at_once)):
            for number, document in enumerate(some, have["documents"]):
                part, ids = "val" if number < HELD_OUT else "train", tokenizer.encode(document["text"])
                files[part].write(np.array([*ids, end], dtype=np.uint16).tobytes())
                have[part] += len(ids) + 1
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            have["documents"] += len(some)
            have["stream"] = stream.state_dict()
            run.write_json(progress, have)
            bar.update(len(some))
            bar.set_postfix(tokens=f"{have['train'] / 1e6:,.0f} M")
            if limit and have["train"] >= limit:
                break
        else:
            have |= {"complete": True, "stream": None}
            run.write_json(progress, have)
        bar.close()
    except Exception as error:  # the network's, which have no base in common, and the disk's
        why = f"{type(error).__name__}: {str(error)[:120].strip()}".splitlines()[0]
        raise UserError(
            f"openwebtext: stopped after {have['documents']:,} documents ({why}); give the same command again to go on"
        ) from error
    finally:
        lock.close()
    return have


def open_stream():
    """OpenWebText as the hub streams it, an iterable of {"text": ...}."""
    import datasets

    return datasets.load_dataset(**OPENWEBTEXT)


# --------------------------------------------------------------------------------------------------------------- main


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_flags(
        p,
        "data_dir",
        data=dict(type=known, default="shakespeare", help=DATA_HELP),
        limit=dict(help="only the first N tokens of each part; of openwebtext no more is fetched"),
    )
    p.add_argument("--tokens", choices=TOKENS, default="char", help="(default: %(default)s)")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    text = load(args.data, args.data_dir, args.limit, args.tokens)
    print(f"{text.name}, --tokens {text.level}: vocabulary {text.tokenizer.vocab_size:,}, content digest {text.digest}")
    for name, part in (("train", text.train), ("val", text.val), ("test", text.test)):
        if part is not None:
            ratio = f", {text.characters_per_token[name]:.2f} characters each" if text.characters_per_token else ""
            print(f"{name:>6}: {len(part):13,} tokens{ratio}")


if __name__ == "__main__":
    run.cli(main)
