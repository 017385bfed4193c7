"""Conditions: a network's inputs beside x_t and t, as named rows with one for each image.

A condition is a mapping of names to tensors (B, ...): a label, a guidance weight, whatever else a
network takes. None says nothing. What a name means is its Kind, which a checkpoint's card holds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffusion import registry, typed
from diffusion.registry import Entry

Condition = Mapping[str, Tensor]


class Kind(Entry, Protocol):
    """One kind of condition: a frozen dataclass, so that a card can hold it."""

    def null(self, rows: Tensor) -> Tensor:
        """Rows of the same shape that tell the network nothing, as guidance needs them."""

    def rows(self, indices: Tensor) -> Tensor:
        """The rows of images number `indices` (B,) where the user gives none."""


@dataclass(frozen=True)
class Label:
    """A class, (B,) int64; the one after the last is "unknown"."""

    num_classes: Annotated[int, Field(ge=1, le=10**6)]

    def null(self, rows: Tensor) -> Tensor:
        return torch.full_like(rows, self.num_classes)

    def rows(self, indices: Tensor) -> Tensor:
        """Every class in turn."""
        return indices % self.num_classes


@dataclass(frozen=True)
class Guidance:
    """A guidance weight as an input, (B,) float32 (Meng et al. 2023).

    1 is no guidance; where a paper writes (1 + w) eps_cond - w eps, this is 1 + w.
    """

    low: Annotated[float, Field(ge=0, le=1e6)]
    high: Annotated[float, Field(ge=0, le=1e6)]

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low should be at most high {self.high:g}")

    def null(self, rows: Tensor) -> Tensor:
        return torch.ones_like(rows)

    def rows(self, indices: Tensor) -> Tensor:
        return torch.ones(indices.shape, device=indices.device)


@dataclass(frozen=True)
class Text:
    """A text as its tokens' embeddings, (B, L, D) float32.

    A row of zeros is padding (`is_token` tells), and a text of padding alone says nothing: a
    network puts its own null in the place of such a text.
    """

    tokens: Annotated[int, Field(ge=1, le=65536)]
    """L: a longer text is cut, a shorter one padded."""
    width: Annotated[int, Field(ge=1, le=65536)]
    """D."""
    encoder: typed.Text
    """The name of the text encoder."""
    sha256: typed.Sha256
    """Identity of the encoder's weights and vocabulary."""
    from_images: ClassVar[bool] = True  # no text is usual: see of_images

    def null(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)

    def rows(self, indices: Tensor) -> Tensor:
        """Texts that say nothing."""
        return torch.zeros(len(indices), self.tokens, self.width, device=indices.device)


def is_token(text: Tensor) -> Tensor:
    """(B, L) bool, which rows of texts (B, L, D) are tokens, not padding."""
    return text.ne(0).any(-1)


