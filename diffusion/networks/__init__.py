"""Networks by name. They know neither schedules nor losses.

A network is a file: a config of its shape alone, a frozen dataclass that builds it, and an entry
here.
"""

from typing import Protocol

from torch import nn

from diffusion import registry
from diffusion.condition import Kinds
from diffusion.networks.diffusers import DiffusersConfig
from diffusion.networks.unet import UNet, UNetConfig
from diffusion.registry import Entry

__all__ = ["NETWORKS", "NetworkConfig", "UNet", "UNetConfig", "from_json", "to_json"]


class NetworkConfig(Entry, Protocol):
    """The shape of a network, a frozen dataclass."""

    @property
    def channels(self) -> int:
        """The channels of an x0."""

    @property
    def size(self) -> int:
        """Its height and its width."""

    def check(self) -> None:
        """UserError for a shape that no new network can have."""

    def build(self, outputs: int, kinds: Kinds) -> nn.Module:
        """(x_t (B, C, H, W), t (B,) float32 radians, condition or None) -> (B, outputs, H, W)."""


NETWORKS: dict[str, type[NetworkConfig]] = {
    "unet": UNetConfig,
    "diffusers": DiffusersConfig,
}


def to_json(config: NetworkConfig) -> dict:
    """The network as a card names it."""
    return registry.to_json(config, NETWORKS)


def from_json(described: dict) -> NetworkConfig:
    """The inverse of to_json. UserError for a network that is not registered here."""
    return registry.from_json(described, NETWORKS, "net", "the model's network is")
