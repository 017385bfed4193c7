"""results.schema.json, and one line for what a record has against it."""

import json
from functools import cache
from pathlib import Path

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

SCHEMA = Path(__file__).with_name("results.schema.json")
RULES = {  # of the schema, as a reader is told them; {} is the rule's value
    "type": "{}",
    "const": "{}",
    "pattern": "text like {}",
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "minItems": "at least {} of them",
    "minLength": "at least {} letters",
    "uniqueItems": "no two alike",
}


def mistake(fields: object) -> str | None:
    """The first field that is wrong: its path, what was expected, what came."""
    error = next(_validator().iter_errors(fields), None)
    return None if error is None else _told(error)


@cache
def _validator() -> Draft202012Validator:
    """NaN and infinity, which Python's JSON takes, are no numbers to it."""

    def finite(_, value: object) -> bool:
        return _is(value, int, float) and abs(value) < float("inf")

    def whole(_, value: object) -> bool:
        return _is(value, int)

    def _is(value: object, *kinds: type) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    kinds = Draft202012Validator.TYPE_CHECKER.redefine_many({"number": finite, "integer": whole})
    return extend(Draft202012Validator, type_checker=kinds)(json.loads(SCHEMA.read_text("utf-8")))


def _told(error: ValidationError) -> str:
    place, rule, value = [*error.absolute_path], error.validator, error.validator_value
    came, known = error.instance, error.schema.get("properties", {})
    if rule == "required":
        place.append(next(name for name in value if name not in came))
        told = "expected, but missing"
    elif rule == "additionalProperties":
        place.append(next(name for name in came if name not in known))
        told = "no such field is known"
    else:
        value = " or ".join(value) if isinstance(value, list) else value
        told = f"expected {RULES[rule].format(value)}, got {_short(came)}"
    return f"{'.'.join(map(str, place)) or 'the line'}: {told}"


def _short(value: object) -> str:
    """As JSON, forty letters of it."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
