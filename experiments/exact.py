"""A mixture of Gaussians in one dimension, whose denoiser and ODE have closed forms.

All is computed in float64 and rounded once, to the images' type.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.condition import Condition

NOISE = torch.tensor(math.pi / 2, dtype=torch.float64)
DATA = torch.zeros((), dtype=torch.float64)


def column(angle: Tensor) -> Tensor:
    return angle.double().reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Mixture:
    """Data of which every pixel is a sample of its own; it is its own teacher too.

    As a denoiser, (x_t, t, condition) -> E[x0 | x_t].
    """

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-1.2, 0.6)
    scales: tuple[float, ...] = (0.5, 0.3)

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """In a last dimension, each component's weight, mean, posterior mean's slope, z-score."""
        cos, sin = column(t).cos()[..., None], column(t).sin()[..., None]
        numbers = (self.weights, self.means, self.scales)
        weight, mean, scale = (torch.tensor(n, dtype=torch.float64) for n in numbers)
        deviation = (cos**2 * scale**2 + sin**2).sqrt()
        z = (x_t.double()[..., None] - cos * mean) / deviation
        return weight / deviation, mean, scale**2 * cos / deviation, z

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | None = None,
        dropout: torch.Generator | None = None,
    ) -> Tensor:
        density, mean, slope, z = self._components(x_t, t)
        share = (density.log() - z**2 / 2).softmax(-1)
        return (share * (mean + slope * z)).sum(-1).to(x_t.dtype)

    def cdf(self, x_t: Tensor, t: Tensor) -> Tensor:
        *_, z = self._components(x_t, t)
        return torch.special.ndtr(z) @ torch.tensor(self.weights, dtype=torch.float64)

    def density(self, x_t: Tensor, t: Tensor) -> Tensor:
        density, *_, z = self._components(x_t, t)
        return (density * (-(z**2) / 2).exp()).sum(-1) / math.sqrt(2 * math.pi)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s: in one dimension a point keeps its quantile; F_s is inverted by bisection.

        A last step of Newton's gives it its derivatives in x_t and t.
        """
        quantile = self.cdf(x_t, t)
        with torch.no_grad():
            low, high = torch.full_like(quantile, -16.0), torch.full_like(quantile, 16.0)
            for _ in range(60):
                middle = (low + high) / 2
                below = self.cdf(middle, s) < quantile
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            x_s = (low + high) / 2
            reached, density = self.cdf(x_s, s), self.density(x_s, s)
        return (x_s + (quantile - reached) / density).to(x_t.dtype)
