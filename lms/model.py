"""Adaptive linear filters: predict d[k] by X[k] @ w, then correct w, one sample after the other.

In all of them the inputs X are (N, M) float64, the targets d are (N,), and the step size is r > 0. The error of sample
k, e[k] = d[k] - X[k] @ w[k], is a priori: it is computed before the update on that sample. Every filter returns
(weights (N + 1, M), errors (N,)), where weights[k] predicts sample k and weights[N] are the final weights.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import blas

Array = np.ndarray
Trajectory = tuple[Array, Array]


# ------------------------------------------------------------------------------------------------- the closed form


class Wiener(NamedTuple):
    """The fixed weights with the smallest mean squared error."""

    weights: Array  # (M,)
    mse: float  # their mean squared error, in squared units of the target: the minimum for any fixed weights
    rank: int  # of X; below M, the inputs are linearly dependent and `weights` is the solution of least norm


def wiener_solution(X: Array, d: Array) -> Wiener:
    """The solution of R w = p with R = X'X / N and p = X'd / N (Haykin 2002, section 2.4).

    It comes from the singular values of X, since R has the square of the condition number of X. If R is singular, it is
    the solution of least norm.
    """
    weights, _, rank, _ = np.linalg.lstsq(X, d, rcond=None)
    return Wiener(weights, float(np.mean((d - X @ weights) ** 2)), int(rank))


# ------------------------------------------------------------------------------------------------------ the filters


def lms(X: Array, d: Array, r: float, w: Array | None = None) -> Trajectory:
    """Least mean squares (Widrow and Hoff 1960): a gradient step on the squared error of each sample.

    The gradient of e^2 / 2 with respect to w is -e x, so the update is w <- w + r e x. `w` are the initial weights
    (zeros if None).
    """
    weights, errors, w = initialize(X, w)
    for k, x in enumerate(X):
        errors[k] = e = d[k] - x @ w
        weights[k + 1] = w = w + r * e * x
    return weights, errors


def nlms(X: Array, d: Array, r: float, w: Array | None = None, eps: float = 1e-3) -> Trajectory:
    """Normalized LMS: the step is divided by the power of the input (Haykin 2002, section 6.1).

    Therefore 0 < r < 2 is stable for inputs of any scale. eps: avoids a division by zero if the input is zero.
    """
    weights, errors, w = initialize(X, w)
    for k, x in enumerate(X):
        errors[k] = e = d[k] - x @ w
        weights[k + 1] = w = w + r / (eps + x @ x) * e * x
    return weights, errors


def rls(X: Array, d: Array, forgetting: float = 1.0, delta: float = 1e-7, w: Array | None = None) -> Trajectory:
    """Recursive least squares (Haykin 2002, section 9.3): the exact least-squares solution after every sample.

    P is the inverse of sum_j forgetting^(k-j) x_j x_j' + forgetting^k delta I, updated by the matrix inversion lemma:
    M^2 operations per sample, where LMS needs M. With forgetting 1 and a small delta, the final weights are the Wiener
    solution. Below 1, it remembers about 1 / (1 - forgetting) samples, so it can track a system that changes.
    """
    weights, errors, w = initialize(X, w)
    P = np.eye(X.shape[1]) / delta
    for k, x in enumerate(X):
        Px = P @ x
        power = forgetting + x @ Px
        errors[k] = e = d[k] - x @ w
        weights[k + 1] = w = w + e / power * Px
        # outer(Px / power, Px) is not exactly symmetric, and the difference grows as forgetting^-k until RLS diverges
        P = (P - np.outer(Px, Px) / power) / forgetting
    return weights, errors


def initialize(X: Array, w: Array | None) -> tuple[Array, Array, Array]:
    """Empty arrays for the weights (N + 1, M) and errors (N,), and the initial weights (M,): `w`, or zeros if None."""
    weights = np.empty((len(X) + 1, X.shape[1]))
    weights[0] = 0.0 if w is None else w
    return weights, np.empty(len(X)), weights[0]


# -------------------------------------------------------------------------------------- the same LMS, but faster


def lms_blocks(X: Array, d: Array, r: float, w: Array | None = None, block: int | None = None) -> Trajectory:
    """The same as `lms`, computed for `block` samples at a time.

    In a block that starts with weights w, e[k] = d[k] - x_k'(w + r sum_{j<k} e[j] x_j). Thus the errors solve a
    triangular system, (I + L) e = d - X w, where L has r x_k'x_j below the diagonal. The weights are cumulative sums of
    r e x. Four BLAS calls replace `block` iterations of a Python loop. Both forms agree up to rounding, about 1e-13.
    When a run overflows, all weights of that block are invalid, not only those after the overflow.
    """
    if block is None:  # about the best ones of bench.py
        block = 64 if X.shape[1] <= 64 else 32
    weights, errors, w = initialize(X, w)
    below = np.tril(np.ones((block, block)))  # below @ steps: cumulative sums, faster than cumsum
    for first in range(0, len(X), block):
        x = X[first : first + block]  # (B, M)
        system = blas.dgemm(r, x.T, x.T, trans_a=True)  # r x x', (B, B); dtrsv reads only below the diagonal
        e = blas.dtrsv(system, d[first : first + block] - x @ w, lower=True, diag=True)  # diag: ones on the diagonal
        steps = (r * e)[:, None] * x
        steps[0] += w
        w = np.dot(below[: len(x), : len(x)], steps, out=weights[first + 1 : first + 1 + len(x)])[-1]
        errors[first : first + block] = e
    return weights, errors


def lms_runs(X: Array, d: Array, r: Array, w: Array) -> tuple[Array, Array]:
    """Many runs of LMS at once, with one array operation per sample for all of them.

    X (..., N, M), d (..., N), r (...) and w (..., M) broadcast over the runs (...). Returns (final weights (..., M),
    errors (..., N)). A run that diverges overflows without a warning and does not affect the others.
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
    """The first sample of errors (N,) whose error is above 1e150 or NaN; None if there is none.

    Squares overflow at 1e154. The errors of a run that has not diverged can therefore be squared and summed.
    """
    bad = np.flatnonzero(~(np.abs(errors) < 1e150))
    return int(bad[0]) if len(bad) else None


