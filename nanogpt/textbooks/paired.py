"""The comparison of two arms: paired over seeds, with problems resampled; and its smallest detectable difference."""

import numpy as np


def interval(a: np.ndarray, b: np.ndarray, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> dict:
    """The mean difference a - b and its confidence interval.

    a, b: (seeds, problems), the pass rate of each problem; row i of both is the same seed, column j the same problem.
    Student's t over the paired seeds covers the choice of seeds; the bootstrap over problems, the same resample for
    both arms and all seeds, covers the choice of problems. Every resample gives a mean difference m and its
    standard error s over seeds, and one draw m + t s, with t of seeds - 1 degrees of freedom. The interval is
    between quantiles of the draws. Raises ValueError for one seed.
    """
    from scipy import stats

    difference = np.asarray(a, float) - np.asarray(b, float)  # (seeds, problems)
    seeds, problems = difference.shape
    if seeds < 2:
        raise ValueError("an interval over seeds needs two of them")
    rng = np.random.default_rng(seed)
    means = np.stack([difference[:, rng.integers(problems, size=problems)].mean(1) for _ in range(resamples)])
    error = means.std(1, ddof=1) / np.sqrt(seeds)  # (resamples, seeds) -> (resamples,)
    draws = means.mean(1) + error * rng.standard_t(seeds - 1, resamples)
    tail = (1 - level) / 2
    by_seed = difference.mean(1)
    half = stats.t.ppf(1 - tail, seeds - 1) * by_seed.std(ddof=1) / np.sqrt(seeds)
    return {
        "difference": float(by_seed.mean()),
        "interval": [float(q) for q in np.quantile(draws, [tail, 1 - tail])],
        "interval_seeds_only": [float(by_seed.mean() - half), float(by_seed.mean() + half)],
        "by_seed": [float(value) for value in by_seed],
        "sd": float(by_seed.std(ddof=1)),
        "detectable": detectable(float(by_seed.std(ddof=1)), seeds),
    }


def detectable(sd: float, seeds: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference that a two-sided paired t-test over `seeds` finds with probability `power`, if
    the paired differences have the standard deviation `sd`."""
    from scipy import optimize, stats

    if sd == 0:
        return 0.0
    bound = stats.t.ppf(1 - alpha / 2, seeds - 1)

    def found(effect):
        shift = effect * np.sqrt(seeds)
        other_tail = np.nan_to_num(stats.nct.cdf(-bound, seeds - 1, shift))  # SciPy has NaN for some that are near 0
        return stats.nct.sf(bound, seeds - 1, shift) + other_tail - power

    most = 1.0
    while found(most) < 0:
        most *= 1.5
    return sd * float(optimize.brentq(found, 1e-6, most))
