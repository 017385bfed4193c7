"""Data whose denoiser, probability-flow ODE and consistency function are known in closed form.

A distribution here is also its own teacher, (x_t, t, condition) -> E[x0 | x_t], pixel by pixel.
All is computed in float64 and rounded once, to the images' type.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.batches import Batch
from diffusion.condition import Guidance, Kinds, Label, Text
from diffusion.denoiser import Denoiser, DenoiserConfig
from diffusion.networks import UNet, UNetConfig
from experiments.exact import DATA, Mixture, column
from experiments.exact import NOISE as NOISE


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
    text: Text | None = None,
    **shape,
) -> Denoiser:
    """A denoiser of a random U-Net. num_classes, guidance, text: of the conditions that it
    takes."""
    config = DenoiserConfig(prediction, learned_variance, bounds)
    kinds = {"label": Label(num_classes)} if num_classes else {}
    kinds |= {"guidance": Guidance(*guidance)} if guidance else {}
    kinds |= {"text": text} if text else {}
    outputs = UNetConfig(**shape).channels * (1 + learned_variance)
    return Denoiser(random_unet(outputs, kinds, **shape), config=config, kinds=kinds)


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, scale^2)."""

    mean: float = 0.0
    scale: float = 1.0

    def _marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t."""
        cos, sin = column(t).cos(), column(t).sin()
        return cos * self.mean, (cos**2 * self.scale**2 + sin**2).sqrt()

    def __call__(self, x_t: Tensor, t: Tensor, condition=None, dropout=None) -> Tensor:
        mean, deviation = self._marginal(t)
        slope = self.scale**2 * column(t).cos() / deviation**2
        return (self.mean + slope * (x_t - mean)).to(x_t.dtype)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s: a point keeps its number of standard deviations from the mean."""
        (mean_t, deviation_t), (mean_s, deviation_s) = self._marginal(t), self._marginal(s)
        return (mean_s + (x_t - mean_t) * deviation_s / deviation_t).to(x_t.dtype)


SKEWED = Gaussian(mean=0.3, scale=0.5)
BIMODAL = Mixture()


def consistency_function(data: Gaussian | Mixture) -> Callable:
    """(x_t, t, condition) -> where the ODE through x_t ends."""
    return lambda x_t, t, condition=None, dropout=None: data.flow(x_t, t, DATA)
