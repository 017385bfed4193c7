"""Data whose denoiser, probability-flow ODE and consistency function are known in closed form.

A distribution here is also its own teacher, (x_t, t, condition) -> E[x0 | x_t], pixel by pixel.
All is computed in float64 and rounded once, to the images' type.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.batches import Batch
from diffusion.condition import Guidance, Kinds, Label
from diffusion.denoiser import Denoiser, DenoiserConfig
from diffusion.networks import UNet, UNetConfig


def normals(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Standard normal tensors without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator, dtype=dtype)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return next(normals(seed, *shape, dtype=dtype))


def grid_batch(size: int, *shape: int, dtype: torch.dtype = torch.float32) -> Batch:
    """A training batch with noise levels (0.5, 1.5, ...) / size."""
    level = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    x0, eps = (normal(seed, size, *shape, dtype=dtype) for seed in (1, 2))
    return Batch(x0, eps, level, condition=None, seed=3)


def random_unet(outputs: int | None = None, kinds: Kinds | None = None, **shape) -> UNet:
    """A U-Net without the zeros that it starts with."""
    net = UNet(UNetConfig(**shape), outputs, kinds)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return net


def random_denoiser(
    num_classes: int = 0,
    guidance: tuple[float, float] | None = None,
    prediction: str = "v",
    learned_variance: bool = False,
    bounds: tuple[float, float] | None = None,
    **shape,
) -> Denoiser:
    """A denoiser of a random U-Net. num_classes, guidance: of the conditions that it takes."""
    config = DenoiserConfig(prediction, learned_variance, bounds)
    kinds = {"label": Label(num_classes)} if num_classes else {}
    kinds |= {"guidance": Guidance(*guidance)} if guidance else {}
    outputs = UNetConfig(**shape).channels * (1 + learned_variance)
    return Denoiser(random_unet(outputs, kinds, **shape), config=config, kinds=kinds)


def _column(angle: Tensor) -> Tensor:
    return angle.double().reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, scale^2)."""

    mean: float = 0.0
    scale: float = 1.0

    def _marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t."""
        cos, sin = _column(t).cos(), _column(t).sin()
        return cos * self.mean, (cos**2 * self.scale**2 + sin**2).sqrt()

    def __call__(self, x_t: Tensor, t: Tensor, condition=None, dropout=None) -> Tensor:
        mean, deviation = self._marginal(t)
        slope = self.scale**2 * _column(t).cos() / deviation**2
        return (self.mean + slope * (x_t - mean)).to(x_t.dtype)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s: a point keeps its number of standard deviations from the mean."""
        (mean_t, deviation_t), (mean_s, deviation_s) = self._marginal(t), self._marginal(s)
        return (mean_s + (x_t - mean_t) * deviation_s / deviation_t).to(x_t.dtype)


@dataclass(frozen=True)
class Mixture:
    """Data from a mixture of Gaussians in one dimension: every pixel is a sample of its own."""

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-1.2, 0.6)
    scales: tuple[float, ...] = (0.5, 0.3)

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Per component, in a last dimension: weight, mean, posterior mean's slope, x_t's z-score."""
        cos, sin = _column(t).cos()[..., None], _column(t).sin()[..., None]
        numbers = (self.weights, self.means, self.scales)
        weight, mean, scale = (torch.tensor(n, dtype=torch.float64) for n in numbers)
        deviation = (cos**2 * scale**2 + sin**2).sqrt()
        z = (x_t.double()[..., None] - cos * mean) / deviation
        return weight / deviation, mean, scale**2 * cos / deviation, z

    def __call__(self, x_t: Tensor, t: Tensor, condition=None, dropout=None) -> Tensor:
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


SKEWED = Gaussian(mean=0.3, scale=0.5)
BIMODAL = Mixture()
NOISE = torch.tensor(math.pi / 2, dtype=torch.float64)
DATA = torch.zeros((), dtype=torch.float64)


def consistency_function(data: Gaussian | Mixture) -> Callable:
    """(x_t, t, condition) -> where the ODE through x_t ends."""
    return lambda x_t, t, condition=None, dropout=None: data.flow(x_t, t, DATA)
