"""An image around what is known of it (Song et al. 2023, algorithm 4), kept to the grey level.

Every jump to x0 is followed by putting back what is known: values, means or luma.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.circle import add_noise
from diffusion.samplers import Noises

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, section 2.5.1
Shape = tuple[int, int, int]
"""(C, H, W)."""


@dataclass(frozen=True)
class Measure:
    """What is known of an image x: m = sum_i w_i x_i over each of its groups of values.

    The groups are disjoint, so x -> the nearest image that measures m is one orthogonal projection:
    each group moves along w by (m - w x) / |w|^2. Song et al. 2023, algorithm 4, has it as
    A^-1[A y (1 - mask) + A x mask] for an orthogonal A whose first row in a group is w / |w|.
    """

    weights: tuple[float, ...]
    """w, of sum 1: a measured value is a grey level as well, and any scaling of levels commutes."""
    groups: Tensor
    """(G, len(weights)) the places, in a flattened image, of each group's values."""

    def split(self, images: Tensor) -> Tensor:
        """The groups' values (B, G, len(weights)) of images (B, C, H, W)."""
        return images.flatten(1)[:, self.groups]

    def put(self, values: Tensor, images: Tensor) -> Tensor:
        """The images with these values in their groups."""
        flat = images.flatten(1).clone()
        flat[:, self.groups] = values
        return flat.view_as(images)

    def of(self, images: Tensor) -> Tensor:
        """m (B, G) of images."""
        return self.split(images) @ images.new_tensor(self.weights)

    def keep(self, x: Tensor, measured: Tensor) -> Tensor:
        """The image nearest to x that measures so."""
        w = x.new_tensor(self.weights)
        missing = measured - self.of(x)
        return self.put(self.split(x) + missing[..., None] * (w / w.square().sum()), x)

    def settle(self, images: Tensor, measured: Tensor) -> Tensor:
        """uint8 images that measure so to the grey level, near these float ones.

        measured: (B, G) whole grey levels. The nearest images that are from 0 to 255 and measure so
        are clamp(x + k w), k found for each group by halving; rounding then passes each value's
        error on to the next of its group, the lightest last.
        """
        images, m = images.double(), measured.double()
        x, w = self.split(images), images.new_tensor(self.weights)
        reach = (images.abs().max() + 255) / w.min()  # from wherever x is, to black and to white
        low, high = torch.zeros_like(m) - reach, torch.zeros_like(m) + reach
        for _ in range(64):
            middle = (low + high) / 2
            below = (x + middle[..., None] * w).clamp(0, 255) @ w < m
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        x = (x + (low + high)[..., None] / 2 * w).clamp(0, 255)
        rounded, error = torch.empty_like(x), torch.zeros_like(m)
        for i in w.argsort(descending=True).tolist():
            rounded[..., i] = (x[..., i] + error / w[i]).round().clamp(0, 255)
            error = error + w[i] * (x[..., i] - rounded[..., i])
        return self.put(rounded, images.round().clamp(0, 255)).to(torch.uint8)

    def difference(self, images: Tensor, measured: Tensor) -> int:
        """The largest difference of what uint8 images measure, as whole grey levels, from m."""
        away = (self.of(images.double()).round() - measured).abs()
        return int(away.max()) if away.numel() else 0


def pixels(mask: Tensor, channels: int) -> Measure:
    """Every value where mask (H, W) bool is True."""
    return Measure((1.0,), mask.expand(channels, -1, -1).flatten().nonzero())


def blocks(shape: Shape, factor: int) -> Measure:
    """The means of squares of factor x factor pixels, channel by channel."""
    squares = _places(shape).unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).transpose(2, 3)
    return Measure((1 / factor**2,) * factor**2, squares.reshape(-1, factor**2))


def luma(shape: Shape) -> Measure:
    """The luma of colours."""
    return Measure(LUMA, _places(shape).flatten(1).T)


def _places(shape: Shape) -> Tensor:
    """(C, H, W) where each value of an image is, once it is flattened."""
    return torch.arange(math.prod(shape)).reshape(shape)


@torch.no_grad()
def restore(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Noises,
    angles: Tensor,
    start: Tensor,
    keep: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Song et al. 2023, algorithm 4: x0 (B, C, H, W), one call for each angle above 0.

    angles: ascending from 0. start: the x0 that the first noise is added to. keep: puts back what
    is known after each jump.
    """
    x0 = start
    for t in angles[1:].flip(0):
        x0 = keep(denoise(add_noise(x0, next(noise), t), t))
    return x0
