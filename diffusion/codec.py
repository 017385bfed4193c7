"""Codecs: from pixels to the space that a model works in, and back. Nothing else converts them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from diffusion import registry
from diffusion.registry import Entry


class Codec(Entry, Protocol):
    """Pixels (B, C, H, W) uint8 to x0 float32 of zero mean and unit variance, and back.

    A frozen dataclass, so that a card can hold it.
    """

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the greatest value of an x0; None where there are none."""

    @property
    def grey_levels(self) -> tuple[float, float] | None:
        """(mean, std) where x0 = (grey level - mean) / std value by value; else None."""

    def shape(self, pixels: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the x0 of images of such a shape."""

    def encode(self, images: Tensor) -> Tensor:
        """x0 of images (B, C, H, W) uint8."""

    def decode(self, x0: Tensor) -> Tensor:
        """Images uint8 of x0: the inverse of encode, rounded and clipped to 0..255."""

    @staticmethod
    def fitted(parts: Iterable[Tensor]) -> "Codec":
        """The codec that suits such images: parts of them, (N, C, H, W) uint8 each."""


@dataclass(frozen=True)
class Scale:
    """Grey levels, less their mean, over their standard deviation."""

    mean: Annotated[float, Field(ge=0, le=255)]
    std: Annotated[float, Field(ge=1e-6, le=255)]

    @property
    def bounds(self) -> tuple[float, float]:
        """Black and white."""
        return (0 - self.mean) / self.std, (255 - self.mean) / self.std

    @property
    def grey_levels(self) -> tuple[float, float]:
        return self.mean, self.std

    def shape(self, pixels: tuple[int, int, int]) -> tuple[int, int, int]:
        return pixels

    def encode(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def decode(self, x0: Tensor) -> Tensor:
        return (x0 * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)

    @staticmethod
    def fitted(parts: Iterable[Tensor]) -> "Scale":
        histogram = torch.zeros(256, dtype=torch.float64)
        for images in parts:
            histogram += torch.bincount(images.flatten(), minlength=256)
        levels = torch.arange(256, dtype=torch.float64)
        mean = float((histogram @ levels) / histogram.sum())
        return Scale(mean, float(((histogram @ (levels - mean).square()) / histogram.sum()).sqrt()))


CODECS: dict[str, type[Codec]] = {"scale": Scale}


def to_json(codec: Codec) -> dict:
    """The codec as a card holds it."""
    return registry.to_json(codec, CODECS)


def from_json(described: dict) -> Codec:
    """The inverse of to_json. UserError for a codec that is not registered here."""
    return registry.from_json(described, CODECS, "codec", "the model's codec is")
