"""Fair timing: ways take turns, so that a machine that slows down slows all of them; medians, and the measured peak."""

import statistics
import time
from collections.abc import Callable

from common.cores import usable_cores

import torch


def seconds_of(work: Callable) -> float:
    """Seconds that `work()` takes. Work on a GPU must end with a synchronization, such as `.item()`."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def turns(ways: dict, rounds: int, warmup: int = 1) -> dict:
    """{name: [the result of `way(round)` for each round]} for `ways` {name: function of the round}, which take turns.

    The first `warmup` rounds are not kept. A function that returns None is timed: its value is its seconds.
    """
    values = {name: [] for name in ways}
    for i in range(warmup + rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            value = way(i)
            values[name].append(time.perf_counter() - began if value is None else value)
    return {name: kept[warmup:] for name, kept in values.items()}


def loader_workers() -> tuple[int, int]:
    """The numbers of DataLoader workers that the usual way is timed with: none, and two if there are two cores."""
    return 0, min(2, usable_cores())


def median_ratio(values: list, reference: list) -> float:
    """The median over rounds of each value divided by the reference of the same round."""
    return statistics.median(a / b for a, b in zip(values, reference, strict=True))


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 10) -> float:
    """Floating-point operations per second of a product of two square matrices, the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: (a @ b)[0, 0].item()) for _ in range(repeats + 1))
