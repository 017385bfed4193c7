"""Codecs: from pixels to the space that a model works in, and back. Nothing else converts them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from diffusion import autoencoder, registry
from diffusion.console import UserError
from diffusion.images import Images, parts
from diffusion.latents import Latents, Prepared
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
        """The scale that suits such images: parts of them, (N, C, H, W) uint8 each."""
        histogram = torch.zeros(256, dtype=torch.float64)
        for images in parts:
            histogram += torch.bincount(images.flatten(), minlength=256)
        levels = torch.arange(256, dtype=torch.float64)
        mean = float((histogram @ levels) / histogram.sum())
        return Scale(mean, float(((histogram @ (levels - mean).square()) / histogram.sum()).sqrt()))


CODECS: dict[str, type[Codec]] = {"scale": Scale, "latents": Latents}


def fitted(choice: str, name: str, images: Images) -> Codec:
    """The codec that suits these images. name: of the images.

    choice: the name of a codec of pixels, or the place of an autoencoder. UserError for another,
    or where every pixel has the same value.
    """
    pixels, fit = _differing(name, parts(images)), getattr(CODECS.get(choice), "fitted", None)
    if fit:  # of a codec that images alone say all of
        return fit(pixels)
    if autoencoder.is_place(choice):
        for _ in pixels:
            pass
        return Latents.of(images, choice)
    known = ", ".join(name for name, kind in CODECS.items() if hasattr(kind, "fitted"))
    raise UserError(
        f"unknown codec {choice!r}: expected {known}, or an autoencoder: a run of "
        "teachers.autoencoder, or diffusers:FOLDER"
    )


def _differing(name: str, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The parts of a dataset. UserError after the last where every pixel has the same value."""
    level, differ = None, False
    for part in parts:
        level = part.flatten()[0] if level is None else level
        differ = differ or bool((part != level).any())
        yield part
    if not differ:
        raise UserError(f"every pixel of {name} has the same value: expected images that differ")


def located(described: dict, checkpoint: Path, autoencoder: Path | None) -> dict:
    """A codec as the card of this checkpoint holds it, with the place of its autoencoder as it is
    now, if it has one. UserError where that is missing.

    autoencoder: its place, as the user says.
    """
    codec = from_json(described)
    if isinstance(codec, Latents):
        return to_json(codec.located(checkpoint, str(autoencoder) if autoencoder else None))
    return described


def prepared(codec: Codec, images: Images, flip: bool) -> Prepared:
    """The images as training reads them: pixels, unless the codec encodes them before.

    flip: whether training mirrors some.
    """
    before = getattr(codec, "prepared", None)
    if before:
        return before(images, flip)

    def x0(rows: Tensor, mirrored: Tensor | None) -> Tensor:
        if mirrored is not None:
            rows = torch.where(mirrored[:, None, None, None], rows.flip(-1), rows)
        return codec.encode(rows)

    return Prepared(images, x0)


def to_json(codec: Codec) -> dict:
    """The codec as a card holds it."""
    return registry.to_json(codec, CODECS)


def from_json(described: dict) -> Codec:
    """The inverse of to_json. UserError for a codec that is not registered here."""
    return registry.from_json(described, CODECS, "codec", "the model's codec is")
