"""From text to token ids and back: characters, words, and byte-level byte pairs (GPT-2's, or trained on your text).

Every tokenizer has `encode(text) -> list of int`, `decode(ids) -> str`, `pieces(ids)` (the text that each token adds,
for a text that grows), `vocab_size`, `missing(text)` (the tokens of a text that are not in the vocabulary), and
`state()`, a dict of plain strings, lists and numbers for a checkpoint, from which `tokenizer_from` makes the tokenizer
again.
"""

import codecs
import heapq
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.run import UserError

import regex

from networks import hub

MAX_VOCABULARY = 2**16  # tokens are stored as uint16
UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
END_OF_TEXT = "<|endoftext|>"


def check_size(vocabulary: list | dict, level: str):
    """Raise UserError if the ids of `vocabulary` do not fit into uint16."""
    if len(vocabulary) > MAX_VOCABULARY:
        raise UserError(
            f"--tokens {level}: {len(vocabulary):,} different tokens, but uint16 has room for {MAX_VOCABULARY:,}; "
            "--tokens bpe works for any text"
        )


class Characters:
    """One token per character, in the order of their code points."""

    def __init__(self, vocabulary: list[str]):
        check_size(vocabulary, "char")
        self.vocabulary, self.vocab_size = vocabulary, len(vocabulary)
        self.id = {character: i for i, character in enumerate(vocabulary)}

    @classmethod
    def of(cls, text: str) -> "Characters":
        return cls(sorted(set(text)))

    def missing(self, text: str) -> list[str]:
        return sorted(set(text) - self.id.keys())

    def encode(self, text: str) -> list[int]:
        try:
            return [self.id[character] for character in text]
        except KeyError as error:
            raise UserError(f"the character {error.args[0]!r} is not in the vocabulary") from error

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text that each token adds."""
        for i in ids:
            yield self.vocabulary[i]

    def state(self) -> dict:
        return {"kind": "char", "vocabulary": self.vocabulary}


class Words:
    """One token per word; words that are not in the vocabulary become <unk>.

    `split` defines a word. "prose": a run of letters with their marks and of digits (with apostrophes, hyphens and
    joiners inside), any other sign with its marks, such as an emoji of several code points, or the end of a line;
    spaces are not kept, and equal characters are one (NFC). "spaces": the text between two spaces, and <eos> at the end
    of every line, as in WikiText, which comes tokenized.
    """

    LETTERS = r"[\p{L}\p{M}\p{N}_]+"
    PROSE = regex.compile(rf"\n|{LETTERS}(?:['’\u200c\u200d-]{LETTERS})*|(?=\S)\X")
    CLOSING, OPENING = frozenset(".,;:!?)]}'’…।॥،؛؟。，、！？：；"), frozenset("([{$#@")

    def __init__(self, vocabulary: list[str], split: str = "prose"):
        check_size(vocabulary, "word")
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary)
        self.split = split
        self.id = {word: i for i, word in enumerate(vocabulary)}

    @classmethod
    def of(cls, text: str, split: str = "prose", min_count: int = 2) -> "Words":
        """With the words that occur at least `min_count` times in a (training) text, the most frequent first."""
        counts = Counter(cls.words(text, split))
        counts.pop(UNKNOWN, None)
        frequent = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
        return cls([UNKNOWN, *frequent], split)

    @classmethod
    def words(cls, text: str, split: str) -> list[str]:
        if split == "prose":
            return cls.PROSE.findall(unicodedata.normalize("NFC", text))
        return text.replace("\n", f" {END_OF_LINE} ").split()

    def missing(self, text: str) -> list[str]:
        return sorted(set(self.words(text, self.split)) - self.id.keys() - {END_OF_LINE})

    def encode(self, text: str) -> list[int]:
        unknown = self.id[UNKNOWN]
        return [self.id.get(word, unknown) for word in self.words(text, self.split)]

    def decode(self, ids: list[int]) -> str:
        """The text, with spaces as in prose."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text that each token adds: the word, with the space before it."""
        before = "\n"
        for i in ids:
            word = self.vocabulary[i]
            if self.split == "spaces":
                yield "\n" if word == END_OF_LINE else f" {word}"
                continue
            attached = before in self.OPENING or word in self.CLOSING
            at_line_end = before == "\n" or word == "\n"
            yield word if attached or at_line_end else f" {word}"
            before = word

    def state(self) -> dict:
        return {"kind": "word", "split": self.split, "vocabulary": self.vocabulary}


