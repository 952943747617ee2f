"""Classify reviews, and colour the words that pushed the answer.

    python lstm_imdb/predict.py "Not bad at all, I liked it!"      # with the newest run, else the committed model
    python lstm_imdb/predict.py --file review.txt --run RUN        # RUN: a run folder or a safetensors file
    echo "What a waste of time." | python lstm_imdb/predict.py     # standard input, one review per line
    python lstm_imdb/predict.py "First." "Second." --figure words.png

A word's push is the gradient of the score with respect to its vector times the vector (gradient times input; Simonyan
et al. 2013, Denil et al. 2014). The score is the logit of the class less the mean of the others: green words raise
it, red ones lower it. With two classes the class is the second one, "positive" for IMDB, whatever the answer.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.arguments import ScriptOptions, device_option, parse_options, path_arg, threads_option
from common.options import option

import torch
from matplotlib.figure import Figure

import corpus
import data
import saved

AUTO_THREADS = 1  # a few texts gain nothing from more

COLUMNS = 100  # characters of a line of the figure


def explain(found: saved.Model, text: str) -> tuple[list[str], list[float], torch.Tensor, int]:
    """(words that were read, the push of each, probabilities (classes,), words of the whole text). Raises UserError."""
    words = [word for word in data.tokenize(text) if word not in found.vocabulary.ignored]
    if not words:
        raise run.UserError("a review has no words; give it some text")
    limit, total = found.args.max_len, len(words)
    words = words[:limit] if found.args.keep == "start" else words[-limit:]
    device = found.net.embedding.weight.device
    tokens = torch.tensor([found.vocabulary.encode(words)], device=device)
    embedded = found.net.embedding(tokens).detach().requires_grad_()  # (1, T, E)
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN has no backward pass in evaluation mode
        logits = found.net.classify(embedded, torch.tensor([len(words)], device=device))[0]
        k = 1 if len(logits) == 2 else int(logits.argmax())
        score = logits[k] - (logits.sum() - logits[k]) / (len(logits) - 1)
        (gradient,) = torch.autograd.grad(score, embedded)
    push = (gradient * embedded).sum(2)[0]  # (1, T, E) -> (T,)
    return words, push.tolist(), logits.detach().softmax(0).cpu(), total


def shades(push: list[float]) -> list[float]:
    """Each push as a share of the largest one, in [-1, 1]."""
    largest = max(map(abs, push)) or 1.0
    return [value / largest for value in push]


def coloured(words, push, colour: bool) -> str:
    """The words as a line; those that push at least a fifth as much as the strongest are marked or in colour."""
    pieces = []
    for word, shade in zip(words, shades(push)):
        if abs(shade) < 0.2:
            pieces.append(word)
        elif colour:
            bold = "1;" if abs(shade) > 0.6 else ""
            pieces.append(f"\033[{bold}{32 if shade > 0 else 31}m{word}\033[0m")
        else:
            pieces.append(f"[{'+' if shade > 0 else '-'}{word}]")
    return " ".join(pieces)


def draw(answers, path: Path):
    """A figure of reviews with coloured words. answers: (title, words, push) of each."""
    laid_out, y = [], 0
    for title, words, push in answers:
        laid_out.append((0, y, title, None))
        x, y = 0, y + 1
        for word, shade in zip(words[:400], shades(push)):
            word = word[: COLUMNS - 1]
            if x + len(word) > COLUMNS:
                x, y = 0, y + 1
            laid_out.append((x, y, word, shade))
            x += len(word) + 1
        y += 2
    figure = Figure(figsize=(COLUMNS * 0.075, 0.19 * y + 0.1))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98), xlim=(0, COLUMNS), ylim=(y - 0.5, -0.6))
    axes.axis("off")
    for x, line, text, shade in laid_out:
        if shade:
            rgba = (0.1, 0.65, 0.2, min(1, abs(shade))) if shade > 0 else (0.9, 0.15, 0.1, min(1, abs(shade)))
            axes.fill_between((x - 0.3, x + len(text) + 0.3), line - 0.45, line + 0.45, color=rgba, linewidth=0)
        axes.text(x, line, run.plain_text(text), family="monospace", fontsize=8.2, va="center",
                  weight="bold" if shade is None else "normal")  # fmt: skip
    run.write_figure(path, figure)


def read_texts(args) -> list[str]:
    """The reviews: arguments, the file as one review, or a review a line of standard input. Raises UserError."""
    if args.text and args.file:
        raise run.UserError("give the reviews as arguments or as --file, not both")
    if args.file:
        return [corpus.decode(Path(args.file))]
    if args.text:
        return args.text
    try:
        lines = sys.stdin.buffer.read().decode("utf-8") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
    except UnicodeDecodeError:
        raise run.UserError("standard input is not UTF-8") from None
    return [line for line in lines.splitlines() if line.strip()]


@dataclass(kw_only=True)
class Options(ScriptOptions):
    text: tuple[str, ...] = option((), "reviews (default: standard input, one review per line)", positional=True)
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
    found, answers = saved.open_model(args.run, run.pick_device(args.device)), []
    terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for text in texts:
        words, push, probabilities, total = explain(found, text)
        p, k = probabilities.max(0)
        known = sum(word in found.vocabulary.index for word in words)
        title = f"{found.classes[k]} {p:.1%}"
        notes = [f"{len(words) - known} of {len(words)} words unknown"] if known < len(words) else []
        notes += [f"the {found.args.keep} of the review: {len(words)} of {total:,} words"] if total > len(words) else []
        print(title + (f"   ({'; '.join(notes)})" if notes else ""))
        print("  " + coloured(words, push, args.colour == "always" or args.colour == "auto" and terminal))
        answers.append((title, words, push))
    if args.figure:
        draw(answers, Path(args.figure))
    return answers


if __name__ == "__main__":
    run.cli(main)
