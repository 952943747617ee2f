"""Classify reviews, and colour the words that pushed the answer.

    python lstm_imdb/predict.py "Not bad at all, I liked it!"      # with the newest run, else the committed model
    python lstm_imdb/predict.py --file review.txt --run RUN        # RUN: a run folder or a safetensors file
    echo "What a waste of time." | python lstm_imdb/predict.py     # standard input, one review per line
    python lstm_imdb/predict.py "First." "Second." --figure words.png

A word's push is the gradient of the score with respect to its vector times the vector (gradient times input; Simonyan
et al. 2013, Denil et al. 2014). The score is the logit of the class less the mean of the others: green words raise
it, red ones lower it. With two classes the class is the second one, "positive" for IMDB, whatever the answer. Words
that the model does not know are grey. Without colours these are [+word], [-word] and [?word].

Probabilities are calibrated on validation reviews; below 70% the model is unsure.
"""

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.arguments import ScriptOptions, device_option, parse_options, path_arg, threads_option
from common.options import option

import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence

import corpus
import data
import saved
from outcome import UNSURE

AUTO_THREADS = 1  # a few texts gain nothing from more
CHUNK = 4096  # reviews that are sorted by length together
BATCH_WORDS = 16_384  # words of a padded batch
MOST_DRAWN = 50  # reviews in the figure

COLUMNS = 100  # characters of a line of the figure


class Answer(NamedTuple):
    """What the model says of a review: the words that it read, the push of each (None: it does not know the word), the
    probability of each class, and the number of words of the whole review."""

    words: list[str]
    push: list[float | None]
    probabilities: list[float]
    total: int


def explain(found: saved.Model, texts: list[str]) -> list[Answer | None]:
    """The answers to reviews, in batches of similar length; None for a review without words. Raises UserError."""
    reviews = [found.read(text) for text in texts]
    read = [words for words, _ in reviews]
    answers = [None] * len(texts)
    for batch in batches_of(read):
        push, probabilities = explain_batch(found, [read[i] for i in batch])
        for row, i in enumerate(batch):
            words, total = reviews[i]
            known = [word in found.vocabulary.index for word in words]
            pushes = [value if is_known else None for value, is_known in zip(push[row], known)]
            answers[i] = Answer(words, pushes, probabilities[row], total)
    return answers


def batches_of(reviews: list[list[str]]) -> Iterator[list[int]]:
    """Yield the indices of the reviews that have words, in batches of similar length of at most BATCH_WORDS words."""
    batch = []
    for i in sorted(range(len(reviews)), key=lambda i: len(reviews[i])):
        length = len(reviews[i])
        if batch and (len(batch) + 1) * length > BATCH_WORDS:
            yield batch
            batch = []
        if length:
            batch.append(i)
    if batch:
        yield batch


def explain_batch(found: saved.Model, reviews: list[list[str]]) -> tuple[list[list[float]], list[list[float]]]:
    """(the push of every word (B, T), calibrated probabilities (B, classes)) of reviews of at least one word."""
    device = found.net.embedding.weight.device
    encoded = [torch.tensor(found.vocabulary.encode(words)) for words in reviews]
    lengths = torch.tensor([len(tokens) for tokens in encoded], device=device)
    tokens = pad_sequence(encoded, batch_first=True, padding_value=data.PAD).to(device)  # (B, T)
    embedded = found.net.embedding(tokens).detach().requires_grad_()  # (B, T, E)
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN has no backward pass in evaluation mode
        logits = found.net.classify(embedded, lengths)  # (B, classes)
        classes = logits.shape[1]
        chosen = logits.argmax(1) if classes > 2 else torch.ones_like(lengths)
        logit = logits.gather(1, chosen[:, None]).squeeze(1)
        scores = logit - (logits.sum(1) - logit) / (classes - 1)  # (B,)
        (gradient,) = torch.autograd.grad(scores.sum(), embedded)  # a review's score depends on its own words alone
    if not torch.isfinite(logits).all():
        raise run.UserError(f"{found.path}: is damaged: its predictions are not finite numbers")
    push = (gradient * embedded).sum(2)  # (B, T, E) -> (B, T)
    return push.tolist(), (logits.detach() / found.temperature).softmax(1).tolist()


def shades(push: list[float | None]) -> list[float | None]:
    """Each push as a share of the largest one, in [-1, 1]; None stays."""
    largest = max((abs(value) for value in push if value is not None), default=0.0) or 1.0
    return [None if value is None else value / largest for value in push]


def coloured(words, push, colour: bool) -> str:
    """The words as a line; those that push at least a fifth as much as the strongest, and unknown ones, are marked or
    in colour."""
    pieces = []
    for word, shade in zip(words, shades(push)):
        if shade is None:
            pieces.append(f"\033[90m{word}\033[0m" if colour else f"[?{word}]")
        elif abs(shade) < 0.2:
            pieces.append(word)
        elif colour:
            bold = "1;" if abs(shade) > 0.6 else ""
            pieces.append(f"\033[{bold}{32 if shade > 0 else 31}m{word}\033[0m")
        else:
            pieces.append(f"[{'+' if shade > 0 else '-'}{word}]")
    return " ".join(pieces)


