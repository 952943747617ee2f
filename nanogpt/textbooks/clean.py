"""The common passages of texts: n-gram overlap, near-duplicates by MinHash, and decontamination with both.

Texts are compared as sequences of words, numbers and signs, in lower case, so their layout does not hide a copy.
Decontamination works on passages of some 1,500 characters, and on their parts, a paragraph or a function each. A
passage that shares an n-gram with a problem of an evaluation set is removed, and so is a passage or a part that is a
near-duplicate of one. The rest of the document stays.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

TOKEN = re.compile(r"[a-z_]\w*|\d+|[^\w\s]")
GRAM = 13  # tokens in common that make a copy; GPT-3 (Brown et al. 2020, appendix C) and phi-1 use 13 words
SHINGLE = 3
PERMUTATIONS = 64
BANDS = 32  # of two entries: of similar texts, 1 in 10,000 has no band in common
THRESHOLD = 0.5  # of MinHash
PASSAGE = 1500  # characters, about
MULTIPLIERS = np.random.default_rng(1).integers(1, 2**63, 64, dtype=np.uint64) | np.uint64(1)
A, B = np.random.default_rng(2).integers(1, 2**63, (2, PERMUTATIONS, 1), dtype=np.uint64) | np.uint64(1)
HASHES = {}  # token -> its hash: the vocabulary of a corpus is small


def hashes(text: str) -> np.ndarray:
    """The hashes of the tokens of a text, uint64 (N,)."""
    tokens = TOKEN.findall(text.lower())
    for token in set(tokens) - HASHES.keys():
        HASHES[token] = zlib.crc32(token.encode()) + 1
    return np.fromiter((HASHES[token] for token in tokens), np.uint64, len(tokens))


def grams(text: str | np.ndarray, n: int) -> np.ndarray:
    """The hashes of all n-grams of a text, or of its `hashes` (N,): uint64 (max(0, N - n + 1),)."""
    tokens = hashes(text) if isinstance(text, str) else text
    total = np.zeros(max(0, len(tokens) - n + 1), np.uint64)
    for i in range(n):
        total += tokens[i : i + len(total)] * MULTIPLIERS[i]  # modulo 2^64
    return total ^ (total >> np.uint64(29))


def overlap(texts: Iterable[str], others: Iterable[str], n: int = 8) -> float:
    """The share of the different n-grams of `texts` that also occur in `others`."""
    ours = np.unique(np.concatenate([grams(text, n) for text in texts]))
    found = np.zeros(len(ours), bool)
    for text in others:
        theirs = grams(text, n)
        at = np.searchsorted(ours, theirs).clip(max=len(ours) - 1)
        found[at[ours[at] == theirs]] = True
    return float(found.mean()) if len(ours) else 0.0


def signature(shingles: np.ndarray) -> np.ndarray:
    """The MinHash signature of a set of shingles (Broder 1997), uint64 (PERMUTATIONS,).

    The share of equal entries of two signatures estimates the Jaccard similarity of the two sets.
    """
    values = A * shingles + B
    return (values ^ (values >> np.uint64(31))).min(1)


def bands(values: np.ndarray) -> list[tuple]:
    """Parts of a signature. Similar texts have one of them in common, most others none."""
    return [(i, part.tobytes()) for i, part in enumerate(values.reshape(BANDS, -1))]


class Index:
    """The problems of evaluation sets, {name: texts}, to find copies of them."""

    def __init__(self, problems: dict[str, list[str]]):
        texts = [hashes(text) for name in problems for text in problems[name]]
        self.grams = np.unique(np.concatenate([np.zeros(1, np.uint64), *(grams(text, GRAM) for text in texts)]))
        self.buckets = {}
        self.signatures = []
        self.largest = 0
        for text in texts:
            shingles = np.unique(grams(text, SHINGLE))
            if len(text) >= GRAM:  # of shorter ones, all code has copies
                self.largest = max(self.largest, len(shingles))
                values = signature(shingles)
                for band in bands(values):
                    self.buckets.setdefault(band, []).append(len(self.signatures))
                self.signatures.append(values)

    def find(self, text: str) -> str | None:
        """Why a text is a copy, "n-gram" or "near-duplicate"; None if it is none."""
        if self.shares_grams(text):
            return "n-gram"
        return "near-duplicate" if self.is_similar(text) else None

    def shares_grams(self, text: str) -> bool:
        """Does a text share an n-gram with a problem?"""
        theirs = grams(text, GRAM)
        return bool((self.grams[np.searchsorted(self.grams, theirs).clip(max=len(self.grams) - 1)] == theirs).any())

    def is_similar(self, text: str) -> bool:
        """Is a text, as a whole, a near-duplicate of a problem? In a longer text, its other parts would hide a copy."""
        shingles = np.unique(grams(text, SHINGLE))
        if not len(shingles) or THRESHOLD * len(shingles) > self.largest:  # too long to be similar to any
            return False
        values = signature(shingles)
        candidates = {i for band in bands(values) for i in self.buckets.get(band, ())}
        return any((self.signatures[i] == values).mean() >= THRESHOLD for i in candidates)


def parts_of(text: str) -> list[str]:
    """A text in its paragraphs, or top-level functions of code, which make it up again when joined."""
    return re.split(r"(?<=\n)(?=\n+(?:\S))", text)


def passages(text: str) -> list[str]:
    """A document in passages that make it up again when joined, of one or several whole parts."""
    found = []
    for part in parts_of(text):
        if found and len(found[-1]) + len(part) <= PASSAGE:
            found[-1] += part
        else:
            found.append(part)
    return found


def decontaminate(documents: list[str], index: Index) -> tuple[list[str], dict]:
    """(the documents without the copies, counts of the passages compared and of those with copies)."""
    counts, clean = Counter({"passages": 0, "n-gram": 0, "near-duplicate": 0, "characters removed": 0}), []
    for document in documents:
        kept = []
        for passage in passages(document):
            counts["passages"] += 1
            if index.shares_grams(passage):
                counts["n-gram"] += 1
                counts["characters removed"] += len(passage)
                continue
            parts = parts_of(passage)
            copies = [part for part in parts if index.is_similar(part)]
            if not copies and len(parts) > 1 and index.is_similar(passage):  # of a problem with several functions
                copies = parts
            counts["near-duplicate"] += bool(copies)
            counts["characters removed"] += sum(map(len, copies))
            kept += [part for part in parts if part not in copies]
        clean.append("".join(kept))
    return [document for document in clean if document.strip()], dict(counts)
