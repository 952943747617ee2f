"""Scores of captions against several references: BLEU by sacrebleu, CIDEr-D, and the BLEU-1 of a course.

All captions here are normalized (readers.normalize): lower case, words and numbers alone. Published scores are made
with Java's PTB tokenizer instead, so their third digit can differ: `coco_scores` has that one.
"""

import functools
import math
import shutil
import sys
from collections import Counter

from common import run

import numpy as np

import videos
from readers import normalize

try:
    import sacrebleu
except ImportError:
    raise SystemExit("error: the scores need sacrebleu: pip install -r requirements.txt") from None

TOKENIZATION = "our tokenization (lower case, no punctuation)"


def bleu(captions: list[str], references: list[list[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus, in [0, 1], against all references of each caption (Papineni et al. 2002)."""
    if not captions:
        return [0.0] * 4
    most = max(map(len, references))
    columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    result = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(captions, columns)
    precisions = [p / 100 for p in result.precisions]
    return [result.bp * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]


def bleu_counts(captions: list[str], references: list[list[str]]) -> np.ndarray:
    """int64 (N, 10): what `bleu` adds up over N captions, for scores of many subsets of them (`bleu4_of`).

    The columns are the words, the words of the closest reference, and for n = 1 to 4 the n-grams that a reference has
    and all of them.
    """
    metric, rows = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True), []
    for caption, texts in zip(captions, references):
        found = metric.corpus_score([caption], [[text] for text in texts])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return np.array(rows)


def bleu4_of(counts: np.ndarray) -> np.ndarray:
    """BLEU-4 (...) of sums (..., 10) of rows of `bleu_counts`."""
    words, reference_words = counts[..., 0], counts[..., 1]
    brevity = np.exp(np.minimum(0, 1 - reference_words / np.maximum(words, 1)))
    precisions = counts[..., 2:6] / np.maximum(counts[..., 6:], 1)
    return brevity * precisions.prod(-1) ** 0.25


def cider(captions: list[str], references: list[list[str]], sigma: float = 6.0) -> float:
    """CIDEr-D of a corpus (Vedantam et al. 2015): the mean of `cider_each`."""
    return sum(cider_each(captions, references, sigma)) / max(len(captions), 1)


def cider_each(captions: list[str], references: list[list[str]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of every caption, times 10 as its authors have it.

    Each n-gram, n = 1 to 4, is weighted by how few of the clips have it in a reference. The score is the mean over n
    and over the references of the clipped cosine similarity, with a penalty for other lengths.
    """
    counted = [[ngrams(text) for text in texts] for texts in references]
    clips_with = Counter(gram for texts in counted for gram in set().union(*texts))
    log_clips = math.log(max(len(references), 1))

    def vectors(counts):
        """One {n-gram: weight} and its norm for each n, and the number of words."""
        parts = [{} for _ in range(4)]
        for gram, count in counts.items():
            parts[len(gram) - 1][gram] = count * (log_clips - math.log(max(1, clips_with[gram])))
        length = sum(count for gram, count in counts.items() if len(gram) == 1)
        return parts, [math.sqrt(sum(w * w for w in part.values())) for part in parts], length

    found = []
    for caption, texts in zip(captions, counted):
        parts, norms, length = vectors(ngrams(caption))
        total = 0.0
        for counts in texts:
            other_parts, other_norms, other_length = vectors(counts)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * sigma**2))
            for part, norm, other, other_norm in zip(parts, norms, other_parts, other_norms):
                if norm and other_norm:
                    dot = sum(min(w, other[gram]) * other[gram] for gram, w in part.items() if gram in other)
                    total += penalty * dot / (norm * other_norm) / (4 * len(texts))
        found.append(10 * total)
    return found


def ngrams(text: str) -> Counter:
    """How often each n-gram occurs, n = 1 to 4."""
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def course_bleu1(captions: list[str], raw_references: list[list[str]]) -> float:
    """The score that courses quote for MSVD: BLEU-1 of each caption by itself, averaged over the clips.

    Words are what stands between spaces, in lower case; final full stops are removed, commas stay with their words.
    The reference of the closest length, the first one on ties, sets the brevity penalty.
    """
    total = 0.0
    for caption, references in zip(captions, raw_references):
        words = caption.lower().split()
        texts = [text.rstrip(".").lower().split() for text in references]
        limit = Counter()
        for text in texts:
            limit |= Counter(text)
        if not words:
            continue
        precision = sum(min(count, limit[word]) for word, count in Counter(words).items()) / len(words)
        length = min(map(len, texts), key=lambda n: abs(n - len(words)))
        total += precision * (1.0 if len(words) > length else math.exp(1 - length / len(words)))
    return total / max(len(captions), 1)


def order_scores(captions: list[str], events: list) -> dict[str, float]:
    """What built-in captions say about order: `order`, the share of all facts that are stated and right; `flipped`, the
    share of all that are stated the other way round; `order_precision`, the share of right ones among those stated,
    right or opposite; `stated`, how many."""
    judged = [videos.judge_order(caption, happened) for caption, happened in zip(captions, events)]
    right, opposite, total = np.sum(judged, 0).tolist()
    stated = right + opposite
    return {
        "order": right / total,
        "flipped": opposite / total,
        "order_precision": right / max(stated, 1),
        "stated": stated,
    }


def order_by_kind(captions: list[str], events: list) -> dict[str, float]:
    """{kind of event: in how many of its events the caption states the direction, and it is right}."""
    right = {}
    for caption, happened in zip(captions, events):
        said = dict(videos.order_words(caption))
        for event in happened:
            right.setdefault(event.kind, []).append(said.get(event.kind) is event.forwards)
    return {kind: float(np.mean(right[kind])) for kind in videos.KINDS if kind in right}


@functools.cache
def meteor_scorer():
    """The Java program METEOR, started once: it reads its tables for seconds."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def coco_scores(captions: list[str], raw_references: list[list[str]]) -> dict:
    """{"tokenization", "bleu1" to "bleu4", "cider", "rouge_l", "meteor"}, tokenized and scored by pycocoevalcap.

    The PTB tokenizer, with which published scores are made, and METEOR are Java programs. Without Java the captions are
    normalized as above, and METEOR is missing. Raises UserError.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        raise run.UserError("--coco: pip install --no-deps pycocoevalcap") from None
    texts = {i: [caption, *references] for i, (caption, references) in enumerate(zip(captions, raw_references))}
    scorers = {"cider": Cider, "rouge_l": Rouge}
    try:
        if shutil.which("java"):
            lines = {i: [{"caption": " ".join(text.split())} for text in group] for i, group in texts.items()}
            tokens, tokenization = PTBTokenizer().tokenize(lines), "PTB"
            scorers |= {"meteor": meteor_scorer}
        else:
            print("no Java: METEOR is left out, and so is the PTB tokenization", file=sys.stderr)
            tokens, tokenization = {i: [normalize(text) for text in group] for i, group in texts.items()}, "ours"
        truth, ours = {i: tokens[i][1:] for i in texts}, {i: tokens[i][:1] for i in texts}
        if any(len(tokens[i]) != len(texts[i]) for i in texts):
            raise ValueError("the tokenizer returned another number of lines")
        bleus, _ = Bleu(4).compute_score(truth, ours, verbose=0)
        found = {f"bleu{n}": float(value) for n, value in enumerate(bleus, 1)}
        found |= {name: float(scorer().compute_score(truth, ours)[0]) for name, scorer in scorers.items()}
    except (OSError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())[:100]
        raise run.UserError(f"--coco: pycocoevalcap failed ({reason}); its tokenizer and METEOR need Java") from error
    return {"tokenization": tokenization} | found
