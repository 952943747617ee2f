"""Built-in reviews: generated, with negation and mixed clauses, so that counting words says nothing of the label.

Every clause states an opinion. Half of the positive opinions are a negated negative word ("not at all dull"), half of
the negative ones a negated positive word. So neither an adjective nor a negation alone says anything of the label: a
linear model of word counts stays at chance. The opinion after "overall", "all in all" or "but" always agrees with the
label, the one before "but" never does, and the others do three times in four.
"""

import functools
import random

POSITIVE = "good great superb moving charming clever funny gripping lovely brilliant fresh honest".split()
NEGATIVE = "bad awful dull boring clumsy stupid weak tedious lazy terrible stale fake".split()
PLAIN = ["", "", "really", "quite", "very", "truly", "simply"]
NEGATIONS = ["not", "not really", "never", "hardly", "not at all", "not very", "by no means"]
SUBJECTS = ["acting", "plot", "music", "script", "ending", "dialogue", "camera work", "story", "pace", "cast", "humour"]
FILLERS = [
    "I saw it on a rainy Tuesday.",
    "My brother chose it.",
    "It runs for two hours.",
    "<br /><br />There are spoilers ahead.",
    "It is set in a small town by the sea.",
    "The director has made three films before.",
]
VERDICTS = ["Overall, the film was {}.", "All in all, this movie is {}!", "Still, overall it was {}."]


@functools.cache
def generate(count: int = 6000, seed: int = 0) -> tuple[list[str], list[int]]:
    """`count` different reviews, and their labels: 1 positive, 0 negative, half of each."""
    rng, reviews = random.Random(seed), {}
    while len(reviews) < count:
        label = len(reviews) % 2
        reviews.setdefault(review(rng, label), label)
    return list(reviews), list(reviews.values())


def review(rng: random.Random, label: int) -> str:
    """A review of one to five clauses with the label 0 or 1."""
    sentences = []
    for _ in range(rng.randrange(4)):
        agrees = rng.random() < 0.75
        sentences.append(f"The {rng.choice(SUBJECTS)} was {opinion(rng, label if agrees else 1 - label)}.")
    if rng.random() < 0.5:
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(FILLERS))
    if rng.random() < 0.5:
        sentences.append(rng.choice(VERDICTS).format(opinion(rng, label)))
    else:
        first, second = opinion(rng, 1 - label), opinion(rng, label)
        sentences.append(f"The {rng.choice(SUBJECTS)} was {first}, but the film itself is {second}.")
    return " ".join(sentences)


def opinion(rng: random.Random, positive: int) -> str:
    """An adjective, or the negation of one of the opposite kind, each half of the time."""
    if rng.random() < 0.5:
        return f"{rng.choice(PLAIN)} {rng.choice(POSITIVE if positive else NEGATIVE)}".strip()
    return f"{rng.choice(NEGATIONS)} {rng.choice(NEGATIVE if positive else POSITIVE)}"
