"""Captions without a network that writes: one caption for all clips, and the captions of similar training clips.

The second follows J. Devlin et al., "Exploring nearest neighbor approaches for image captioning", 2015: of the
captions of its k nearest training clips, a clip gets the one that agrees best with the others.
"""

import math
from collections import Counter

import numpy as np
from torch import Tensor

import data
import scores

CANDIDATES = 30  # the most frequent training captions, of which the best constant one is chosen


def best_constant(train: data.Clips, val: data.Clips) -> str:
    """The frequent training caption that has the highest BLEU-4 on the validation clips if it describes all of them."""
    counts = Counter(caption for captions in train.captions for caption in captions)
    longest = Counter({caption: count * len(caption.split()) for caption, count in counts.items()})
    likely = dict(counts.most_common(CANDIDATES) + longest.most_common(CANDIDATES))
    return max(likely, key=lambda caption: scores.bleu([caption] * len(val), val.captions)[3])


def neighbours(train: Tensor, others: Tensor, standardized: bool) -> Tensor:
    """int64 (M, N): the N training clips from the nearest to the farthest, for each of M other clips.

    Features (N, T, F) and (M, T, F). Clips are compared by the cosine of the means over their frames, `standardized`
    by the mean and the deviation of the training clips' or as they are.
    """
    known, asked = train.float().mean(1), others.float().mean(1)  # (N, F), (M, F)
    if standardized:
        mean, std = known.mean(0), known.std(0).clamp(min=1e-6)
        known, asked = (known - mean) / std, (asked - mean) / std
    known, asked = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (known, asked))
    return (asked @ known.T).argsort(dim=1, descending=True, stable=True)


class Neighbours:
    """The training clips, ready to be asked. Captions agree by the cosine of their words and pairs of words, where rare
    ones weigh more."""

    def __init__(self, train: data.Clips):
        self.train = train
        clips_with = Counter(gram for texts in train.captions for gram in set().union(*map(self.grams, texts)))
        self.weight = {gram: math.log(len(train) / count) for gram, count in clips_with.items()}
        self.vectors = [[self.vector(text) for text in texts] for texts in train.captions]

    @staticmethod
    def grams(text: str) -> list:
        """Its words and pairs of words, each once, in the order of the text: sums over a set would depend on the hashes
        of a process."""
        return [gram for gram in scores.ngrams(text) if len(gram) <= 2]

    def vector(self, text: str) -> dict:
        """{word or pair of words: weight}, of length 1."""
        vector = {gram: self.weight[gram] for gram in self.grams(text)}
        norm = math.sqrt(sum(weight**2 for weight in vector.values())) or 1.0
        return {gram: weight / norm for gram, weight in vector.items()}

    def agreed(self, clips: list[int]) -> str:
        """The caption of these clips with the highest mean cosine with all their captions; the first one on ties."""
        texts = [text for i in clips for text in self.train.captions[i]]
        vectors = [vector for i in clips for vector in self.vectors[i]]
        total = Counter()
        for vector in vectors:
            total.update(vector)
        agreement = [sum(weight * total[gram] for gram, weight in vector.items()) for vector in vectors]
        agreement = np.round(agreement, 9)  # what is equal but for rounding is a tie
        return texts[int(np.argmax(agreement))]

    def captions(self, features: Tensor, count: int, standardized: bool) -> list[str]:
        """A caption for each clip of `features` (M, T, F), from its `count` nearest training clips."""
        nearest = neighbours(self.train.features, features, standardized)[:, :count]
        return [self.agreed(row) for row in nearest.tolist()]
