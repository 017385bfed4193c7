"""Networks by name. They know neither schedules nor losses.

A network is a file: a config of its shape alone, a frozen dataclass that builds it, and an entry
here.
"""

from dataclasses import asdict, fields
from typing import Protocol

from torch import nn

from diffusion.condition import Kinds
from diffusion.console import UserError
from diffusion.networks.unet import UNet, UNetConfig

__all__ = ["NETWORKS", "NetworkConfig", "UNet", "UNetConfig", "from_json", "to_json"]


class NetworkConfig(Protocol):
    """The shape of a network, a frozen dataclass.

    Where it has a field `dropout` above 0, its network takes a generator of that name in training.
    """

    channels: int
    size: int

    def check(self) -> None:
        """UserError for a shape that no new network can have."""

    def build(self, outputs: int, kinds: Kinds) -> nn.Module:
        """(x_t (B, C, H, W), t (B,) float32 radians, condition or None) -> (B, outputs, H, W)."""


NETWORKS: dict[str, type[NetworkConfig]] = {"unet": UNetConfig}


def to_json(config: NetworkConfig) -> dict:
    """The network as a card names it."""
    name = next(name for name, kind in NETWORKS.items() if type(config) is kind)
    return {"name": name, **asdict(config)}


def from_json(described: dict) -> NetworkConfig:
    """The inverse of to_json. UserError for a network that is not registered here."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
    name = values.pop("name")
    if name not in NETWORKS:
        raise UserError(f"the model's network is {name!r}, expected one of {', '.join(NETWORKS)}")
    unknown = values.keys() - {field.name for field in fields(NETWORKS[name])}
    if unknown:
        raise UserError(f"the network {name} has no {', '.join(sorted(unknown))}")
    return NETWORKS[name](**values)
