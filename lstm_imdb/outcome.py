"""The results of a finished run on its test set: F1, the confusion matrix, every prediction, and the worst mistakes."""

import csv
import io
import math

from common import run
from common.calibration import calibration_error, unsure_shares

import numpy as np

UNSURE = 0.7  # below this probability an answer is called unsure


def confusion(labels, predicted, classes: int) -> np.ndarray:
    """Counts (classes, classes): a row for each true class, a column for each predicted one."""
    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (np.asarray(labels), np.asarray(predicted)), 1)
    return counts


def f1_score(counts: np.ndarray) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of the class 1 of two, or the mean over more classes (macro F1)."""
    true = counts.diagonal()
    scores = 2 * true / np.maximum(counts.sum(0) + counts.sum(1), 1)
    return float(scores[1] if len(scores) == 2 else scores.mean())


def pack(correct) -> str:
    """Which reviews were classified correctly, in the order of the split: a bit each, as hexadecimal digits."""
    return np.packbits(np.asarray(correct, dtype=bool)).tobytes().hex()


def unpack(digits: str, count: int) -> np.ndarray:
    """The inverse of `pack`: bool (count,). Raises TypeError or ValueError if `digits` are not of `count` reviews."""
    bits = np.frombuffer(bytes.fromhex(digits), np.uint8)
    if count < 1 or len(bits) != math.ceil(count / 8):
        raise ValueError(f"{len(bits)} bytes are not a bit for each of {count} reviews")
    return np.unpackbits(bits)[:count].astype(bool)


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(difference of two accuracies on the same reviews, half the width of its 95% interval).

    ours, theirs: 0 or 1 for each review, or means over seeds, (N,). The interval is the mean of the differences of
    each review, plus or minus 1.96 of its standard error.
    """
    difference = ours.astype(float) - theirs.astype(float)
    return float(difference.mean()), float(1.96 * difference.std(ddof=1) / len(difference) ** 0.5)


def report(r, loaded, logits, temperature: float) -> dict:
    """Write predictions.csv, confusion.png and mistakes.txt into the run folder; return the final metrics.

    logits: (N, classes) of the test reviews; temperature: that of calibrated probabilities.
    """
    classes, test = loaded.corpus.classes, loaded.test
    probabilities = (logits / temperature).softmax(1)
    predicted, labels = logits.argmax(1), test.labels
    counts = confusion(labels, predicted, len(classes))
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["row", "label", "predicted", "probability"])
    for row, label, guess, p in zip(test.rows.tolist(), labels.tolist(), predicted.tolist(), probabilities.amax(1)):
        writer.writerow([row, classes[label], classes[guess], f"{p:.4f}"])
    run.write(r.folder / "predictions.csv", table.getvalue())
    run.write(r.folder / "mistakes.txt", mistakes(loaded, probabilities))
    if len(classes) <= 20:
        r.figure("confusion.png", draw_confusion(counts, classes))
        rows = [f"{name[:16]:>16} " + " ".join(f"{n:>7,}" for n in row) for name, row in zip(classes, counts)]
        r.print("confusion matrix (a row for each true class, a column for each predicted one)\n" + "\n".join(rows))
    return {
        "test_f1": f1_score(counts),
        "confusion": counts.tolist() if len(classes) <= 20 else None,
        "test_correct": pack(predicted == labels),
        "temperature": temperature,
        **sureness(probabilities, labels),
    }


def sureness(probabilities, labels) -> dict:
    """How far probabilities can be trusted, and what calling those below UNSURE unsure does: the share of all answers
    that are unsure, of the right ones and of the wrong ones, and "false_alarms", the share of the sure ones that are
    wrong. probabilities: (N, classes); labels: (N,)."""
    confidence, predicted = probabilities.max(1)
    sure = confidence >= UNSURE
    shares = unsure_shares(probabilities, labels, UNSURE)
    wrong = predicted[sure] != labels[sure]
    return {
        "calibration_error": calibration_error(probabilities, labels),
        "unsure_below": UNSURE,
        "unsure": 1 - sure.double().mean().item(),
        "unsure_right": finite(shares["right"]),
        "unsure_wrong": finite(shares["wrong"]),
        "false_alarms": wrong.double().mean().item() if sure.any() else None,
    }


def finite(share: float) -> float | None:
    """The share of a group; None if there is nobody in it."""
    return None if math.isnan(share) else share


def mistakes(loaded, probabilities, count: int = 20) -> str:
    """The wrong predictions of the highest probability, with their texts."""
    classes, labels = loaded.corpus.classes, loaded.test.labels
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    lines = [f"{len(wrong):,} of {len(labels):,} test reviews are wrong. The most confident mistakes:\n"]
    for i in wrong[confidence[wrong].argsort(descending=True, stable=True)][:count].tolist():
        row = int(loaded.test.rows[i])
        text = " ".join(loaded.corpus.texts[row].replace("<br />", " ").split())
        text = text if len(text) <= 800 else text[:400] + " ... " + text[-400:]
        head = f"row {row}: {classes[predicted[i]]} {confidence[i]:.1%}, is {classes[labels[i]]}"
        lines.append(f"{head}\n{text}\n")
    return "\n".join(lines)


def draw_confusion(counts, classes):
    """The confusion matrix as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 + 0.25 * len(classes), 3 + 0.25 * len(classes)), layout="constrained")
    axes, names = figure.subplots(), [run.plain_text(name[:20]) for name in classes]
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="truth")
    for (i, k), n in np.ndenumerate(counts):
        axes.text(k, i, f"{n:,}", ha="center", va="center", color="white" if shares[i, k] > 0.5 else "black")
    return figure
