"""Registries: frozen dataclasses by the names under which a card holds them."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import TypeAdapter

from diffusion.console import UserError
from diffusion.typed import checked


class Entry(Protocol):
    """A frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=Entry)


def to_json(entry: Entry, registry: Mapping[str, type], key: str = "name") -> dict:
    """The entry as a card holds it: its name under `key`, and its fields."""
    name = next((name for name, kind in registry.items() if type(entry) is kind), None)
    if name is None:
        raise UserError(f"{type(entry).__name__} is none of {', '.join(registry)}: register it")
    return {**asdict(entry), key: name}


def from_json(
    described: Mapping[str, Any],
    registry: Mapping[str, type[T]],
    path: str,
    says: str,
    key: str = "name",
) -> T:
    """The inverse of to_json, by the type that is registered. UserError for what does not fit it.

    path: where it stands in the card. says: how a name that is not registered is spoken of.
    """
    values = dict(described)
    name = values.pop(key, None)
    if not isinstance(name, str) or name not in registry:
        raise UserError(f"{path}.{key}: {says} {name!r:.80}, expected one of {', '.join(registry)}")
    return rebuilt(registry[name], values, path)


def rebuilt(kind: type[T], values: Mapping[str, Any], path: str) -> T:
    """The dataclass of fields that were JSON. UserError for fields that do not fit its types."""
    if unknown := sorted(values.keys() - {each.name for each in fields(kind)}):
        raise UserError(f"{path}.{unknown[0]:.80}: no such field is known")
    return checked(TypeAdapter(kind), values, path, joined=".")
