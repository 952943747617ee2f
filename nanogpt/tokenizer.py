"""From text to integers and back: characters, words, and byte-level byte pairs (GPT-2's, or trained on your own text).

Every tokenizer has `encode(text) -> list of int`, `decode(ids) -> str`, `vocab_size`, `missing(text)`, what of a text
it has no symbol for, and `state()`, a dict of plain strings, lists and numbers with which `tokenizer_from` builds it
anew: it travels in the checkpoint, beside the weights that it belongs to.
"""

import heapq
import json
import re
from collections import Counter, defaultdict

import regex

from run import UserError

LARGEST = 2**16  # token files hold 16 bits a token
UNKNOWN, END_OF_LINE, END_OF_TEXT = "<unk>", "<eos>", "<|endoftext|>"


def fits(vocabulary, level):
    """The list `vocabulary`, if its numbers fit uint16; raises UserError otherwise."""
    if len(vocabulary) > LARGEST:
        raise UserError(
            f"--tokens {level}: {len(vocabulary):,} different ones do not fit uint16, which counts to "
            f"{LARGEST:,}; --tokens bpe takes any text"
        )
    return vocabulary


class Characters:
    """One number a character, in the order of their code points."""

    def __init__(self, vocabulary):
        self.vocabulary = fits(vocabulary, "char")
        self.number = {character: i for i, character in enumerate(vocabulary)}
        self.vocab_size = len(vocabulary)

    @classmethod
    def of(cls, text):
        return cls(sorted(set(text)))

    def missing(self, text):
        return sorted(set(text) - self.number.keys())

    def encode(self, text):
        try:
            return [self.number[character] for character in text]
        except KeyError as error:
            raise UserError(f"the vocabulary has no character {error.args[0]!r}") from None

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids)

    def state(self):
        return {"kind": "char", "vocabulary": self.vocabulary}


class Words:
    """One number a word; whatever is not in the vocabulary becomes <unk>.

    `split` says what a word is. "prose": runs of letters and digits (an apostrophe or hyphen within is part of them),
    any other sign by itself, and the end of a line; which spaces stood between them is not kept. "spaces": whatever
    stands between two spaces, and <eos> at the end of every line, as WikiText has been tokenized by its makers.
    """

    PROSE = re.compile(r"\n|\w+(?:['’-]\w+)*|[^\w\s]")
    CLOSING, OPENING = frozenset(".,;:!?)]}'’…"), frozenset("([{$#@")

    def __init__(self, vocabulary, split="prose"):
        self.vocabulary, self.split = fits(vocabulary, "word"), split
        self.number = {word: i for i, word in enumerate(vocabulary)}
        self.vocab_size = len(vocabulary)

    @classmethod
    def of(cls, text, split="prose", at_least=2):
        """From the words that a (training) text has `at_least` so often, the most frequent first."""
        counts = Counter(cls.words(text, split))
        counts.pop(UNKNOWN, None)
        common = sorted((word for word, n in counts.items() if n >= at_least), key=lambda word: (-counts[word], word))
        return cls([UNKNOWN, *common], split)

    @classmethod
    def words(cls, text, split):
        if split == "prose":
            return cls.PROSE.findall(text)
        return text.replace("\n", f" {END_OF_LINE} ").split()

    def missing(self, text):
        return sorted(set(self.words(text, self.split)) - self.number.keys() - {END_OF_LINE})

    def encode(self, text):
        unknown = self.number[UNKNOWN]
        return [self.number.get(word, unknown) for word in self.words(text, self.split)]

    def decode(self, ids):
        words = [self.vocabulary[i] for i in ids]
        if self.split == "spaces":
            return "".join("\n" if word == END_OF_LINE else f" {word}" for word in words)
        text, before = [], "\n"
        for word in words:
            if before not in self.OPENING and before != "\n" and word not in self.CLOSING and word != "\n":
                text.append(" ")
            text.append(word)
            before = word
        return "".join(text)

    def state(self):
        return {"kind": "word", "split": self.split, "vocabulary": self.vocabulary}


# ------------------------------------------------------------------------------------------------------- byte pairs


