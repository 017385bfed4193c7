"""Networks by name. They know neither schedules nor losses.

A network is a file: a config of its shape alone, a frozen dataclass that builds it, and an entry
here.
"""

from dataclasses import MISSING, Field, fields
from typing import Protocol

from torch import nn

from diffusion import registry
from diffusion.condition import Kinds
from diffusion.console import UserError
from diffusion.networks.diffusers import DiffusersConfig
from diffusion.networks.dit import DiT, DiTConfig
from diffusion.networks.edm import EDMConfig
from diffusion.networks.module import MODULE, ModuleConfig, trust
from diffusion.networks.unet import UNet, UNetConfig
from diffusion.registry import Entry

__all__ = [
    "NETWORKS",
    "DiT",
    "DiTConfig",
    "ModuleConfig",
    "NetworkConfig",
    "UNet",
    "UNetConfig",
    "from_json",
    "named",
    "to_json",
    "trust",
]


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
    "dit": DiTConfig,
    "module": ModuleConfig,
    "diffusers": DiffusersConfig,
    "edm": EDMConfig,
}


def named(name: str, channels: int, size: int) -> NetworkConfig:
    """The network that the user names, a registered one or module:PACKAGE.MODULE:CLASS, for images
    of these channels and this size."""
    if name.startswith(MODULE):
        place = name.removeprefix(MODULE)
        trust(place)
        return ModuleConfig(place, channels, size)
    # a network that needs to be told more is none to be had by its name alone
    names = [each for each, config in NETWORKS.items() if all(map(_has_default, fields(config)))]
    if name not in names:
        expected = f"{', '.join(names)} or {MODULE}PACKAGE.MODULE:CLASS"
        raise UserError(f"--net must be {expected}, got {name!r:.80}")
    return from_json({"name": name, "channels": channels, "size": size})


def _has_default(field: Field) -> bool:
    return (field.default, field.default_factory) != (MISSING, MISSING)


def to_json(config: NetworkConfig) -> dict:
    """The network as a card names it."""
    return registry.to_json(config, NETWORKS)


def from_json(described: dict) -> NetworkConfig:
    """The inverse of to_json. UserError for a network that is not registered here."""
    return registry.from_json(described, NETWORKS, "net", "the model's network is")
