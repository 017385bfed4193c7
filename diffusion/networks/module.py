"""A torch module of the user's own as the network, by its name: `--net module:mynets:MLP`.

A card that names such a network names code. It is imported only where the user allows it.
"""

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from tyro.conf import Suppress

from diffusion import typed
from diffusion.condition import Kinds
from diffusion.console import UserError, first_line

MODULE = "module:"  # before the place of the user's own class
VARIABLE = "FEWSTEP_TRUST"  # of the environment: modules and packages, with commas between them
_named: set[str] = set()  # modules that the user named himself, in this process


@dataclass(frozen=True)
class ModuleConfig:
    """The shape of the images, and what your own network is built with."""

    place: Suppress[typed.Text]
    """PACKAGE.MODULE:CLASS."""
    channels: Annotated[int, Field(ge=1, le=1024)] = 1
    """1 for grey images, 3 for colour."""
    size: Annotated[int, Field(ge=1, le=65536)] = 8
    """Height and width of the images, in pixels."""
    arguments: Annotated[tuple[typed.Text, ...], Field(max_length=1000)] = ()
    """Arguments of the network, such as width=64 depth=2. Beside them it is given those that it
    names of channels, size, outputs (the channels of its output) and kinds (its conditions)."""

    def check(self) -> None:
        """UserError for a class that cannot be had, or that does not take these arguments."""
        names = inspect.signature(self.network()).parameters
        if not any(each.kind is each.VAR_KEYWORD for each in names.values()):
            for name in self.keywords():
                if name not in names:
                    takes = ", ".join(names) or "no arguments"
                    raise UserError(f"--arguments {name}: {self.place} takes {takes}")

    def build(self, outputs: int, kinds: Kinds) -> nn.Module:
        """The network, of so many output channels, that takes conditions of these kinds."""
        network = self.network()
        offered = {
            "channels": self.channels,
            "size": self.size,
            "outputs": outputs,
            "kinds": dict(kinds),
        }
        names = inspect.signature(network).parameters
        given = {name: value for name, value in offered.items() if name in names}
        return network(**given, **self.keywords())

    def keywords(self) -> Mapping[str, Any]:
        """The arguments by name; a value that is no JSON is a text."""
        return dict(_keyword(each) for each in self.arguments)

    def network(self) -> type[nn.Module]:
        """The class. UserError where the user has not allowed its module, or it is not there."""
        expected = f"expected --net {MODULE}PACKAGE.MODULE:CLASS, got {MODULE}{self.place}"
        network = imported(self.place, expected)
        if not (isinstance(network, type) and issubclass(network, nn.Module)):
            raise UserError(f"{expected}, which is no subclass of torch.nn.Module")
        return network


def imported(place: str, expected: str) -> Any:
    """What a Python module has by a name. place: PACKAGE.MODULE:NAME. UserError, with what was
    expected, where it is not there, or the user has not allowed the module."""
    module, _, name = place.rpartition(":")
    if not (module and name):
        raise UserError(expected)
    if not is_trusted(module):
        raise UserError(
            f"its network is {name} in the Python module {module}, which would be imported and "
            f"run: if you know and trust that module, allow it by {VARIABLE}={module} in the "
            "environment"
        )
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a module fails in as many ways as there are modules
        raise UserError(
            f"{expected}, which does not import from here ({first_line(error)})"
        ) from error


def is_trusted(name: str) -> bool:
    """Whether the user has allowed this module, or one around it, or this file."""
    allowed = _named | {each.strip() for each in os.environ.get(VARIABLE, "").split(",")} - {""}
    return any(f"{name}.".startswith(f"{each}.") for each in allowed)


def trust(place: str) -> None:
    """Allow the network of this place, PACKAGE.MODULE:CLASS, a module or a file, for this
    process."""
    _named.add(place.partition(":")[0])


def _keyword(argument: str) -> tuple[str, Any]:
    name, equals, value = argument.partition("=")
    if not (equals and name.isidentifier()):
        raise UserError(f"--arguments expects NAME=VALUE, such as width=64, got {argument!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