def background(shade: float | None) -> tuple[float, float, float, float]:
    """The colour behind a word of the figure: red, green, blue and opacity."""
    if shade is None:
        return 0.5, 0.5, 0.5, 0.3
    opacity = min(1.0, abs(shade))
    return (0.1, 0.65, 0.2, opacity) if shade > 0 else (0.9, 0.15, 0.1, opacity)


def draw(answers, path: Path):
    """A figure of reviews with coloured words. answers: (title, words, push) of each."""
    laid_out, y = [], 0
    for title, words, push in answers:
        laid_out.append((0, y, title, None, True))
        x, y = 0, y + 1
        for word, shade in zip(words[:400], shades(push)):
            word = word[: COLUMNS - 1]
            if x + len(word) > COLUMNS:
                x, y = 0, y + 1
            laid_out.append((x, y, word, background(shade), False))
            x += len(word) + 1
        y += 2
    figure = Figure(figsize=(COLUMNS * 0.075, 0.19 * y + 0.1))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98), xlim=(0, COLUMNS), ylim=(y - 0.5, -0.6))
    axes.axis("off")
    for x, line, text, rgba, is_title in laid_out:
        if rgba is not None:
            axes.fill_between((x - 0.3, x + len(text) + 0.3), line - 0.45, line + 0.45, color=rgba, linewidth=0)
        axes.text(
            x,
            line,
            run.plain_text(text),
            family="monospace",
            fontsize=8.2,
            va="center",
            weight="bold" if is_title else "normal",
        )
    run.write_figure(path, figure)


def read_texts(args) -> list[str]:
    """The reviews: arguments, the file as one review, or a review a line of standard input. Raises UserError."""
    if args.text and args.file:
        raise run.UserError("give the reviews as arguments or as --file, not both")
    if args.file:
        return [corpus.decode(Path(args.file))]
    if args.text:
        return [corpus.decode(Path(text)) if os.path.isfile(text) else text for text in args.text]
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
    except UnicodeDecodeError:
        raise run.UserError("standard input is not UTF-8") from None
    lines = io.StringIO(text, newline=None)  # a line ends at \n, \r\n or \r, and not at U+2028, as splitlines() has it
    return [line for line in lines if line.strip()]


@dataclass(kw_only=True)
class Options(ScriptOptions):
    text: tuple[str, ...] = option(
        (), "reviews, or files of one review (default: standard input, one review per line)", positional=True
    )
    file: str | None = option(None, "a text file that holds one review", type=path_arg, metavar="FILE")
    run: str | None = option(None, "a run folder or a safetensors file of weights", type=path_arg, metavar="RUN")
    figure: str | None = option(None, "draw the reviews as a PNG too", type=path_arg, metavar="FILE")
    colour: str = option("auto", "auto: in a terminal", choices=["auto", "always", "never"])
    device: str = device_option()
    threads: int | str = threads_option()


def main(argv=None):
    args = parse_options(__file__, Options, argv)
    texts = read_texts(args)
    if not texts:
        raise run.UserError("no review: give one as an argument, with --file, or on standard input")
    run.set_threads(args.threads, AUTO_THREADS)
    found = saved.open_model(args.run, run.pick_device(args.device))
    print(saved.describe(found), file=sys.stderr)
    colour = args.colour == "always"
    if args.colour == "auto":
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    drawn, empty = [], []
    for first in range(0, len(texts), CHUNK):
        for i, answer in enumerate(explain(found, texts[first : first + CHUNK]), first + 1):
            if answer is None:
                empty.append(i)
                print("no words")
                continue
            title = title_of(found, answer)
            print(title + notes_on(found, answer))
            print("  " + coloured(answer.words, answer.push, colour))
            drawn.append((title, answer.words, answer.push))
    if args.figure and drawn:
        draw(drawn[:MOST_DRAWN], Path(args.figure))
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise run.UserError(f"review {empty[0]}{more}: has no words; give it some text")
    return drawn


def title_of(found: saved.Model, answer: Answer) -> str:
    """The likeliest class with its probability, "unsure: " before it if that is below UNSURE."""
    probability = max(answer.probabilities)
    name = run.printable(found.classes[answer.probabilities.index(probability)])
    doubt = "unsure: " if probability < UNSURE else ""
    return f"{doubt}{name} {probability:.1%}"


def notes_on(found: saved.Model, answer: Answer) -> str:
    """How many words are unknown, and which part of the review was read."""
    notes = []
    count = len(answer.words)
    unknown = answer.push.count(None)
    if unknown:
        notes.append(f"{unknown} of {count} words unknown")
    if answer.total > count:
        notes.append(f"the {found.args.keep} of the review: {count} of {answer.total:,} words")
    return f"   ({'; '.join(notes)})" if notes else ""


if __name__ == "__main__":
    run.cli(main)
