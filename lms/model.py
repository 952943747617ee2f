"""Adaptive linear filters: predict targets[k] by inputs[k] @ w, and mend w after every sample.

Throughout, inputs X are (N, M) float64, targets d (N,), the step size r > 0, and the error of sample k is
e[k] = d[k] - X[k] @ w[k], before the weights have learned from it (the a-priori error). Every filter returns
(weights (N + 1, M), errors (N,)): weights[k] is what predicted sample k, weights[N] what is left at the end.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import blas

Array = np.ndarray
Trajectory = tuple[Array, Array]


# ------------------------------------------------------------------------------------------------- the closed form


class Wiener(NamedTuple):
    """The best that any fixed weights can do."""

    weights: Array  # (M,)
    mse: float  # mean of squared errors, in squared units of the target: the floor for every filter
    rank: int  # below M: the inputs are linearly dependent, and these are the weights of least norm


def wiener_solution(X: Array, d: Array) -> Wiener:
    """The weights of least mean squared error, R w = p with R = X'X / N, p = X'd / N (Haykin 2002, section 2.4).

    Solved through the singular values of X: forming R would square its condition number. Where R is singular, this is
    the solution of least norm.
    """
    weights, _, rank, _ = np.linalg.lstsq(X, d, rcond=None)
    return Wiener(weights, float(np.mean((d - X @ weights) ** 2)), int(rank))


# ------------------------------------------------------------------------------------------------------ the filters


def lms(X: Array, d: Array, r: float, w: Array | None = None) -> Trajectory:
    """Least mean squares (Widrow and Hoff 1960): a step down the gradient of one sample's squared error.

    The gradient of e^2 / 2 with respect to w is -e x, so w moves by r e x. Starts at `w` (zeros if None).
    """
    weights, errors, w = start(X, w)
    for k, x in enumerate(X):
        errors[k] = e = d[k] - x @ w
        weights[k + 1] = w = w + r * e * x
    return weights, errors


def nlms(X: Array, d: Array, r: float, w: Array | None = None, eps: float = 1e-3) -> Trajectory:
    """Normalized LMS: the step is divided by the power of the input, which makes 0 < r < 2 stable for inputs of any
    scale (Haykin 2002, section 6.1). `eps` keeps silence from dividing by zero."""
    weights, errors, w = start(X, w)
    for k, x in enumerate(X):
        errors[k] = e = d[k] - x @ w
        weights[k + 1] = w = w + r / (eps + x @ x) * e * x
    return weights, errors


def rls(X: Array, d: Array, forgetting: float = 1.0, delta: float = 1e-7, w: Array | None = None) -> Trajectory:
    """Recursive least squares (Haykin 2002, section 9.3): after every sample the exact least-squares solution so far.

    P is the inverse of sum_j forgetting^(k-j) x_j x_j' + forgetting^k delta I, kept up to date by the matrix inversion
    lemma: M^2 operations a sample instead of M for LMS. With forgetting 1 and a small delta it ends at Wiener's
    weights; below 1 it remembers some 1 / (1 - forgetting) samples, and so follows a system that changes.
    """
    weights, errors, w = start(X, w)
    P = np.eye(X.shape[1]) / delta
    for k, x in enumerate(X):
        Px = P @ x
        power = forgetting + x @ Px
        errors[k] = e = d[k] - x @ w
        weights[k + 1] = w = w + e / power * Px
        P = (P - np.outer(Px, Px) / power) / forgetting  # outer(Px / power, Px) would not be symmetric to the last bit,
        # and the difference grows as forgetting^-k until the filter explodes
    return weights, errors


def start(X, w):
    """Room for weights (N + 1, taps), the first of them w or zero, and errors (N,); and that first one."""
    weights = np.empty((len(X) + 1, X.shape[1]))
    weights[0] = 0.0 if w is None else w
    return weights, np.empty(len(X)), weights[0]


# -------------------------------------------------------------------------------------- the same LMS, only faster


def lms_blocks(X: Array, d: Array, r: float, w: Array | None = None, block: int | None = None) -> Trajectory:
    """LMS again, exactly, `block` samples at a time.

    In a block that starts with weights w, e[k] = d[k] - x_k'(w + r sum_{j<k} e[j] x_j). So the errors solve a
    triangular system, (I + L) e = d - X w, where L holds r x_k'x_j below the diagonal; and the weights are running sums
    of r e x. Four BLAS calls take the place of `block` turns of a Python loop. The two forms agree but for rounding,
    some 1e-13; where a run overflows, all weights of that block are lost, not only those from there on.
    """
    if block is None:  # bench.py: as large as goes without BLAS starting threads, which cost more than they bring
        block = 64 if X.shape[1] <= 64 else 32
    weights, errors, w = start(X, w)
    below = np.tril(np.ones((block, block)))  # below @ steps: running sums, faster than cumsum
    for first in range(0, len(X), block):
        x = X[first : first + block]  # (B, M)
        system = blas.dgemm(r, x.T, x.T, trans_a=True)  # r x x', (B, B); dtrsv reads it below the diagonal only
        e = blas.dtrsv(system, d[first : first + block] - x @ w, lower=True, diag=True)  # diag: ones
        steps = (r * e)[:, None] * x
        steps[0] += w
        w = np.dot(below[: len(x), : len(x)], steps, out=weights[first + 1 : first + 1 + len(x)])[-1]
        errors[first : first + block] = e
    return weights, errors


def lms_runs(X: Array, d: Array, r: Array, w: Array) -> tuple[Array, Array]:
    """Many LMS filters side by side, one matrix operation a sample: what a sweep needs.

    X (..., N, M), d (..., N), r (...) and w (..., M) broadcast against each other over the runs (...).
    Returns (last weights (..., M), errors (..., N)). A run that diverges overflows, in silence, without harm to others.
    """
    errors = []
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(X.shape[-2]):
            x = X[..., k, :]
            e = d[..., k] - (x * w).sum(-1)  # (...)
            w = w + (r * e)[..., None] * x
            errors.append(e)
    return w, np.stack(errors, -1)


def diverged_at(errors: Array) -> int | None:
    """The first sample whose error is beyond 1e150, or no number; None if there is none. errors: (N,).

    Squares overflow at 1e154: what is found not to have diverged can be squared and summed.
    """
    bad = np.flatnonzero(~(np.abs(errors) < 1e150))
    return int(bad[0]) if len(bad) else None


# ------------------------------------------------------------------------------------------------------- the theory


class Stability(NamedTuple):
    """Upper bounds of the step size r for inputs X: the README derives them."""

    mean: float  # 2 / lambda_max: below it the expected weights converge
    trace: float  # 2 / trace(R): stricter, and known without eigenvalues
    mean_square: float | None  # the exact limit of a bounded variance; None for more than MAX_EXACT weights


MAX_EXACT = 32  # the exact theory takes matrices of M^2 x M^2


def moments(X):
    """(lambda (m,), a (m^2,), K (m^2, m^2)): second and fourth moments of the inputs, in R's own axes.

    One LMS step turns the covariance S of the weights' error into E[(I - r xx') S (I - r xx')] + r^2 J R. Along the
    eigenvectors of R = E[xx'] this is, on vec S, the matrix I - r diag(a) + r^2 K with a_ij = lambda_i + lambda_j
    and K = E[vec(xx') vec(xx')']. Directions in which the inputs have no power never move, and are left out.
    """
    eigenvalues, axes = np.linalg.eigh(X.T @ X / len(X))
    kept = eigenvalues > 1e-12 * eigenvalues[-1]
    eigenvalues, Z = eigenvalues[kept], X @ axes[:, kept]  # (m,), (N, m)
    m, K = len(eigenvalues), 0.0
    for first in range(0, len(Z), 4096):  # in pieces: vec(xx') of all samples would be large
        z = Z[first : first + 4096]
        squares = (z[:, :, None] * z[:, None, :]).reshape(-1, m * m)  # (4096, m) -> (4096, m^2)
        K = K + squares.T @ squares / len(X)
    return eigenvalues, (eigenvalues[:, None] + eigenvalues).reshape(-1), K


def stability(X: Array) -> Stability:
    """The bounds of r for LMS with inputs drawn independently from the rows of X, (N, M)."""
    eigenvalues = np.linalg.eigvalsh(X.T @ X / len(X))
    mean_square = None
    if X.shape[1] <= MAX_EXACT:
        _, a, K = moments(X)
        mean_square = 1 / np.linalg.eigvalsh(K / np.sqrt(np.outer(a, a)))[-1]  # r K < diag(a)
    return Stability(*(b if b is None else float(b) for b in (2 / eigenvalues[-1], 2 / eigenvalues.sum(), mean_square)))


def misadjustment(X: Array, r: float) -> tuple[float | None, float | None]:
    """The share by which LMS with step r stays above the Wiener MSE in the long run: (textbook, exact).

    textbook: r trace(R) / (2 - r trace(R)) (Sayed 2003, chapter 6); to first order r trace(R) / 2, the mu trace(R) of
    Widrow and Stearns 1985, chapter 6, whose 2 mu is our r.
    exact: r vec(R)' (diag(a) - r K)^-1 vec(R), from the fixed point of the step in `moments`; for rows drawn
    independently, and noise independent of them.
    None where r is beyond the bound that goes with it, and exact also for more than MAX_EXACT weights.
    """
    bounds = stability(X)
    textbook = exact = None
    if r < bounds.trace:
        textbook = 1 / (bounds.trace / r - 1)
    if bounds.mean_square is not None and r < bounds.mean_square:
        eigenvalues, a, K = moments(X)
        R = np.diag(eigenvalues).reshape(-1)
        exact = float(r * R @ np.linalg.solve(np.diag(a) - r * K, R))
    return textbook, exact
