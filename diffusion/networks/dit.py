"""A transformer over patches of the image: DiT with adaLN-zero, Peebles & Xie 2023.

Each patch is a token; the angle, the class and the guidance weight scale, shift and gate what every
block does; a text is read by cross-attention.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffusion.condition import Condition, Kind, Kinds, Text
from diffusion.console import UserError, check_limits
from diffusion.networks.conditioned import Conditioned, zero
from diffusion.networks.text import CrossAttention, TextInput, Tokens


@dataclass(frozen=True)
class DiTConfig:
    """The shape of the network, a transformer over patches, and of the images."""

    channels: Annotated[int, Field(ge=1, le=1024)] = 1
    """1 for grey images, 3 for colour."""
    size: Annotated[int, Field(ge=1, le=65536)] = 8
    """Height and width of the images, in pixels. It must be divisible by the patch."""
    width: Annotated[int, Field(ge=4, le=65536, multiple_of=4)] = 128
    """Numbers that each patch is held in, a multiple of 4 and of --heads."""
    depth: Annotated[int, Field(ge=1, le=1000)] = 4
    """How many blocks, each of attention and of a perceptron, follow one another."""
    heads: Annotated[int, Field(ge=1, le=65536)] = 4
    """Into how many parts each attention divides the width; 32 to 64 numbers each are usual."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of activations that training drops at random, against learning images by heart."""
    patch: Annotated[int, Field(ge=1, le=1024)] = 2
    """Side of the squares of pixels that the network takes as one. At twice the side it is at least
    four times as fast, and fine details are harder."""

    def check(self) -> None:
        """UserError for a shape that no network can have."""
        check_limits(self, LIMITS)
        for whole, part in (("size", "patch"), ("width", "heads")):
            number, divisor = getattr(self, whole), getattr(self, part)
            if number % divisor:
                raise UserError(
                    f"--{whole} must be divisible by --{part} {divisor} in a DiT, got {number}"
                )

    def build(self, outputs: int, kinds: Kinds) -> "DiT":
        """The network, of so many output channels, that takes conditions of these kinds."""
        self.check()
        return DiT(self, outputs, kinds)


LIMITS = {
    "channels": ("1 or 3", lambda n: n in (1, 3)),
    "size": ("at least 1", lambda n: n >= 1),
    "width": ("a multiple of 4, from 4 to 65536", lambda n: 4 <= n <= 65536 and n % 4 == 0),
    "depth": ("from 1 to 1000", lambda n: 1 <= n <= 1000),
    "heads": ("at least 1", lambda n: n >= 1),
    "dropout": ("in [0, 1)", lambda share: 0 <= share < 1),
    "patch": ("at least 1", lambda n: n >= 1),
}


def positions(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of a patch's row, then of its column.

    Half of the numbers for each, at width / 4 frequencies from 1 down to nearly 1e-4 (Vaswani et
    al. 2017, section 3.5).
    """
    frequencies = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    phase = torch.arange(side)[:, None] * frequencies
    line = torch.cat([phase.sin(), phase.cos()], dim=1).float()
    row, column = line[:, None].expand(-1, side, -1), line.expand(side, -1, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1)


class Attention(nn.Module):
    """What each of the tokens (B, N, W) reads in all of them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        if q.is_cuda or q.dtype != torch.bfloat16:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:  # a CPU's fused kernel takes six times as long for its gradient in bfloat16
            mixed = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each scaled, shifted and gated by the embedding: adaLN-zero.

    At the start every gate is zero, and so is what is read in a text: the block is the identity.
    """

    def __init__(self, width: int, heads: int, dropout: float, text: bool):
        super().__init__()
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.attention = Attention(width, heads)
        self.reading = CrossAttention(width, width) if text else None
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU("tanh"),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
        )

    def forward(self, h: Tensor, embedding: Tensor, text: Tokens | None) -> Tensor:
        first, second = self.modulation(embedding)[:, None].unflatten(-1, (2, 3, -1)).unbind(2)
        shift, scale, gate = first.unbind(2)
        h = h + gate * self.attention(modulated(h, shift, scale))
        if self.reading and text:
            h = h + self.reading(F.layer_norm(h, h.shape[-1:]), text)
        shift, scale, gate = second.unbind(2)
        return h + gate * self.mlp(modulated(h, shift, scale))


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The tokens (B, N, W), each normed, then scaled and shifted (B, 1, W)."""
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


class DiT(Conditioned):
    """(x_t (B, C, H, W), t (B,) radians, condition or None) -> prediction (B, outputs, H, W).

    The output layer starts at zero: an untrained network predicts 0. A text's tokens are read by
    every patch in every block, and their mean is embedded as a class is.
    """

    TAKES: ClassVar[dict[str, type[Kind]]] = {**Conditioned.TAKES, "text": Text}

    def __init__(self, config: DiTConfig, outputs: int | None = None, kinds: Kinds | None = None):
        kinds, width = kinds or {}, config.width
        super().__init__(width, kinds)
        self.config = config
        self.side, values = config.size // config.patch, config.patch**2
        self.stem = nn.Linear(config.channels * values, width)
        self.register_buffer("positions", positions(self.side, width), persistent=False)
        text = kinds.get("text")
        self.text = TextInput(text, width) if isinstance(text, Text) else None
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.dropout, self.text is not None)
            for _ in range(config.depth)
        )
        self.modulation = zero(nn.Linear(width, 2 * width))
        self.head = zero(nn.Linear(width, (outputs or config.channels) * values))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        h, embedding, text = self.encode(x, t, condition)
        h = h.flatten(2).mT
        for block in self.blocks[len(self.blocks) // 2 :]:
            h = block(h, embedding, text)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=-1)
        patches = self.head(modulated(h, shift, scale)).mT.unflatten(2, (self.side, self.side))
        return F.pixel_shuffle(patches, self.config.patch)

    def encode(
        self, x: Tensor, t: Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, Tensor, Tokens | None]:
        """The first half of the blocks: their output (B, W, H', W'), the embedding and the text."""
        condition = condition or {}
        embedding = self.embedding(t, condition)
        text = self.text(condition.get("text"), x.shape[0]) if self.text else None
        if text:
            embedding = embedding + text.mean()
        embedding = F.silu(embedding)
        h = self.stem(F.pixel_unshuffle(x, self.config.patch).flatten(2).mT) + self.positions
        for block in self.blocks[: len(self.blocks) // 2]:
            h = block(h, embedding, text)
        return h.mT.unflatten(2, (self.side, self.side)), embedding, text
