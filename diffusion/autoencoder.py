"""Autoencoders: networks that squeeze images to few numbers, and make images of these again.

Ours is that of Rombach et al. 2022 made small: convolutions, a normal posterior with a diagonal
variance. Those of diffusers are read from the folders that its save_pretrained wrote.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from diffusion.checkpoint import weights_sha256
from diffusion.console import UserError, first_line
from diffusion.dry import check_fit
from diffusion.files import load_tensors
from diffusion.networks.diffusers import library
from diffusion.typed import checked, parse

FILE = "autoencoder.safetensors"  # in the folder of a run of teachers.autoencoder
FOREIGN = "diffusers:"  # before a folder that diffusers' save_pretrained wrote
KINDS = ("AutoencoderKL", "AutoencoderTiny")  # those of diffusers that are read


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an autoencoder."""

    channels: Annotated[int, Field(ge=1, le=1024)] = 3
    """Channels of the images: 1 for grey ones, 3 for colour."""
    factor: Annotated[int, Field(ge=1, le=256)] = 4
    """How many times smaller a side becomes: a power of 2."""
    latent_channels: Annotated[int, Field(ge=1, le=1024)] = 4
    """Numbers that are kept of each square of factor x factor pixels."""
    width: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] = 32
    """Channels of the finest level; each level below has twice as many."""
    patch: Annotated[int, Field(ge=1, le=256)] = 2
    """Side of the squares of pixels that the network takes as one: a power of 2, at most the
    factor. At 2 it is about four times as fast."""

    @property
    def levels(self) -> int:
        """How often it halves the resolution."""
        return int(math.log2(self.factor // self.patch))

    def check(self) -> None:
        """UserError for a shape that no autoencoder can have."""
        for name, value in (("factor", self.factor), ("patch", self.patch)):
            if value < 1 or value & (value - 1):
                raise UserError(f"--{name} must be a power of 2, got {value}")
        if self.patch > self.factor:
            raise UserError(f"--patch must be at most --factor {self.factor}, got {self.patch}")
        if self.width < 8 or self.width % 8:
            raise UserError(f"--width must be a multiple of 8, got {self.width}")
        if self.latent_channels < 1:
            raise UserError(f"--latent-channels must be at least 1, got {self.latent_channels}")


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x)))))."""

    def __init__(self, channels: int):
        super().__init__()
        layers = [nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        again = [nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers, *again)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Posterior(NamedTuple):
    """What the encoder says of an image's latents: a normal distribution of each."""

    mean: Tensor
    """(B, latent channels, h, w)."""
    log_variance: Tensor

    def sample(self, random: torch.Generator) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=random, device=self.mean.device)
        return self.mean + (self.log_variance / 2).exp() * noise

    def kl(self) -> Tensor:
        """(B,): nats from the standard normal distribution, summed over an image's latents."""
        variance = self.log_variance.exp()
        return (self.mean.square() + variance - 1 - self.log_variance).flatten(1).sum(1) / 2


class Autoencoder(nn.Module):
    """Images (B, C, H, W) from -1 to 1 -> latents (B, c, H / factor, W / factor), and back."""

    channels: int
    factor: int
    latent_channels: int
    sha256: str

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config, self.sha256 = config, ""
        self.channels, self.factor = config.channels, config.factor
        self.latent_channels = config.latent_channels
        width, values = config.width, config.channels * config.patch**2
        widths = [width * 2**level for level in range(config.levels + 1)]
        down: list[nn.Module] = [nn.PixelUnshuffle(config.patch), nn.Conv2d(values, width, 3, 1, 1)]
        up: list[nn.Module] = []
        for fine, coarse in pairwise(widths):
            down += [Block(fine), nn.Conv2d(fine, coarse, 3, stride=2, padding=1)]
            up = [nn.Upsample(scale_factor=2), nn.Conv2d(coarse, fine, 3, 1, 1), Block(fine), *up]
        last, latents = widths[-1], config.latent_channels
        down += [Block(last), Block(last), *_ending(last, 2 * latents)]
        begin = [nn.Conv2d(latents, last, 3, padding=1), Block(last), Block(last)]
        self.down = nn.Sequential(*down)
        self.up = nn.Sequential(*begin, *up, *_ending(width, values), nn.PixelShuffle(config.patch))

    def posterior(self, images: Tensor) -> Posterior:
        mean, log_variance = self.down(images).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30, 20))

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean."""
        return self.posterior(images).mean

    def decode(self, latents: Tensor) -> Tensor:
        return self.up(latents)

    def forward(self, images: Tensor, random: torch.Generator) -> tuple[Tensor, Posterior]:
        """Images made again of latents that are drawn, and what they were drawn from."""
        posterior = self.posterior(images)
        return self.up(posterior.sample(random)), posterior


def _ending(channels: int, outputs: int) -> list[nn.Module]:
    return [nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, outputs, 3, padding=1)]


class Foreign(nn.Module):
    """An autoencoder of diffusers, with our names for what it does."""

    network: Any
    channels: int
    factor: int
    latent_channels: int
    sha256: str

    def __init__(self, network: Any, sha256: str):
        super().__init__()
        self.network, self.sha256 = network, sha256
        config = network.config
        self.channels, self.latent_channels = config.in_channels, config.latent_channels
        names = "block_out_channels", "encoder_block_out_channels"
        levels = next(len(config[name]) for name in names if name in config)
        self.factor = 2 ** (levels - 1)

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean, of an AutoencoderKL; the latents, of an AutoencoderTiny."""
        coded = self.network.encode(images)
        return coded.latents if hasattr(coded, "latents") else coded.latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents).sample


