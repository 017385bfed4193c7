"""Registries: frozen dataclasses by the names under which a card holds them."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Protocol, TypeVar

from diffusion.console import UserError


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
    described: Mapping[str, Any], registry: Mapping[str, type[T]], says: str, key: str = "name"
) -> T:
    """The inverse of to_json. UserError, which begins with `says`, for a name that is not there."""
    values = dict(described)
    name = values.pop(key)
    if name not in registry:
        raise UserError(f"{says} {name!r}, expected one of {', '.join(registry)}")
    return rebuilt(registry[name], values, f"{says} {name}, which")


def rebuilt(kind: type[T], values: Mapping[str, Any], says: str) -> T:
    """The dataclass of fields that were JSON. UserError, begun with `says`, for one it lacks."""
    unknown = values.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise UserError(f"{says} has no setting {', '.join(sorted(unknown))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
