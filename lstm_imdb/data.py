"""IMDB reviews as sequences of word indices, in batches of similar length.

    python lstm_imdb/data.py --data imdb             # prepare it, print the counts
    python lstm_imdb/data.py --data my-reviews.csv   # a CSV file of your own

Where the texts come from and how they are split is in corpus.py.
"""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from common import run
from common.options import option
from common.terminal import UserError
from common.words import EMOJI, WORD

import numpy as np
import regex
import torch
from torch import Tensor

import corpus

PAD, UNK = 0, 1
DATA_HELP = "imdb, builtin, auto, a CSV file with text and label columns, or a folder like aclImdb"
dataset_arg = run.dataset_arg("auto", "builtin", "imdb", files=True)
TOKEN = regex.compile(rf"{WORD}(?:(?<=n)'t\b)?|'(?:s|re|ve|ll|d|m)\b|[!?]|{EMOJI}")
SENTENCE_DRAWS = 1 << 20  # the place of epoch 0's sentences in a seed's random numbers, past that of its order
SENTENCE_END = regex.compile(r"""(?<=[.!?…][)"'”’]?)\s+|(?:<br />)+""")


def tokenize(text: str) -> list[str]:
    """Lower-case words, contractions in two ("do n't", "it 's"), emoji, and ! and ?. All else separates words.

    Letters keep their combining marks, composed where Unicode has such a letter (NFC).

    >>> tokenize("It's good.<br />Don't miss it!")
    ['it', "'s", 'good', 'do', "n't", 'miss', 'it', '!']
    """
    text = unicodedata.normalize("NFC", text.replace("İ", "i"))  # lower() would give the Turkish letter a second dot
    tokens = []
    for token in TOKEN.findall(text.lower().replace("<br />", " ").replace("’", "'")):
        if token.endswith("n't") and token != "n't":
            tokens.append(token.removesuffix("n't"))
            token = "n't"
        tokens.append(token)
    return tokens


def split_sentences(text: str) -> list[str]:
    """The sentences of a text. One ends at a line break, and at a full stop, ! or ? before a space.

    >>> split_sentences('Well made (and acted!) Mr. T. is 3.5 feet tall.<br />"Wow!" they said')
    ['Well made (and acted!)', 'Mr.', 'T.', 'is 3.5 feet tall.', '"Wow!"', 'they said']
    """
    return [sentence for sentence in SENTENCE_END.split(text) if sentence.strip()]


def stop_words() -> frozenset[str]:
    """scikit-learn's English stop words; "not" and "no" are among them. Raises UserError if it is not installed."""
    try:
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    except ImportError:
        raise UserError("--stop-words: needs scikit-learn: pip install -r requirements.txt") from None
    return ENGLISH_STOP_WORDS | {"n't", "'s", "'re", "'ve", "'ll", "'d", "'m"}


class Vocabulary:
    """The words of the training reviews, the commonest first, after <pad> (0) and <unk> (1).

    max_words: how many words at most; min_count: how often a word has to occur.
    """

    def __init__(self, words: list[str], ignored: frozenset[str] = frozenset()):
        self.words, self.ignored = ["<pad>", "<unk>", *words], ignored
        self.index = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def count(cls, texts: list[list[str]], max_words: int, min_count: int, ignored=frozenset()) -> "Vocabulary":
        """The vocabulary of tokenized texts, without the words `ignored`. Equal counts are in alphabetical order."""
        counts = Counter(word for text in texts for word in text if word not in ignored)
        words = sorted((word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word))
        return cls(words[:max_words], ignored)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: list[str]) -> list[int]:
        """Indices of tokens; ignored ones are left out, and a text of nothing else is one <unk>."""
        return [self.index.get(token, UNK) for token in tokens if token not in self.ignored] or [UNK]


