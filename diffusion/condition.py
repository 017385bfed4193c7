"""Conditions: what a network is told beside x_t and t, as named rows with one for each image.

A condition is a mapping of names to tensors (B, ...): a label, a guidance weight, whatever else a
network takes. None says nothing. What a name means is its Kind, which a checkpoint's card holds.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion.console import UserError

Condition = Mapping[str, Tensor]


class Kind(Protocol):
    """One kind of condition: a frozen dataclass, so that a card can hold it."""

    def null(self, rows: Tensor) -> Tensor:
        """Rows of the same shape that tell the network nothing, as guidance needs them."""

    def rows(self, indices: Tensor) -> Tensor:
        """What images number `indices` (B,) are made of where nobody says."""


@dataclass(frozen=True)
class Label:
    """A class, (B,) int64; the one after the last is "unknown"."""

    num_classes: int

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

    low: float
    high: float

    def null(self, rows: Tensor) -> Tensor:
        return torch.ones_like(rows)

    def rows(self, indices: Tensor) -> Tensor:
        return torch.ones(indices.shape, device=indices.device)


KINDS: dict[str, type[Kind]] = {"label": Label, "guidance": Guidance}
Kinds = Mapping[str, Kind]  # a condition's names -> their kinds


def to_json(kinds: Kinds) -> dict[str, dict]:
    """The kinds as a card holds them."""
    names = {kind: name for name, kind in KINDS.items()}
    return {name: {"kind": names[type(kind)], **asdict(kind)} for name, kind in kinds.items()}


def from_json(described: dict[str, dict]) -> dict[str, Kind]:
    """The inverse of to_json. UserError for a kind that is not registered here."""
    kinds = {}
    for name, fields in described.items():
        fields = dict(fields)
        kind = fields.pop("kind")
        if kind not in KINDS:
            raise UserError(
                f"the model takes a condition of kind {kind!r}, expected one of {', '.join(KINDS)}"
            )
        kinds[name] = KINDS[kind](**fields)
    return kinds


def take(condition: Condition | None, index: Tensor | slice) -> Condition | None:
    """Those rows of a condition."""
    if condition is None:
        return None
    return {name: rows[index] for name, rows in condition.items()}


def with_null(condition: Condition, kinds: Kinds) -> Condition:
    """The condition's rows, then as many that say nothing: a batch of twice the size."""
    return {name: torch.cat([rows, kinds[name].null(rows)]) for name, rows in condition.items()}
