"""Latents: images as a frozen autoencoder sees them, the x0 of latent diffusion (Rombach et al.
2022). Those of a dataset are encoded once and kept in the cache."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from diffusion import autoencoder, machine
from diffusion.console import UserError, say, track
from diffusion.images import Captioned, Images, InMemory
from diffusion.owner import cached
from diffusion.typed import Sha256, Text

BATCH = 64  # images through the autoencoder at a time
VERSION = 1  # of the way that images become latents: another number makes the caches anew
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Spread = Annotated[float, Field(ge=1e-6, le=1e9)]


class Prepared(NamedTuple):
    """Images as training reads them."""

    images: Images
    """Their rows may be what a codec made of the pixels before."""
    x0: Callable[[Tensor, Tensor | None], Tensor]
    """(rows (B, ...), which of them are mirrored (B,) or None) -> x0."""


@dataclass(frozen=True)
class Latents:
    """What an autoencoder makes of images, less its mean, over its standard deviation, each
    channel's own: so that x0 has unit variance."""

    autoencoder: Text
    """Its place when the model was made: a run of teachers.autoencoder, or diffusers:FOLDER."""
    sha256: Sha256
    """Identity of the autoencoder: its shape and its weights."""
    factor: Annotated[int, Field(ge=1, le=256)]
    """Pixels of a side for each latent's."""
    mean: Annotated[tuple[Number, ...], Field(min_length=1, max_length=1024)]
    """The mean of each channel of the training images' latents."""
    std: Annotated[tuple[Spread, ...], Field(min_length=1, max_length=1024)]
    bounds = None
    grey_levels = None

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError("mean and std should have a value for each channel")

    def shape(self, pixels: tuple[int, int, int]) -> tuple[int, int, int]:
        _, height, width = pixels
        return len(self.mean), height // self.factor, width // self.factor

    def encode(self, images: Tensor) -> Tensor:
        return self.scaled(_encode(self.autoencoder, self.sha256, images))

    def scaled(self, latents: Tensor) -> Tensor:
        """x0 of the autoencoder's own latents."""
        mean, std = self._scale(latents.device)
        return (latents.float() - mean) / std

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        mean, std = self._scale(x0.device)
        latents, network = x0 * std + mean, self.network(x0.device)
        # an exported graph has no number of images by which it could be cut
        whole = torch.compiler.is_compiling()
        parts = [network.decode(part) for part in ([latents] if whole else latents.split(BATCH))]
        return ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def network(self, device: torch.device) -> "autoencoder.Autoencoder | autoencoder.Foreign":
        """The autoencoder, which is read once."""
        network = autoencoder.load(self.autoencoder, self.sha256)
        weights = next(network.parameters(), None)
        there = weights is None or weights.device == device
        return network if there else network.to(device)  # torch.export traces no moves

    def _scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(each, device=device) for each in (self.mean, self.std))
        return mean[:, None, None], std[:, None, None]

    def prepared(self, images: Images, flip: bool) -> Prepared:
        """The images' latents, and those of the mirrored images if training mirrors some: read
        from the cache, or encoded once."""
        rows = [encoded(images, self.autoencoder, self.sha256, mirrored=False)]
        if flip:
            rows.append(encoded(images, self.autoencoder, self.sha256, mirrored=True))

        def x0(rows: Tensor, mirrored: Tensor | None) -> Tensor:
            if mirrored is None:
                return self.scaled(rows)
            plain, turned = rows.chunk(2, dim=1)
            return self.scaled(torch.where(mirrored[:, None, None, None], turned, plain))

        return Prepared(_with_rows(images, torch.cat(rows, dim=1)), x0)

    def located(self, checkpoint: Path, place: str | None = None) -> "Latents":
        """The same, of an autoencoder that has moved. place: where the user says that it is.

        UserError where it is at none of the places that are looked at.
        """
        known = [self.autoencoder, *autoencoder.beside(self.autoencoder, checkpoint)]
        places = [place] if place else known
        for each in places:
            if autoencoder.is_there(each):
                return replace(self, autoencoder=autoencoder.absolute(each))
        raise UserError(
            f"the autoencoder of {checkpoint} is not at {places[0]}: {autoencoder.MISSING}, or put "
            f"it beside the model as {autoencoder.FILE}"
        )

    @staticmethod
    def of(images: Images, place: str) -> "Latents":
        """The latents of such images. UserError where the autoencoder does not take them."""
        network, (channels, height, width) = autoencoder.load(place), images.shape
        if channels != network.channels or height % network.factor or width % network.factor:
            raise UserError(
                f"{place} takes images of {network.channels} channels whose sides are divisible by "
                f"{network.factor}, got {channels} of {height}x{width}: train one on these images, "
                "by python -m teachers.autoencoder"
            )
        rows = encoded(images, place, network.sha256, mirrored=False)
        by_channel = rows.transpose(0, 1).flatten(1).double()
        mean, std = by_channel.mean(1), by_channel.std(1).clamp(min=1e-6)
        kept = autoencoder.absolute(place)
        scale = tuple(mean.tolist()), tuple(std.tolist())
        return Latents(kept, network.sha256, network.factor, *scale)


def encoded(images: Images, place: str, sha256: str, mirrored: bool) -> Tensor:
    """(N, c, h, w) float16 on the CPU: the autoencoder's latents of all images, of each mirrored
    if asked; read from the cache, or made and kept there."""
    side = "mirrored" if mirrored else "plain"
    asked = f"{VERSION} {images.fingerprint()} {sha256} {side}"
    name = hashlib.sha256(asked.encode()).hexdigest()[:16]
    path = machine.CACHE / "latents" / f"{name}.safetensors"

    def make() -> tuple[dict[str, Tensor], dict[str, str]]:
        network = autoencoder.load(place, sha256)
        height, width = (side // network.factor for side in images.shape[1:])
        each = network.latent_channels * height * width * 2
        machine.require_memory("--data", len(images), 2 * len(images) * each)
        numbers = torch.arange(len(images), device=images.device).split(BATCH)
        done = track(
            enumerate(numbers, 1), "latents", lambda item: (item[0], len(numbers), "batches")
        )
        rows = []
        for _, some in done:
            pixels = images.take(some).images
            pixels = pixels.flip(-1) if mirrored else pixels
            rows.append(_encode(place, sha256, pixels.to(machine.this_device())).half().cpu())
        say(f"latents of {len(images):,} images ({side}): {path}")
        return {"latents": torch.cat(rows)}, {}

    return cached(path, make)[0]["latents"]


@torch.no_grad()
def _encode(place: str, sha256: str, images: Tensor) -> Tensor:
    """The autoencoder's own latents of images (B, C, H, W) uint8."""
    network = autoencoder.load(place, sha256).to(images.device)
    return torch.cat([network.encode(part.float() / 127.5 - 1) for part in images.split(BATCH)])


def _with_rows(images: Images, rows: Tensor) -> Images:
    """The source with other rows (N, ...) in the place of its pixels."""
    if isinstance(images, Captioned):
        return Captioned(_with_rows(images.images, rows), images.texts)
    if isinstance(images, InMemory):
        return InMemory(rows, {name: known.cpu() for name, known in images.condition.items()})
    parts = [
        images.take(some).condition
        for some in torch.arange(len(images), device=images.device).split(1024)
    ]
    return InMemory(rows, {name: torch.cat([p[name].cpu() for p in parts]) for name in parts[0]})
