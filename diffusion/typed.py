"""The one door for JSON from outside: read, then checked by a type; a mistake is one line."""

import json
import re
from collections.abc import Iterator
from math import isfinite
from typing import Annotated, Any, TypeVar

import pydantic_core
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from diffusion.console import UserError

T = TypeVar("T")
OPEN = ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
LARGE = 2**63
CLOSED = OPEN | ConfigDict(extra="forbid", validate_default=True)

Text = Annotated[str, Field(min_length=1, max_length=4096)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Amount = Annotated[float, Field(ge=0, le=1e30)]


def parse(text: str | bytes) -> Any:
    """What the JSON says. ValueError for text that is none, nests too deeply or holds half of a
    surrogate pair; json.loads would raise other errors, or let it pass."""
    return pydantic_core.from_json(text)


def checked(kind: TypeAdapter[T], values: Any, place: str, joined: str = ": ") -> T:
    """The typed value. UserError in one line: the field's path, what was expected, what came.

    place: where the values are from, before the path, and `joined` between them. However open the
    type, every number must be finite, and a whole one fit 64 bits.
    """
    for path, value in _numbers(values):
        if not (isfinite(value) if isinstance(value, float) else -LARGE <= value < LARGE):
            expected = "a finite number" if isinstance(value, float) else "a number of 64 bits"
            raise UserError(
                f"{place}{joined}{path}: expected {expected}, got {json.dumps(value):.40}"
            )
    try:
        return kind.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(f"{place}{joined}{fault(error)}") from error


def fault(error: ValidationError) -> str:
    """The first fault, as "field: what was expected, what came"."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "the whole"
    if first["type"] == "missing":
        return f"{field}: expected, but missing"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{field}: no such field is known"
    expected = re.sub(r"^(Value error, )?\w+ should", "expected it to", first["msg"])
    came = json.dumps(first["input"], default=str)
    return f"{field}: {expected}, got {came if len(came) <= 40 else came[:37] + '...'}"


def _numbers(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number among the values, with its path."""
    if isinstance(values, float | int) and not isinstance(values, bool):
        yield path, values
    elif isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
