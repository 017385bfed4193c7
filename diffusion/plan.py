"""Plan: how a model is called to make an image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, TypeVar

import torch
from pydantic import AfterValidator, Field, with_config
from torch import Tensor

from diffusion.typed import CLOSED, Text

MOST_STEPS = 10_000  # of a plan: ten times a teacher's
Ascending = TypeVar("Ascending", bound=Sequence[float])


def ascending(angles: Ascending) -> Ascending:
    """The angles. ValueError for those that do not ascend from 0."""
    if angles[0] != 0 or any(s >= t for s, t in pairwise(angles)):
        raise ValueError("the angles should ascend from 0")
    return angles


Angle = Annotated[float, Field(ge=0, le=math.pi / 2 + 1e-9)]
SEVERAL = Field(min_length=2, max_length=MOST_STEPS + 1)
Angles = Annotated[tuple[Angle, ...], SEVERAL, AfterValidator(ascending)]
MOST_GUIDANCE = 1e6
Weight = Annotated[float, Field(ge=0, le=MOST_GUIDANCE)]


@with_config(CLOSED)
@dataclass(frozen=True)
class Plan:
    """A sampler, the angles that it calls the network at, and how strongly it is guided.

    A value: a card, a row of a table and the key of a measurement all hold it.
    """

    sampler: Text
    angles: Angles
    """The N + 1 angles of N steps in radians, ascending from 0, as every list of angles here."""
    guidance: Weight | None = None
    """The weight of the guidance; None and 1 for none."""
    note: str = field(default="", compare=False)
    """Where the angles are from, if they are not the model's own; no part of what the plan is."""

    @property
    def num_steps(self) -> int:
        return len(self.angles) - 1

    def on(self, device: torch.device) -> Tensor:
        """The angles, (N + 1,) float64 on the device, made once."""
        return _tensor(self.angles, device)

    def guided(self, weight: float | None) -> "Plan":
        """The plan at another guidance weight; None leaves it as it is."""
        return self if weight is None else replace(self, guidance=float(weight))


@lru_cache(maxsize=256)
def _tensor(angles: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(angles, dtype=torch.float64, device=device)


def plan(sampler: str, angles: Tensor, guidance: float | None = None, note: str = "") -> Plan:
    """A plan of angles in a tensor, ascending from 0."""
    return Plan(sampler, tuple(angles.tolist()), guidance, note)