@dataclass
class Reviews(torch.utils.data.Dataset):
    """Labelled reviews as word indices, all in memory, truncated to `max_len` when they are read.

    tokens: int32 (all words of all reviews,); starts: int64 (N + 1,), where each review begins; labels: int64 (N,);
    keep: "start" or "end", the part of a long review that is kept; rows: int64 (N,), rows of the corpus;
    sentence_starts: int64 (sentences + 1,), where each sentence begins; sentences: the share of the reviews of which a
    shuffled epoch reads one sentence alone. Indexing gives one example padded to `max_len`, (int64 (max_len,), int),
    for use with a DataLoader; `batches` is the fast way.
    """

    tokens: Tensor
    starts: Tensor
    labels: Tensor
    rows: Tensor
    max_len: int = 400
    keep: str = "start"
    sentence_starts: Tensor | None = None
    sentences: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """int64 (N,): words of each review, after truncation."""
        return self.starts.diff().clamp(max=self.max_len)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        i = range(len(self))[i]
        first, lengths = self.spans()
        tokens = self.collate(first[i : i + 1], lengths[i : i + 1], self.max_len)
        return tokens[0], int(self.labels[i])

    def spans(self, shuffle: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """(where in `tokens` each review begins, how many words are read), int64 (N,) each.

        With `shuffle`, (seed, epoch), a share of `sentences` of the reviews, drawn at random, is one sentence, drawn at
        random, too; a long sentence is cut like a review.
        """
        starts, ends = self.starts[:-1], self.starts[1:]
        if shuffle is not None and self.sentences:
            seed, epoch = shuffle
            generator = torch.Generator().manual_seed(run.seed_at(seed, SENTENCE_DRAWS + epoch))
            of_review = torch.searchsorted(self.sentence_starts, self.starts)  # (N + 1,): the first sentence of each
            count = of_review.diff()  # (N,)
            drawn = of_review[:-1] + (torch.rand(len(self), generator=generator) * count).long()  # (N,)
            alone = torch.rand(len(self), generator=generator) < self.sentences  # (N,)
            starts = torch.where(alone, self.sentence_starts[drawn], starts)
            ends = torch.where(alone, self.sentence_starts[drawn + 1], ends)
        lengths = (ends - starts).clamp(max=self.max_len)
        return (starts if self.keep == "start" else ends - lengths), lengths

    def collate(self, first: Tensor, lengths: Tensor, width: int | None = None) -> Tensor:
        """Tokens int64 (B, T) of the spans (B,), padded to `width` or else to the longest."""
        position = torch.arange(width or int(lengths.max()))  # (T,)
        inside = position < lengths[:, None]  # (B, T)
        places = (first[:, None] + position).clamp(max=len(self.tokens) - 1)
        return torch.where(inside, self.tokens[places], PAD).long()

    def order(self, batch_size: int, shuffle: tuple[int, int] | None = None, bucket: int = 50) -> list[Tensor]:
        """The indices of every batch. Without `shuffle` sorted by length. With (seed, epoch): a random permutation is
        cut into chunks of `bucket` batches, each is sorted by length, and the batches come in random order. So every
        review is seen once per epoch, beside others of its length, which differ from epoch to epoch."""
        _, lengths = self.spans(shuffle)
        if shuffle is None:
            return list(lengths.argsort(stable=True).split(batch_size))
        generator = torch.Generator().manual_seed(run.seed_at(*shuffle))
        chunks = torch.randperm(len(self), generator=generator).split(bucket * batch_size)
        batches = [b for chunk in chunks for b in chunk[lengths[chunk].argsort(stable=True)].split(batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def batches(
        self, batch_size: int, shuffle: tuple[int, int] | None = None, start: int = 0, device="cpu", bucket: int = 50
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (tokens int64 (B, T), lengths (B,), labels (B,), index (B,)); T is the longest review of the batch.

        shuffle, bucket: see `order`; start: how many batches of the epoch to skip.
        """
        first, lengths = self.spans(shuffle)
        for index in self.order(batch_size, shuffle, bucket)[start:]:
            tokens = self.collate(first[index], lengths[index])
            batch = (run.to_device(part, device) for part in (tokens, lengths[index], self.labels[index]))
            yield *batch, index


def build(rows, tokenized, labels, vocabulary, max_len, keep) -> Reviews:
    """Reviews of the corpus rows `rows`; tokenized: {row: tokens}; labels of all rows."""
    encoded = [vocabulary.encode(tokenized[i]) for i in rows]
    starts = np.cumsum([0, *map(len, encoded)])
    flat = np.fromiter((i for review in encoded for i in review), np.int32, starts[-1])
    labels = torch.tensor([labels[i] for i in rows])
    return Reviews(torch.from_numpy(flat), torch.from_numpy(starts), labels, torch.tensor(rows), max_len, keep)


def sentence_starts(reviews: Reviews, texts: list[str], vocabulary: Vocabulary) -> Tensor:
    """int64 (sentences + 1,): where in `reviews.tokens` the sentences of the reviews begin. texts: of all rows."""
    lengths = []
    for row in reviews.rows.tolist():
        sentences = [tokenize(sentence) for sentence in split_sentences(texts[row])]
        words = [sum(word not in vocabulary.ignored for word in sentence) for sentence in sentences]
        lengths += [count for count in words if count] or [1]  # a review without words is one <unk>
    return torch.tensor([0, *lengths]).cumsum(0)


@dataclass
class Data:
    """The result of `load`: the three parts, the vocabulary, the corpus (texts, classes) and facts for a record."""

    train: Reviews
    val: Reviews
    test: Reviews
    vocabulary: Vocabulary
    corpus: corpus.Corpus
    facts: dict


def load(
    name: str,
    data_dir: str | None = None,
    limit: int | None = None,
    split: str = "7:1:2",
    max_words: int = 20_000,
    min_count: int = 2,
    filter_stop_words: bool = False,
    max_len: int = 400,
    keep: str = "start",
    sentences: float = 0.0,
) -> Data:
    """The dataset `name` (see corpus.load), tokenized and indexed by the vocabulary of its training reviews.

    limit: only the first `limit` reviews of each part; sentences: the share of the training reviews of which an epoch
    reads one sentence alone. Raises UserError.
    """
    texts, parts, facts = corpus.load(name, data_dir, split)
    parts = {part: rows[:limit] for part, rows in parts.items()}
    tokenized = {i: tokenize(texts.texts[i]) for rows in parts.values() for i in rows}
    parts = keep_apart(name, parts, tokenized, facts)
    ignored = stop_words() if filter_stop_words else frozenset()
    vocabulary = Vocabulary.count([tokenized[i] for i in parts["train"]], max_words, min_count, ignored)
    if len(vocabulary) < 4:
        raise UserError(
            f"{texts.name}: with --min-count {min_count} and --max-words {max_words} the vocabulary of the training "
            f"reviews has {len(vocabulary) - 2} words; two or more are needed"
        )
    reviews = [build(rows, tokenized, texts.labels, vocabulary, max_len, keep) for rows in parts.values()]
    loaded = Data(*reviews, vocabulary, texts, facts)
    if sentences:
        loaded.train.sentences = sentences
        loaded.train.sentence_starts = sentence_starts(loaded.train, texts.texts, vocabulary)
    facts |= {part: len(rows) for part, rows in parts.items()} | {"vocabulary": len(vocabulary)}
    return loaded


def keep_apart(name: str, parts: dict, tokenized: dict, facts: dict) -> dict:
    """The rows of each part without those whose words a review of an earlier part has, too; `facts` takes their number.

    The published reviews, the built-in ones and the official split of a folder stay as they are. Raises UserError.
    """
    seen = set()
    apart = {}
    copies = 0
    for part, rows in parts.items():
        words = {i: tuple(tokenized[i]) for i in rows}
        apart[part] = [i for i in rows if not words[i] or words[i] not in seen]
        copies += len(rows) - len(apart[part])
        seen.update(words.values())
    if not copies:
        return parts
    if name in ("auto", "imdb", "builtin") or facts["split"] == "official":
        facts["copies"] = copies
        if facts["split"] == "official":
            print(f"{facts['name']}: warning: {copies} reviews have the words of one in another part", file=sys.stderr)
        return parts
    facts["dropped"]["reviews with the words of one in another part"] = copies
    for part, rows in apart.items():
        if not rows:
            raise UserError(f"{facts['name']}: all {part} reviews have the words of reviews in another part")
    return apart


@dataclass(kw_only=True)
class Options(run.ScriptOptions):
    data: str = option("imdb", DATA_HELP, type=dataset_arg, metavar="NAME|PATH")
    data_dir: str | None = run.data_dir_option()
    split: str = option("7:1:2", "how the reviews are split", choices=corpus.SPLITS)
    limit: int | None = option(None, "only the first N examples of each part", above=0)


def main(argv=None):
    args = run.parse_options(__file__, Options, argv)
    loaded = load(args.data, args.data_dir, args.limit, args.split)
    print_counts(loaded)


def print_counts(loaded: Data):
    """Print the counts of reviews read, dropped and split."""
    facts = loaded.facts
    print(f"{facts['name']}: {facts['rows']:,} rows")
    for reason, count in facts["dropped"].items():
        print(f"  dropped: {count:,} {reason}")
    if "copies" in facts:
        print(f"  {facts['copies']:,} reviews have the words of one in another part; they are kept")
    for part in ("train", "val", "test"):
        reviews = getattr(loaded, part)
        counts = torch.bincount(reviews.labels, minlength=len(facts["classes"])).tolist()
        classes = ", ".join(f"{n:,} {name}" for name, n in zip(facts["classes"], counts))
        unknown = (reviews.tokens == UNK).float().mean().item()
        length = reviews.starts.diff().float().mean().item()
        print(f"  {part:5} {len(reviews):>7,}: {classes}; {length:.0f} words on average, {unknown:.1%} unknown")
    print(f"  vocabulary {facts['vocabulary']:,}")


if __name__ == "__main__":
    run.cli(main)
