"""Schedules of the learning rate: its factor as a function of the progress of a run."""

import math

SHORTEST_RISE = 200  # steps in which a rate rises to its peak; in fewer, a short run can lose all that it learns


def lr_factor(decay: str, progress: float, warmup: float = 0.0, steps: int | None = None, rise: float = 0.2) -> float:
    """The factor of the peak learning rate at `progress` in [0, 1), the fraction of all steps that are done.

    decay: "none"; "step", a tenth from the half on and a hundredth from three quarters on; "cosine"; or "onecycle",
    which goes up from 0 for the fraction `rise` of the run, then down to 0 (Smith and Topin 2017). warmup: the fraction
    in which the others rise from 0. A rise has a rate of exactly 0 in its first step, which changes no weight, only the
    state of the optimizer and of batch normalization. steps: of the whole run; no rise is steeper than SHORTEST_RISE
    steps to the peak, which a short run therefore does not reach.
    """
    shortest = SHORTEST_RISE / steps if steps else 0.0
    if decay == "onecycle":
        return min(progress / max(rise, shortest), (1 - progress) / (1 - rise))
    if warmup:
        warmup = max(warmup, shortest)
    if progress < warmup:
        return progress / warmup
    if decay == "step":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if decay == "cosine":
        return cosine(progress - warmup, 1 - warmup)
    return 1.0


def cosine(progress: float, end: float = 1.0) -> float:
    """Half a cosine: from 1 at 0 down to 0 at `end`."""
    return 0.5 * (1 + math.cos(math.pi * progress / end))
