"""Plan: how a model is called to make an image."""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """A sampler, the angles that it calls the network at, and how strongly it is guided.

    A value: a card, a row of a table and the key of a measurement all hold it.
    """

    sampler: str
    angles: tuple[float, ...]
    """The N + 1 angles of N steps in radians, ascending from 0, as every list of angles here."""
    guidance: float | None = None
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
