"""Hessians: dense ones by torch.func, products with a vector, Lanczos quadrature, the largest eigenvalue."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp


def flat_loss(net: nn.Module, loss: Callable, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss on (x, y) as a function of all parameters in one vector (P,), in the order of net.parameters()."""
    shapes = [(name, p.shape) for name, p in net.named_parameters()]

    def of_vector(w: Tensor) -> Tensor:
        parts = w.split([shape.numel() for _, shape in shapes])
        parameters = {name: part.view(shape) for (name, shape), part in zip(shapes, parts)}
        return loss(functional_call(net, parameters, (x,)), y)

    return of_vector


def vector_of(net: nn.Module) -> Tensor:
    """All parameters as one vector (P,), a copy."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def dense(f: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """The Hessian (P, P) of f at w (P,)."""
    return hessian(f)(w)


def product(f: Callable[[Tensor], Tensor], w: Tensor) -> Callable[[Tensor], Tensor]:
    """v (P,) -> Hessian times v, without the Hessian: the derivative of the gradient along v (Pearlmutter 1994)."""
    return lambda v: jvp(grad(f), (w,), (v,))[1]


def signs(eigenvalues: Tensor, tolerance: float = 1e-6) -> Tensor:
    """(..., P) -> how many are positive, zero and negative, (..., 3).

    Zero is what is at most `tolerance` times the largest absolute eigenvalue.
    """
    limit = tolerance * eigenvalues.abs().amax(-1, keepdim=True)
    counts = [eigenvalues > limit, eigenvalues.abs() <= limit, eigenvalues < -limit]
    return torch.stack([count.sum(-1) for count in counts], -1)


def lanczos(times: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues (steps,) of the tridiagonal matrix of Lanczos from v (P,), and their quadrature weights.

    Each new vector is orthogonalized against all earlier ones, twice: without it rounding brings copies of eigenvalues.
    """
    basis = [v / v.norm()]
    alphas = []
    betas = []
    for _ in range(steps):
        w = times(basis[-1])
        alphas.append(w @ basis[-1])
        for _ in range(2):
            rows = torch.stack(basis)
            w = w - rows.T @ (rows @ w)
        beta = w.norm()
        if beta < 1e-10 * max(map(abs, alphas)) or len(alphas) == steps:
            break
        betas.append(beta)
        basis.append(w / beta)
    n = len(alphas)
    off = torch.stack(betas[: n - 1]) if n > 1 else v.new_zeros(0)
    matrix = torch.diag(torch.stack(alphas)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[0] ** 2


def estimate_signs(
    times: Callable, size: int, probes: int, steps: int, tolerance: float, seed: int = 0, dtype=torch.float64
) -> tuple[Tensor, Tensor]:
    """Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017): the fractions of positive, zero and negative
    eigenvalues (3,) as means over random sign vectors, and their errors (3,).

    An error is the standard error of the mean over vectors and the mean bound of the quadrature. A fraction is the
    integral of a step function, which the quadrature knows only up to the weight of one of the two nodes beside the
    step (inequalities of Chebyshev, Markov and Stieltjes).
    """
    generator, results = torch.Generator().manual_seed(seed), []
    for _ in range(probes):
        v = (torch.randint(2, (size,), generator=generator) * 2 - 1).to(dtype)
        results.append(lanczos(times, v, steps))
    limit = tolerance * max(values.abs().max() for values, _ in results)
    shares, bounds = [], []
    for values, weights in results:
        kinds = (values > limit, values.abs() <= limit, values < -limit)
        shares.append(torch.stack([weights[kind].sum() for kind in kinds]))
        exact = len(values) < steps  # Lanczos found the whole space of this vector
        low, high = (0 * limit if exact else beside(values, weights, step) for step in (-limit, limit))
        bounds.append(torch.stack([high, low + high, low]))
    shares = torch.stack(shares)
    return shares.mean(0), shares.std(0) / probes**0.5 + torch.stack(bounds).mean(0)


def beside(values: Tensor, weights: Tensor, step: Tensor) -> Tensor:
    """The larger weight of the two nodes beside `step`; the nodes ascend."""
    k = int((values <= step).sum())
    return weights[max(k - 1, 0) : k + 1].max()


def largest_eigenvalue(
    times: Callable[[Tensor], Tensor],
    size: int,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    dtype=torch.float32,
) -> float:
    """The eigenvalue of largest absolute value, by power iteration, to a relative change of `tolerance`."""
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    value = 0.0
    for _ in range(iterations):
        v = v / v.norm()
        w = times(v)
        before, value = value, (v @ w).item()
        if abs(value - before) <= tolerance * abs(value):
            break
        v = w
    return value