CONFIG = TypeAdapter(AutoencoderConfig)
MISSING = "name with --autoencoder where it is now"


def absolute(place: str) -> str:
    """The place of an autoencoder whatever the current folder."""
    prefix, path = _parted(place)
    return prefix + str(Path(path).resolve())


def is_place(text: str) -> bool:
    """Whether it names an autoencoder, there or not."""
    return text.startswith(FOREIGN) or Path(text).exists()


def is_there(place: str) -> bool:
    prefix, path = _parted(place)
    return (Path(path) / "config.json").is_file() if prefix else _file(Path(path)).is_file()


def beside(place: str, checkpoint: Path) -> list[str]:
    """Where an autoencoder that is not in its place may have been put for this checkpoint: beside
    it, as autoencoder.safetensors or as a folder autoencoder, or in a folder around it."""
    prefix, _ = _parted(place)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    around = [folder, *folder.resolve().parents[:2]]
    own = [] if prefix else [str(each / FILE) for each in around]
    return own + [prefix + str(each / "autoencoder") for each in around]


@lru_cache(maxsize=4)
def load(place: str, sha256: str = "") -> "Autoencoder | Foreign":
    """The autoencoder, frozen: a run of teachers.autoencoder, or diffusers:FOLDER.

    sha256: its identity, if it is known. UserError where it is not there, not whole, or another.
    """
    prefix, path = _parted(place)
    if not is_there(place):
        expected = "config.json" if prefix else FILE
        raise UserError(f"there is no autoencoder at {path} (no {expected}): {MISSING}")
    network = _foreign(Path(path)) if prefix else _ours(_file(Path(path)))
    if sha256 and network.sha256 != sha256:
        raise UserError(
            f"{path} holds another autoencoder (sha256 {network.sha256[:8]}) than the model's "
            f"latents are of ({sha256[:8]}): {MISSING}"
        )
    return network.eval().requires_grad_(False)


def _parted(place: str) -> tuple[str, str]:
    """(diffusers: or nothing, the path)."""
    foreign = place.startswith(FOREIGN)
    return (FOREIGN, place.removeprefix(FOREIGN)) if foreign else ("", place)


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _ours(file: Path) -> Autoencoder:
    weights, metadata = load_tensors(file)
    try:
        described = parse(metadata["autoencoder"])["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} was not written by teachers.autoencoder ({error!r})") from error
    config = checked(CONFIG, described, f"{file}: its config")
    config.check()
    check_fit(lambda: Autoencoder(config), weights)
    network = Autoencoder(config)
    network.load_state_dict(weights)
    network.sha256 = _identity(asdict(config), weights)
    return network


def _foreign(folder: Path) -> Foreign:
    try:
        config = json.loads((folder / "config.json").read_text())
        name = config["_class_name"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} describes no network ({error!r})") from error
    if name not in KINDS:
        raise UserError(f"{folder} holds a {name!r:.80}, expected one of {', '.join(KINDS)}")
    try:
        network, report = getattr(library(), name).from_pretrained(
            folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:  # a wrong file fails in as many ways as there are files
        raise UserError(
            f"{folder}: diffusers cannot read the network ({first_line(error):.200})"
        ) from error
    if report["missing_keys"]:  # which diffusers would leave at random
        raise UserError(f"{folder} lacks weights such as {sorted(report['missing_keys'])[0]}")
    return Foreign(network, _identity({"class": name}, network.state_dict()))


def _identity(config: dict, weights: dict[str, Tensor]) -> str:
    """sha256 of an autoencoder's shape and weights."""
    return hashlib.sha256(f"{json.dumps(config)} {weights_sha256(weights)}".encode()).hexdigest()


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """(B,): peak signal-to-noise ratio in decibels of images (B, ...) from 0 to 255."""
    error = (images.double() - others.double()).square().flatten(1).mean(1)
    return 10 * (255**2 / error.clamp(min=1e-10)).log10()