def printable_bytes():
    """{byte: the character that stands for it in vocab.json and merges.txt}.

    The files are text, and so every byte needs a visible character: those of Latin-1 that are visible stand for
    themselves, the others for the code points from 256 on. A space, byte 32, is "Ġ".
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


class BytePairs:
    """Byte-level byte pair encoding (Sennrich et al. 2016, section 3.2; Radford et al. 2019, section 2.2).

    A text is cut into words, each with the space before it. A word begins as its UTF-8 bytes; then, of all neighbours
    in it that are in the list of merges, those that come first in that list become one token, until there are none.
    With all 256 bytes in the vocabulary there is no text that cannot be encoded, and decoding gives it back.

    vocabulary: {token: number}, merges: [(left, right), ...] in order of precedence, tokens in printable characters.
    """

    # English endings by themselves; then letters, digits or other signs, with at most one space before them; then
    # spaces, of which the last is left for the word that follows it
    WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    CHARACTER = printable_bytes()
    BYTE = {character: byte for byte, character in CHARACTER.items()}

    def __init__(self, vocabulary, merges):
        fits(vocabulary, "bpe")
        self.vocabulary, self.merges = vocabulary, merges
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.token = {number: token for token, number in vocabulary.items()}
        self.vocab_size = len(vocabulary)
        self.known = {}  # word -> its numbers: a text has few different words

    @classmethod
    def read(cls, vocab_json, merges_txt):
        """From the two files that GPT-2 was published with."""
        try:
            vocabulary = json.loads(vocab_json.read_text(encoding="utf-8"))
            lines = merges_txt.read_text(encoding="utf-8").split("\n")
            return cls(vocabulary, [tuple(line.split(" ")) for line in lines if line and not line.startswith("#ver")])
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{vocab_json.parent}: holds no vocabulary and merges like GPT-2's ({error})") from None

    @classmethod
    def printable(cls, word):
        return [cls.CHARACTER[byte] for byte in word.encode()]

    @classmethod
    def train(cls, text, size):
        """Byte pairs of a text: join the pair of neighbours that is most frequent, until there are `size` tokens.

        Of equally frequent pairs the alphabetically first is taken. Only words in which a pair occurs are looked at
        again when it is joined, so that the time goes with what changes and not with the length of the text.
        """
        counts = Counter(cls.WORD.findall(text))
        words = [cls.printable(word) for word in counts]
        frequency = list(counts.values())
        pairs, where = Counter(), defaultdict(set)  # how often neighbours occur; in which words
        for i, word in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += frequency[i]
                where[pair].add(i)
        queue = [(-n, pair) for pair, n in pairs.items()]
        heapq.heapify(queue)
        vocabulary, merges = [cls.CHARACTER[byte] for byte in sorted(cls.CHARACTER, key=cls.CHARACTER.get)], []
        while len(vocabulary) < size and queue:
            n, best = heapq.heappop(queue)
            if pairs[best] != -n:
                continue  # an entry from before its number changed
            if -n < 2:
                break
            merges.append(best)
            vocabulary.append("".join(best))
            changed = set()
            for i in where.pop(best):
                before, words[i] = words[i], join(words[i], best)
                for sign, word in ((-1, before), (1, words[i])):
                    for pair in zip(word, word[1:]):
                        pairs[pair] += sign * frequency[i]
                        changed.add(pair)
                        if sign > 0:
                            where[pair].add(i)
            for pair in changed:
                heapq.heappush(queue, (-pairs[pair], pair))
        return cls({token: i for i, token in enumerate(vocabulary)}, merges)

    def missing(self, text):
        return []

    def encode_word(self, word):
        """The numbers of one word: join the neighbours of the lowest rank, again and again."""
        parts = self.printable(word)
        while len(parts) > 1:
            first = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, LARGEST))
            if first not in self.rank:
                break
            parts = join(parts, first)
        return [self.vocabulary[part] for part in parts]

    def encode(self, text):
        if len(self.known) > 2**20:  # the web has no end of different words
            self.known.clear()
        ids = []
        for word in self.WORD.findall(text):
            if word not in self.known:
                self.known[word] = self.encode_word(word)
            ids += self.known[word]
        return ids

    def decode(self, ids):
        """Bytes that are no complete character (a text cut in the middle of one) become the sign for that, U+FFFD."""
        text = "".join(self.token[i] for i in ids)
        return b"".join(bytes([self.BYTE[c]]) if c in self.BYTE else c.encode() for c in text).decode(errors="replace")

    def state(self):
        tokens = sorted(self.vocabulary, key=self.vocabulary.get)
        return {"kind": "bpe", "vocabulary": tokens, "merges": [" ".join(pair) for pair in self.merges]}


def join(parts, pair):
    """["a", "b", "c"], ("b", "c") -> ["a", "bc"]"""
    joined, i = [], 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined


def tokenizer_from(state):
    """The tokenizer whose `state()` this is. Raises UserError where it is none."""
    try:
        if state["kind"] == "char":
            return Characters(list(state["vocabulary"]))
        if state["kind"] == "word":
            return Words(list(state["vocabulary"]), state["split"])
        if state["kind"] == "bpe":
            vocabulary = {token: i for i, token in enumerate(state["vocabulary"])}
            return BytePairs(vocabulary, [tuple(pair.split(" ")) for pair in state["merges"]])
        raise KeyError(state["kind"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint holds no tokenizer that is known here ({error!r})") from None
