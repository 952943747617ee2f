"""Probabilities that mean what they say: temperature scaling (Guo et al. 2017, section 4.2)."""

import math

import torch.nn.functional as F
from torch import Tensor

COLDEST, HOTTEST = 0.05, 20.0  # temperatures


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T for which softmax(logits / T) has the lowest cross-entropy on held-out examples.

    logits: (N, C); labels: int64 (N,). The cross-entropy is convex in 1 / T, so it has one minimum, which a ternary
    search finds. A network that is too sure of itself has T above 1.
    """
    logits, labels = logits.cpu().double(), labels.cpu()  # Apple's GPUs have no float64
    low, high = 1 / HOTTEST, 1 / COLDEST  # of 1 / T
    while high - low > 1e-6:
        left = low + (high - low) / 3
        right = high - (high - low) / 3
        if F.cross_entropy(logits * left, labels) < F.cross_entropy(logits * right, labels):
            high = right
        else:
            low = left
    return 2 / (low + high)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The expected calibration error (Guo et al. 2017, equation 3): the mean distance between the probability of the
    likeliest class and how often it is right, over bins of equal width. probabilities: (N, C); labels: int64 (N,)."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    places = (confidence * bins).ceil().long().clamp(1, bins) - 1
    error = 0.0
    for place in places.unique():
        inside = places == place
        error += inside.double().mean().item() * abs(right[inside].mean() - confidence[inside].mean()).item()
    return error


def unsure_shares(probabilities: Tensor, labels: Tensor, threshold: float) -> dict[str, float]:
    """How often the likeliest class is below `threshold`, as shares: {"all": of all predictions, "right": of the right
    ones, which are false alarms, "wrong": of the wrong ones}; NaN if there are none. probabilities: (N, C); labels:
    int64 (N,)."""
    confidence, predicted = probabilities.max(1)
    unsure = (confidence < threshold).double()
    right = predicted == labels
    shares = {"all": unsure, "right": unsure[right], "wrong": unsure[~right]}
    return {name: values.mean().item() if len(values) else math.nan for name, values in shares.items()}