# ------------------------------------------------------------------------------------------------------- the theory


class Stability(NamedTuple):
    """Upper bounds of the step size r for given inputs; STUDIES.md derives them."""

    mean: float  # 2 / lambda_max: below it, the expected weights converge
    trace: float  # 2 / trace(R): stricter, but needs no eigenvalues
    mean_square: float | None  # below it, the variance of the weights is bounded; None for more than MAX_EXACT weights


MAX_EXACT = 32  # the exact theory needs matrices of M^2 x M^2


def moments(X: Array) -> tuple[Array, Array, Array]:
    """(lambda (m,), a (m^2,), K (m^2, m^2)): second and fourth moments of inputs X (N, M), in the eigenvectors of R.

    One LMS step maps the covariance S of the weight error to E[(I - r xx') S (I - r xx')] + r^2 J R, where J is the
    Wiener MSE. In the eigenvectors of R = E[xx'], it multiplies vec S by the matrix I - r diag(a) + r^2 K, where
    a_ij = lambda_i + lambda_j and K = E[vec(xx') vec(xx')']. Directions without input power are left out, since LMS
    never changes the weights along them.
    """
    eigenvalues, axes = np.linalg.eigh(X.T @ X / len(X))
    nonzero = eigenvalues > 1e-12 * eigenvalues[-1]
    eigenvalues, Z = eigenvalues[nonzero], X @ axes[:, nonzero]  # (m,), (N, m)
    m, K = len(eigenvalues), 0.0
    for first in range(0, len(Z), 4096):  # in chunks: vec(xx') of all samples would need too much memory
        z = Z[first : first + 4096]
        squares = (z[:, :, None] * z[:, None, :]).reshape(-1, m * m)  # (4096, m) -> (4096, m^2)
        K = K + squares.T @ squares / len(X)
    return eigenvalues, (eigenvalues[:, None] + eigenvalues).reshape(-1), K


def stability(X: Array) -> Stability:
    """The bounds of r for LMS on inputs drawn independently from the rows of X (N, M)."""
    eigenvalues = np.linalg.eigvalsh(X.T @ X / len(X))
    mean_square = None
    if X.shape[1] <= MAX_EXACT:
        _, a, K = moments(X)
        mean_square = 1 / np.linalg.eigvalsh(K / np.sqrt(np.outer(a, a)))[-1]  # r K < diag(a)
    return Stability(*(b if b is None else float(b) for b in (2 / eigenvalues[-1], 2 / eigenvalues.sum(), mean_square)))


def misadjustment(X: Array, r: float) -> tuple[float | None, float | None]:
    """(textbook, exact) predictions of the misadjustment of LMS with step size r on inputs X (N, M).

    The misadjustment is the steady-state excess MSE divided by the Wiener MSE.
    textbook: r trace(R) / (2 - r trace(R)) (Sayed 2003, chapter 6); to first order r trace(R) / 2, the mu trace(R) of
    Widrow and Stearns 1985, chapter 6, where 2 mu is our r.
    exact: r vec(R)' (diag(a) - r K)^-1 vec(R), the fixed point of the map in `moments`; it assumes independent rows and
    noise that is independent of them.
    Each is None if r is above its bound; exact is also None for more than MAX_EXACT weights.
    """
    bounds = stability(X)
    textbook = exact = None
    if r < bounds.trace:
        textbook = r / (bounds.trace - r)
    if bounds.mean_square is not None and r < bounds.mean_square:
        eigenvalues, a, K = moments(X)
        R = np.diag(eigenvalues).reshape(-1)
        exact = float(r * R @ np.linalg.solve(np.diag(a) - r * K, R))
    return textbook, exact
