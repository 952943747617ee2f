"""How far generated images are from real ones, computed from features (N, D): FID, KID, precision and recall."""

from collections.abc import Iterator

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017).

    With S the symmetric root of C1, C1 C2 has the eigenvalues of S C2 S, which is symmetric. So they are real,
    and the result is stable if the covariances are singular, as they are for fewer samples than dimensions.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots.sum()
    return max(0.0, distance.item())


def fid(real: Tensor, fake: Tensor) -> float:
    """The Frechet distance of Gaussians fitted to two sets of features."""
    return frechet(*moments(real), *moments(fake))


def kid(real: Tensor, fake: Tensor, subsets: int = 50, size: int = 1000) -> float:
    """The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, unbiased: the mean over random subsets
    (Binkowski et al. 2018). It may be slightly below zero."""
    generator = torch.Generator().manual_seed(0)
    size, total = min(size, len(real), len(fake)), 0.0
    for _ in range(subsets):
        x, y = (part[torch.randperm(len(part), generator=generator)[:size]].double() for part in (real, fake))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))  # (size, size)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        total += (within - 2 * xy.mean()).item()
    return total / subsets


def distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Distances (n, M) between points (N, D) and others (M, D), for n of the points at a time."""
    for part in points.split(1000):
        yield torch.cdist(part, others)


class Region:
    """The union of balls around points (N, D), each of them up to its point's k-th neighbour among the others."""

    def __init__(self, points: Tensor, k: int = 3):
        k = min(k, len(points) - 1)
        self.points = points
        self.reach = torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in distances(points, points)])  # (N,)

    def share_of(self, others: Tensor) -> float:
        """The share of others (M, D) that lie in the region."""
        inside = torch.cat([(rows <= self.reach).any(1) for rows in distances(others, self.points)])
        return inside.float().mean().item()


class RealRegion(Region):
    """The region of real images, against which generated ones are held (Kynkaanniemi et al. 2019)."""

    def __init__(self, real: Tensor):
        self.centre = real.double().mean(0)
        super().__init__(self.centred(real))

    def centred(self, points: Tensor) -> Tensor:
        """The points minus the mean of the real ones: cdist multiplies matrices, and far from zero float32 would lose
        the differences."""
        return (points.double() - self.centre).to(points.dtype)

    def precision_recall(self, fake: Tensor) -> tuple[float, float]:
        """Precision: the share of generated images among the real ones; recall: of real ones among the generated."""
        fake = self.centred(fake)
        return self.share_of(fake), Region(fake).share_of(self.points)
