"""Noise from (seed, image index): the same image whatever the batch, the process or the device."""

import math

import torch
from torch import Tensor

from diffusion.console import UserError


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a right shift that brings in zeros


def _hash(x: Tensor) -> Tensor:
    """splitmix64's output function (Steele et al. 2014) of int64, wrapping as unsigned does."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def check_seed(seed: int, flag: str = "--seed") -> None:
    """UserError for a seed that an int64 cannot hold, or a negative one."""
    if not 0 <= seed < 1 << 63:
        raise UserError(f"{flag} must be from 0 to 2^63 - 1, got {seed}")


def seed32(seed: int) -> int:
    """The seed in the 32 bits that are all a CPU's generator takes of one.

    A seed below 2^32 is itself. Of a larger one it is a hash of all its bits: two seeds have the
    same with probability 2^-32, not whenever their low 32 bits agree.
    """
    return seed if seed < 1 << 32 else int(_shift(_hash(torch.tensor(seed) + _GOLDEN), 32))


class Noise:
    """An iterator over standard normal images (B, *shape) float32.

    The k-th draw for image i is a function of (seed, i, k) alone: a counter, hashed, then
    turned normal in pairs (Box & Muller 1958) in float64.

    indices: (B,) int64, the images' global numbers; the noise lives on their device.
    """

    def __init__(self, seed: int | Tensor, indices: Tensor, shape: tuple[int, ...]):
        """seed: one for all, or (B,) int64."""
        self.shape, self.drawn = tuple(shape), 0
        start = _hash(torch.as_tensor(seed, dtype=torch.int64, device=indices.device) + _GOLDEN)
        self.streams = _hash(start ^ _hash(indices * _GOLDEN + 1))[:, None]
        self.pairs = (math.prod(shape) + 1) // 2
        self.counter = torch.arange(self.pairs, device=indices.device)

    def __iter__(self) -> "Noise":
        return self

    def __next__(self) -> Tensor:
        bits = _hash(self.streams + (self.counter + self.drawn * self.pairs) * _GOLDEN)
        self.drawn += 1
        low, high = bits & 0xFFFFFFFF, _shift(bits, 32)
        radius = (-2 * ((low.double() + 0.5) / 2**32).log()).sqrt()
        angle = high.double() * (2 * math.pi / 2**32)
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return normal[:, : math.prod(self.shape)].float().reshape(-1, *self.shape)
