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
    shape: Shape
    known: Tensor | None = None
    """(G,) bool, which groups are measured; None for all."""

    def split(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the values of the groups (B, G, len(weights))."""
        return images.flatten(1)[:, self.groups]

    def join(self, values: Tensor) -> Tensor:
        """The inverse of split."""
        order = self.groups.flatten().argsort()
        return values.flatten(1)[:, order].unflatten(1, self.shape)

    def of(self, images: Tensor) -> Tensor:
        """m (B, G) of images."""
        groups = self.split(images)
        return groups @ groups.new_tensor(self.weights)

    def keep(self, x: Tensor, measured: Tensor) -> Tensor:
        """The image nearest to x that measures so where it is known."""
        w = x.new_tensor(self.weights)
        missing = self._where_known(measured - self.of(x))
        return self.join(self.split(x) + missing[..., None] * (w / w.square().sum()))

    def settle(self, images: Tensor, measured: Tensor) -> Tensor:
        """uint8 images that measure so to the grey level, near these float ones.

        measured: (B, G) whole grey levels. The nearest images that are from 0 to 255 and measure so
        are clamp(x + k w), k found for each group by halving; rounding then passes each value's
        error on to the next of its group, the lightest last.
        """
        x, m = self.split(images.double()), measured.double()
        w = x.new_tensor(self.weights)
        reach = (x.abs().max() + 255) / w.min()  # from wherever x is, to black and to white
        low, high = torch.zeros_like(m) - reach, torch.zeros_like(m) + reach
        for _ in range(64):
            middle = (low + high) / 2
            below = (x + middle[..., None] * w).clamp(0, 255) @ w < m
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        shift = self._where_known((low + high) / 2)
        x = (x + shift[..., None] * w).clamp(0, 255)
        rounded, error = torch.empty_like(x), torch.zeros_like(m)
        for i in w.argsort(descending=True).tolist():
            rounded[..., i] = (x[..., i] + error / w[i]).round().clamp(0, 255)
            error = self._where_known(error + w[i] * (x[..., i] - rounded[..., i]))
        return self.join(rounded).to(torch.uint8)

    def difference(self, images: Tensor, measured: Tensor) -> int:
        """The largest difference of what uint8 images measure, as whole grey levels, from m."""
        now = self.of(images.double()).round()
        return int(self._where_known(now - measured).abs().max())

    def _where_known(self, values: Tensor) -> Tensor:
        return values if self.known is None else torch.where(self.known, values, 0)


def pixels(mask: Tensor, channels: int) -> Measure:
    """Every value where mask (H, W) bool is True."""
    height, width = mask.shape
    shape = channels, height, width
    return Measure((1.0,), _places(shape).reshape(-1, 1), shape, mask.expand(shape).flatten())


def blocks(shape: Shape, factor: int) -> Measure:
    """The means of squares of factor x factor pixels, channel by channel."""
    squares = _places(shape).unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).transpose(2, 3)
    return Measure((1 / factor**2,) * factor**2, squares.reshape(-1, factor**2), shape)


def luma(shape: Shape) -> Measure:
    """The luma of colours."""
    return Measure(LUMA, _places(shape).flatten(1).T, shape)


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
