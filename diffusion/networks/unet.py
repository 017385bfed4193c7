"""A U-Net for 8x8 to 64x64 images, 0.3 M to 60 M parameters by its configuration alone.

Residual blocks with scale and shift from the noise level, attention at chosen resolutions:
the network of Dhariwal & Nichol 2021 with the order of layers of Ho et al. 2020.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffusion.condition import Condition, Kind, Kinds, Small, Text
from diffusion.console import UserError, check_limits
from diffusion.networks.conditioned import AngleEmbedding, Conditioned, zero
from diffusion.networks.text import CrossAttention, TextInput, Tokens, heads_of

Multipliers = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, max_length=16)
]


@dataclass(frozen=True)
class UNetConfig:
    """The shape of the network, a U-Net, and of the images."""

    channels: Annotated[int, Field(ge=1, le=1024)] = 1
    """1 for grey images, 3 for colour."""
    size: Annotated[int, Field(ge=1, le=65536)] = 8
    """Height and width of the images, in pixels. It must be divisible by the patch, and then by 2
    once for each level but the first."""
    width: Annotated[int, Field(ge=8, le=65536, multiple_of=8)] = 32
    """Channels at the finest level, a multiple of 8. Twice as many take up to four times as
    long."""
    multipliers: Multipliers = (1, 2)
    """Channels of each level as a multiple of --width. Each level after the first halves the
    resolution."""
    blocks: Annotated[int, Field(ge=-1, le=1000)] = 2  # -1: an early network without any
    """Residual blocks per level on the way down; one more on the way up."""
    attention: Annotated[tuple[int, ...], Field(max_length=1000)] = (4,)
    """Resolutions (heights, in patches) with self-attention, which is slow. None after --attention:
    no such layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of activations that training drops at random, against learning images by heart."""
    patch: Annotated[int, Field(ge=1, le=1024)] = 1
    """Side of the squares of pixels that the network takes as one. At 2 it is about four times as
    fast, and fine details are harder."""

    def check(self) -> None:
        """UserError for a shape that no new network can have, or attention at none of its levels.

        A checkpoint's network is not checked: it was trained as it is.
        """
        check_limits(self, LIMITS)
        self.check_levels()
        levels = len(self.multipliers)
        resolutions = [self.size // self.patch // 2**level for level in range(levels)]
        for resolution in self.attention:
            if resolution not in resolutions:
                raise UserError(
                    f"--attention {resolution} is no resolution of this network: at --size "
                    f"{self.size} and --patch {self.patch} its levels have "
                    f"{', '.join(map(str, resolutions))}; name some of these, or none after "
                    "--attention"
                )

    def check_levels(self) -> None:
        """UserError for a size that cannot be halved from level to level."""
        levels = len(self.multipliers)
        coarsest = self.patch * 2 ** (levels - 1)
        if self.size % coarsest:
            raise UserError(
                f"a network of {levels} levels on patches of {self.patch} needs a --size divisible "
                f"by {coarsest}, got {self.size}"
            )

    def build(self, outputs: int, kinds: Kinds) -> "UNet":
        """The network, of so many output channels, that takes conditions of these kinds."""
        self.check_levels()
        return UNet(self, outputs, kinds)

    def smaller(self) -> "UNetConfig":
        """A network for the same images that trains faster on a CPU."""
        most = max(1, self.size // 14)
        patches = (p for p in (4, 2, 1) if self.size % p == 0 and p <= most)
        fitting = (p for p in patches if p == 1 or 2 * self.channels * p**2 <= 32)
        patch = max(self.patch, next(fitting))
        width = min(self.width, max(32, 2 * self.channels * patch**2))
        levels = next(n for n in (2, 1) if self.size // patch % n == 0)
        shape = {"patch": patch, "multipliers": self.multipliers[:levels]}
        return replace(self, width=width, blocks=1, attention=(), **shape)

    def flags(self) -> str:
        """The options of teachers.ddpm that ask for such a network."""
        multipliers, attention = (" ".join(map(str, n)) for n in (self.multipliers, self.attention))
        words = f"--width {self.width} --multipliers {multipliers} --blocks {self.blocks}"
        return f"{words} --patch {self.patch} --attention {attention}".strip()


LIMITS = {
    "channels": ("from 1 to 1024", lambda n: 1 <= n <= 1024),  # of latents more than 3
    "size": ("at least 1", lambda n: n >= 1),
    "width": ("a multiple of 8, from 8 to 65536", lambda n: 8 <= n <= 65536 and n % 8 == 0),
    "multipliers": (
        "one to 16 numbers from 1 to 1024",
        lambda m: 1 <= len(m) <= 16 and min(m) >= 1 and max(m) <= 1024,
    ),
    "blocks": ("from 0 to 1000", lambda n: 0 <= n <= 1000),
    "dropout": ("in [0, 1)", lambda share: 0 <= share < 1),
    "patch": ("at least 1", lambda n: n >= 1),
}


def _norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of at least 8 channels."""
    return nn.GroupNorm(
        max(g for g in range(1, 33) if channels % g == 0 and channels >= 8 * g), channels
    )


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm x))) (1 + scale) + shift))), zero at the start."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels_in), _norm(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over pixels in heads of up to 64 channels, zero at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = heads_of(channels)
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).reshape(b, 3, self.heads, c // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        if x.is_cuda:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:  # the CPU's fused kernel is slower than plain products on so few pixels
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.out(mixed.transpose(-1, -2).reshape(b, c, height, width))


class Reading(nn.Module):
    """Attention of every pixel to a text, zero at the start."""

    def __init__(self, channels: int, width: int):
        """width: of the text's tokens."""
        super().__init__()
        self.norm, self.cross = _norm(channels), CrossAttention(channels, width)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        change = self.cross(self.norm(x).flatten(2).transpose(1, 2), tokens)
        return x + change.transpose(1, 2).reshape(x.shape)


class SmallInput(nn.Module):
    """A smaller image as further channels of x_t, and how noisy it is as an embedding, which
    starts at zero (Ho et al. 2021, section 4)."""

    def __init__(self, kind: Small, width: int):
        super().__init__()
        self.kind, self.angle = kind, AngleEmbedding(width)
        zero(self.angle.mlp[-1])

    def forward(self, x: Tensor, small: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), with the small image's channels behind its own, and (B, width)."""
        if small is None:
            small = self.kind.rows(torch.arange(len(x), device=x.device))
        larger = F.interpolate(small[:, :-1], x.shape[2:], mode="bilinear")
        return torch.cat([x, larger.to(x.dtype)], dim=1), self.angle(small[:, -1, 0, 0])


class Context(NamedTuple):
    """What a U-Net's layers are told beside their input."""

    embedding: Tensor
    """(B, 4 width): the noise level and the conditions, as one vector."""
    tokens: Tokens | None
    """The text's tokens, if the network takes a text."""


class UNet(Conditioned):
    """(x_t (B, C, H, W), t (B,) radians, condition or None) -> prediction (B, outputs, H, W).

    The output layer starts at zero: an untrained network predicts 0. A text's tokens are asked by
    every pixel, where there is self-attention and at the coarsest level, and their mean is embedded
    as a class is. A small image to refine is laid over x_t as further channels.
    """

    TAKES: ClassVar[dict[str, type[Kind]]] = {**Conditioned.TAKES, "text": Text, "small": Small}

    def __init__(self, config: UNetConfig, outputs: int | None = None, kinds: Kinds | None = None):
        embedding, kinds = 4 * config.width, kinds or {}
        super().__init__(embedding, kinds)
        self.config, text = config, kinds.get("text")
        self.text = TextInput(text, embedding) if isinstance(text, Text) else None
        widths = [config.width * m for m in config.multipliers]
        coarsest = config.size // config.patch // 2 ** (len(widths) - 1)

        def block(channels_in: int, channels_out: int, size: int) -> nn.ModuleList:
            layers = [ResidualBlock(channels_in, channels_out, embedding, config.dropout)]
            if size in config.attention:
                layers.append(Attention(channels_out))
            if self.text and size in (*config.attention, coarsest):
                layers.append(Reading(channels_out, embedding))
            return nn.ModuleList(layers)

        small = kinds.get("small")
        self.small = SmallInput(small, embedding) if isinstance(small, Small) else None
        inputs = config.channels + (self.small.kind.channels if self.small else 0)
        values = inputs * config.patch**2  # of a patch
        self.stem = nn.Conv2d(values, config.width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, size, skips = config.width, config.size // config.patch, [config.width]
        for level, width in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(channels, channels, 3, padding=1, stride=2))
                size //= 2
                skips.append(channels)
            for _ in range(config.blocks):
                self.down.append(block(channels, width, size))
                channels = width
                skips.append(channels)
        self.middle = nn.ModuleList(
            [*block(channels, channels, size), *block(channels, channels, size)]
        )
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(block(channels + skips.pop(), width, size))
                channels = width
            if level:
                self.up.append(nn.Conv2d(channels, channels, 3, padding=1))
                size *= 2
        self.norm = _norm(channels)
        outputs = config.patch**2 * (outputs or config.channels)
        self.head = zero(nn.Conv2d(channels, outputs, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | None = None,
    ) -> Tensor:
        h, skips, context = self.encode(x, t, condition)
        for layer in self.up:
            if isinstance(layer, nn.ModuleList):
                h = _apply(layer, torch.cat([h, skips.pop()], dim=1), context)
            else:
                h = layer(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.config.patch)

    def encode(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | None = None,
    ) -> tuple[Tensor, list[Tensor], Context]:
        """The way down: the middle's output (B, C', H', W'), what the way up takes over, and what
        its layers are told."""
        condition = condition or {}
        embedding = self.embedding(t, condition)
        tokens = self.text(condition.get("text"), x.shape[0]) if self.text else None
        if tokens:
            embedding = embedding + tokens.mean()
        if self.small:
            x, augmentation = self.small(x, condition.get("small"))
            embedding = embedding + augmentation
        context = Context(F.silu(embedding), tokens)
        h = self.stem(F.pixel_unshuffle(x, self.config.patch))
        skips = [h]
        for layer in self.down:
            h = _apply(layer, h, context)
            skips.append(h)
        return _apply(self.middle, h, context), skips, context


def _apply(layers: nn.Module, h: Tensor, context: Context) -> Tensor:
    for layer in layers if isinstance(layers, nn.ModuleList) else [layers]:
        if isinstance(layer, ResidualBlock):
            h = layer(h, context.embedding)
        elif isinstance(layer, Reading):
            assert context.tokens
            h = layer(h, context.tokens)
        else:
            h = layer(h)
    return h