@dataclass(frozen=True)
class Small:
    """A smaller version of the image, to be refined: (B, C + 1, s, s) float32.

    The first C channels are cos(a) y + sin(a) eps, where y is the small image of about unit
    variance: noise makes what an earlier model got wrong look like what training shows (Ho et al.
    2021, section 4). The last channel is the angle a: 0 for a clean one, pi/2 for one that says
    nothing.
    """

    channels: Annotated[int, Field(ge=1, le=1024)]
    size: Annotated[int, Field(ge=1, le=65536)]
    """s, its height and width."""
    mean: Annotated[float, Field(ge=0, le=255)]
    """Grey level that becomes 0."""
    std: Annotated[float, Field(ge=1e-6, le=255)]
    """Grey levels of one unit."""
    most: Annotated[float, Field(ge=0, le=math.pi / 2)] = math.pi / 4
    """The largest a in training, where it is uniform from 0."""
    from_images: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def null(self, rows: Tensor) -> Tensor:
        noise = rows.new_full(rows.shape[:1], math.pi / 2)
        return self.noisy(torch.zeros_like(rows[:, :-1]), noise)

    def rows(self, indices: Tensor) -> Tensor:
        """Small images that say nothing."""
        nothing = torch.zeros(len(indices), self.channels + 1, *self.shape[1:])
        return self.null(nothing.to(indices.device))

    def reduced(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) uint8 as small ones, uint8: means of squares of pixels."""
        small = F.adaptive_avg_pool2d(images.float(), self.size)
        return small.round().to(torch.uint8)

    def clean(self, small: Tensor) -> Tensor:
        """Rows of small images (B, C, s, s) uint8, without noise."""
        y = (small.float() - self.mean) / self.std
        return self.noisy(y, y.new_zeros(y.shape[:1]))

    def of(self, images: Tensor) -> Tensor:
        """Rows, without noise, of images (B, C, H, W) uint8."""
        return self.clean(self.reduced(images))

    def noisy(self, y: Tensor, angle: Tensor, noise: Tensor | None = None) -> Tensor:
        """Rows of small images y (B, C, s, s), turned by these angles (B,) to the noise."""
        turn = angle[:, None, None, None].expand(-1, 1, *y.shape[2:])
        turned = turn.cos() * y if noise is None else turn.cos() * y + turn.sin() * noise
        return torch.cat([turned, turn], dim=1)

    def trained(
        self, rows: Tensor, mirrored: Tensor | None, share: Tensor, noise: Tensor
    ) -> Tensor:
        """An image's clean rows as training shows them: noisy at a share (B,) of the largest angle,
        and mirrored with the image."""
        y = rows[:, :-1]
        if mirrored is not None:
            y = torch.where(mirrored[:, None, None, None], y.flip(-1), y)
        return self.noisy(y, share * self.most, noise)


KINDS: dict[str, type[Kind]] = {
    "label": Label,
    "guidance": Guidance,
    "text": Text,
    "small": Small,
}
Kinds = Mapping[str, Kind]  # a condition's names -> their kinds


def to_json(kinds: Kinds) -> dict[str, dict]:
    """The kinds as a card holds them."""
    return {name: registry.to_json(kind, KINDS, "kind") for name, kind in kinds.items()}


def from_json(described: dict[str, dict]) -> dict[str, Kind]:
    """The inverse of to_json. UserError for a kind that is not registered here."""
    says = "the model takes a condition of kind"
    return {
        name: registry.from_json(each, KINDS, f"condition.{name:.80}", says, "kind")
        for name, each in described.items()
    }


def of_images(kinds: Kinds) -> list[str]:
    """The names whose rows are an image's own, and none usual: images that shall resemble real
    ones are told those of real ones. Their kinds have `from_images`."""
    return [name for name, kind in kinds.items() if getattr(kind, "from_images", False)]


def usual(kinds: Kinds, indices: Tensor, given: Condition | None = None) -> dict[str, Tensor]:
    """The condition of images number `indices` (B,): what is given, and for the rest what its kind
    has for them. A guidance weight is no part of it."""
    given = given or {}
    return {
        name: given[name].to(indices.device) if name in given else kind.rows(indices)
        for name, kind in kinds.items()
        if not isinstance(kind, Guidance)
    }


def take(condition: Condition | None, index: Tensor | slice) -> Condition | None:
    """The condition's rows at these indices."""
    if condition is None:
        return None
    return {name: rows[index] for name, rows in condition.items()}


INSTEAD = "instead of "  # and a condition's name: rows that guidance leads away from


def with_null(condition: Condition, kinds: Kinds) -> Condition:
    """The condition's rows, then as many that say nothing: a batch of twice the size.

    Rows named INSTEAD and a condition's name, such as a negative prompt's, come in their stead.
    """
    return {
        name: torch.cat([rows, condition.get(INSTEAD + name, kinds[name].null(rows))])
        for name, rows in condition.items()
        if not name.startswith(INSTEAD)
    }