# ------------------------------------------------------------------------------------------------------- byte pairs


def printable_bytes() -> dict[int, str]:
    """{byte: the character that stands for it in vocab.json and merges.txt}.

    These are text files, so every byte needs a visible character: the visible characters of Latin-1 stand for
    themselves, code points from 256 for the other bytes. A space, byte 32, becomes "Ġ".
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    invisible = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(invisible)}


class BytePairs:
    """Byte-level byte pair encoding (Sennrich et al. 2016, section 3.2; Radford et al. 2019, section 2.2).

    A text is split into words, each with the space before it. A word starts as its UTF-8 bytes. Of all pairs of
    neighbours in the list of merges, the one that comes first in that list is merged into one token, until no pair is
    in the list. All 256 bytes are tokens, so any text can be encoded, and decoding restores it.

    vocabulary: {token: id}, merges: [(left, right), ...] in order of priority, with tokens in printable characters.
    """

    # English endings like 's; then letters, digits or other signs, with at most one space before them; then spaces,
    # the last of which belongs to the next word
    WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    CHARACTER = printable_bytes()
    BYTE = {character: byte for byte, character in CHARACTER.items()}

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]):
        check_size(vocabulary, "bpe")
        self.vocabulary = vocabulary
        self.merges = merges
        self.vocab_size = len(vocabulary)
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.token = {i: token for token, i in vocabulary.items()}
        self.cache = {}  # word -> ids: most words of a text are repetitions

    @classmethod
    def read(cls, vocab_json: Path, merges_txt: Path) -> "BytePairs":
        """From the two files of GPT-2's release. Raises UserError."""
        try:
            vocabulary = json.loads(vocab_json.read_text(encoding="utf-8"))
            lines = merges_txt.read_text(encoding="utf-8").split("\n")
            return cls(vocabulary, [tuple(line.split(" ")) for line in lines if line and not line.startswith("#ver")])
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{vocab_json.parent}: does not have a vocabulary and merges like GPT-2's ({error})"
            ) from error

    @classmethod
    def of(cls, tokens: list[str], merges: list[tuple[str, ...]]) -> "BytePairs":
        """From the tokens in the order of their ids. Raises ValueError if a byte or a merged token is missing."""
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if not cls.BYTE.keys() <= vocabulary.keys():
            raise ValueError("its vocabulary lacks bytes")
        if not all(len(pair) == 2 and {*pair, "".join(pair)} <= vocabulary.keys() for pair in merges):
            raise ValueError("its merges are not pairs of tokens")
        return cls(vocabulary, merges)

    @classmethod
    def printable(cls, word: str) -> list[str]:
        return [cls.CHARACTER[byte] for byte in word.encode()]

    @classmethod
    def train(cls, text: str, size: int) -> "BytePairs":
        """Learn merges from a text: merge the most frequent pair of neighbours, until there are `size` tokens.

        Of equally frequent pairs the alphabetically first is taken. After a merge only the words that contain the pair
        are counted again, so a merge costs as much as it changes, whatever the length of the text.
        """
        frequency = Counter(cls.WORD.findall(text))
        words = {word: cls.printable(word) for word in frequency}
        counts, words_with = Counter(), defaultdict(set)  # of every pair of neighbours
        for word, tokens in words.items():
            for pair in zip(tokens, tokens[1:]):
                counts[pair] += frequency[word]
                words_with[pair].add(word)
        heap = [(-n, pair) for pair, n in counts.items()]
        heapq.heapify(heap)
        vocabulary, merges = [cls.CHARACTER[byte] for byte in sorted(cls.CHARACTER, key=cls.CHARACTER.get)], []
        while len(vocabulary) < size and heap:
            n, best = heapq.heappop(heap)
            if counts[best] != -n:
                continue  # an outdated entry: the count has changed since
            if -n < 2:
                break
            merges.append(best)
            vocabulary.append("".join(best))
            changed = set()
            for word in words_with.pop(best):
                old, new = words[word], merge(words[word], best)
                words[word] = new
                for pair in zip(old, old[1:]):
                    counts[pair] -= frequency[word]
                    changed.add(pair)
                for pair in zip(new, new[1:]):
                    counts[pair] += frequency[word]
                    changed.add(pair)
                    words_with[pair].add(word)
            for pair in changed:
                heapq.heappush(heap, (-counts[pair], pair))
        return cls({token: i for i, token in enumerate(vocabulary)}, merges)

    def missing(self, text: str) -> list[str]:
        return []

    def encode_word(self, word: str) -> list[int]:
        """The ids of one word: merge the pair of the lowest rank, the first of them, again and again.

        A heap has the pairs with a rank, so that a long word, such as a line of equal signs, takes n log n steps.
        """
        tokens = self.printable(word)
        after = list(range(1, len(tokens) + 1))  # the place of the next token, of the one before; None: merged away
        before = list(range(-1, len(tokens) - 1))
        heap = []

        def push(left):
            right = after[left]
            if right < len(tokens) and (tokens[left], tokens[right]) in self.rank:
                pair = tokens[left], tokens[right]
                heapq.heappush(heap, (self.rank[pair], left, pair))

        for place in range(len(tokens)):
            push(place)
        while heap:
            _, left, pair = heapq.heappop(heap)
            right = after[left] if tokens[left] is not None else len(tokens)
            if right == len(tokens) or (tokens[left], tokens[right]) != pair:
                continue  # one of the two has been merged since
            tokens[left] = "".join(pair)
            tokens[right] = None
            after[left] = after[right]
            if after[left] < len(tokens):
                before[after[left]] = left
            if before[left] >= 0:
                push(before[left])
            push(left)
        return [self.vocabulary[token] for token in tokens if token is not None]

    def encode(self, text: str) -> list[int]:
        if len(self.cache) > 2**20:  # the number of different words on the web is unlimited
            self.cache.clear()
        ids = []
        for word in self.WORD.findall(text):
            if word not in self.cache:
                self.cache[word] = self.encode_word(word)
            ids += self.cache[word]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text. Bytes of an incomplete character become the replacement character, U+FFFD."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text that each token adds. Bytes of a character are held back until it is complete; a last piece
        has U+FFFD for what never is."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            characters = self.token[i]
            yield decoder.decode(b"".join(bytes([self.BYTE[c]]) if c in self.BYTE else c.encode() for c in characters))
        yield decoder.decode(b"", final=True)

    def state(self) -> dict:
        tokens = sorted(self.vocabulary, key=self.vocabulary.get)
        return {"kind": "bpe", "vocabulary": tokens, "merges": [" ".join(pair) for pair in self.merges]}


def merge(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    """["a", "b", "c"], ("b", "c") -> ["a", "bc"]"""
    merged, i = [], 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            merged.append(tokens[i] + tokens[i + 1])
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


def tokenizer_from(state: dict) -> "Characters | Words | BytePairs | hub.HubTokenizer":
    """The tokenizer whose `state()` this is. Raises UserError if it is not one."""
    try:
        if state["kind"] == "hub":
            return hub.HubTokenizer(str(state["name"]))
        kind = state["kind"]
        vocabulary = list(state["vocabulary"])
        split = state.get("split")
        if len(set(vocabulary)) < len(vocabulary) or not all(isinstance(token, str) for token in vocabulary):
            raise ValueError("its vocabulary is not a list of different strings")
        if kind == "char":
            return Characters(vocabulary)
        if kind == "word" and split in ("prose", "spaces") and UNKNOWN in vocabulary:
            return Words(vocabulary, split)
        if kind == "bpe":
            return BytePairs.of(vocabulary, [tuple(pair.split(" ")) for pair in state["merges"]])
        raise ValueError(f"its kind is {kind!r}, its split {split!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the checkpoint holds no tokenizer of this folder ({str(error):.100})") from error
