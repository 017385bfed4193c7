"""The Fréchet distance between sets of features, from moments that merge."""

from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.console import UserError
from diffusion.files import write_atomic
from eval.measure.npz import read_npz

EPS = torch.finfo(torch.float64).eps
STATISTICS = ("mu", "sigma")  # names in an .npz, as in clean-fid's, EDM's and pytorch-fid's
LARGEST = 1e30  # number in saved statistics; squares of larger ones overflow
MANY = 2**31  # images of statistics that do not say of how many they are: the moments are exact


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of a stream of vectors in float64; two of them merge exactly."""

    count: int
    mean: Tensor
    """(D,)"""
    scatter: Tensor
    """(D, D): the sum of outer products of deviations from the mean."""

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """features: (N, D), summed where they lie, without a wait, if that device has float64."""
        x = features.cpu() if features.device.type == "mps" else features
        x = x.to(torch.float64, copy=True)
        mean = x.mean(0)
        x -= mean
        return Moments(len(x), mean, x.T @ x)

    @staticmethod
    def saved(path: Path, dim: int, extractor: str) -> "Moments":
        """Statistics of real images that clean-fid, EDM, pytorch-fid or `save` wrote: an .npz of
        the mean `mu` (D,) and the covariance `sigma` (D, D).

        UserError where it holds no such, of other than dim features, or by another extractor, whose
        sha256 `save` alone writes.
        """
        expected = "an .npz of statistics, with mu and sigma"
        arrays = read_npz(path, (*STATISTICS, "extractor", "num_images"), expected)
        try:
            mean, covariance = (torch.from_numpy(arrays[name]).double() for name in STATISTICS)
            known = str(arrays.get("extractor", extractor))
            count = int(arrays.get("num_images", MANY))
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path}: expected {expected} ({error!s:.200})") from error
        if mean.shape != (dim,) or covariance.shape != (dim, dim) or known != extractor:
            by = f" by extractor {known[:8]}" if known != extractor else ""
            raise UserError(
                f"{path} holds statistics of {mean.numel()} features{by}, and these are {dim} by "
                f"extractor {extractor[:8]}: choose by --features those of the statistics"
            )
        variances, most = covariance.diagonal(), max(mean.abs().max(), covariance.abs().max())
        if not (most <= LARGEST and variances.min() >= 0 and covariance.allclose(covariance.T)):
            raise UserError(
                f"{path}: expected finite numbers, and a sigma that is symmetric with variances of "
                "at least 0 on its diagonal: is the file damaged?"
            )
        return Moments(count, mean, covariance * (count - 1))

    def save(self, path: Path, extractor: str) -> None:
        """Write what `saved` reads."""
        mu, sigma = (x.cpu().numpy() for x in (self.mean, self.covariance))
        buffer = BytesIO()
        np.savez(buffer, mu=mu, sigma=sigma, num_images=self.count, extractor=extractor)
        write_atomic(path, buffer.getvalue())

    def to(self, device: torch.device) -> "Moments":
        return Moments(self.count, self.mean.to(device), self.scatter.to(device))

    def __add__(self, other: "Moments") -> "Moments":
        """Chan et al. 1979, eq. 2.1."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        if self.count < 2:
            raise UserError(f"a covariance takes at least 2 images, got {self.count}")
        self.refuse()
        return self.scatter / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """F (D, r) with F F^T the covariance and r its rank: computed once, then kept.

        Cholesky's where the covariance is far from singular, else from its eigenvalues. Of these,
        N images give N - 1 at most: all others are rounding, and so are those below a few units
        in the last place of the largest. In both, the largest variances come first.
        """
        covariance = self.covariance
        if self.count > len(self.mean):
            order = covariance.diagonal().argsort(descending=True)
            factor, failed = torch.linalg.cholesky_ex(covariance[order][:, order])
            spread = factor.diagonal()
            if not failed and spread.min() > 1e-6 * spread.max():
                return factor[order.argsort()]
        values, vectors = torch.linalg.eigh(covariance)
        above = int((values > 8 * EPS * values[-1]).sum())
        rank = max(1, min(above, self.count - 1))
        return (vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()).flip(1)

    def refuse(self) -> None:
        """UserError where any of the features was not finite."""
        if not self.mean.isfinite().all():
            raise UserError(
                f"the features of some of {self.count} images are not finite: "
                "choose other --features, or see what the extractor makes of these images"
            )

    def tensors(self) -> dict[str, Tensor]:
        """For a file, or to send to another process."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "Moments":
        """The inverse of tensors."""
        return Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"])


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6).

    With A = F F^T and B = G G^T, tr (A B)^(1/2) is the sum of the singular values of F^T G: no
    root of a product, which need not be symmetric. They are found as roots of the eigenvalues of
    the smaller of its two Gram matrices, several times faster. That squares the condition; but
    roots of full rank leave no zeros to blur, and tridiagonalising a matrix from its largest
    entries down keeps the digits of its small eigenvalues (Martin, Reinsch & Wilkinson 1968).
    """
    product = a.root.T @ b.root
    if product.shape[0] > product.shape[1]:
        product = product.T
    cross = torch.linalg.eigvalsh(product @ product.T).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * cross)
