"""What networks share that take a text: its tokens with a mask and a learned null, and attention
to them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.condition import Text, is_token


class Tokens(NamedTuple):
    """Texts as a network reads them."""

    values: Tensor
    """(B, L, width)."""
    count: Tensor
    """(B, L) bool: which are not padding. At least one in each text."""

    def mean(self) -> Tensor:
        """(B, width), over those that are not padding."""
        share = self.count / self.count.sum(1, keepdim=True)
        return (self.values * share[..., None]).sum(1)


class TextInput(nn.Module):
    """Texts (B, L, D) -> tokens of a network's width.

    In the place of a text that says nothing stands one learned token.
    """

    def __init__(self, kind: Text, width: int):
        super().__init__()
        self.kind = kind
        self.norm, self.project = nn.LayerNorm(kind.width), nn.Linear(kind.width, width)
        self.null = nn.Parameter(torch.randn(width))

    def forward(self, text: Tensor | None, batch: int) -> Tokens:
        """text: None says nothing, in any of `batch` images."""
        if text is None:
            text = self.null.new_zeros(batch, 1, self.kind.width)
        count = is_token(text)
        first = torch.arange(text.shape[1], device=text.device) == 0
        null = first & ~count.any(1, keepdim=True)
        values = self.project(self.norm(text))
        values = torch.where(null[..., None], self.null.to(values.dtype), values)
        return Tokens(values, count | null)


def heads_of(channels: int) -> int:
    """Heads of up to 64 channels that divide them."""
    return next(n for n in range(math.ceil(channels / 64), channels + 1) if channels % n == 0)


class CrossAttention(nn.Module):
    """x (B, N, channels) asks tokens (Vaswani et al. 2017, section 3.2.3), padding left out: what x
    changes by, zero at the start.

    In plain products, which have a forward-mode derivative on every device.
    """

    def __init__(self, channels: int, width: int):
        """width: of the tokens."""
        super().__init__()
        self.heads = heads_of(channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(width, 2 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        kv = self.kv(tokens.values).reshape(b, -1, 2, self.heads, c // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        scores = scores.masked_fill(~tokens.count[:, None, None], -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))
