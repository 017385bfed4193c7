"""Distances between sets of features."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Mean and covariance of a stream of vectors in float64; two of them merge exactly."""

    count: int
    mean: Tensor
    """(D,)"""
    scatter: Tensor
    """(D, D): the sum of outer products of deviations from the mean."""

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """features: (N, D)."""
        x = features.double().cpu()
        mean = x.mean(0)
        return Moments(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        """Chan et al. 1979, eq. 2.1."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6).

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2): two symmetric
    eigendecompositions and no matrix square root of a product, which need not be symmetric.
    """
    roots = [_sqrt(moments.covariance) for moments in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * cross)


def _sqrt(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
