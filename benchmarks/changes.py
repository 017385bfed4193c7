"""Changes by rule: every place of a JSON object, and values of other types, ranges and sizes."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

ABSENT = object()
VALUES = (
    None, True, 5, -1, 0, 2.5, 10**9, 10**30, 1e30, 1e-300, 1e308, math.nan, math.inf, -math.inf,
    "", "text", [], [[]], {}, {"a": 1}, [0.0] * 20_000, "\x1b[31m|<b>$x$", ABSENT,
)  # fmt: skip
# Places of a card whose values are free, or may be left out: with another it is another card.
FREE = {
    "method", "abilities", "abilities.0", "training", "training.settings", "training.iterations",
    "training.images", "training.seconds", "training.settings.seed", "parent", "origin", "shift",
    "shifted", "guidance", "data.name", "data.background", "data.sha256", "data.num_classes",
    "codec.mean", "codec.std", "data.mean", "data.std", "denoiser.bounds", "denoiser.bounds.0",
    "denoiser.bounds.1", "net.bounds", "denoiser.prediction", "net.prediction", "denoiser",
    "denoiser.learned_variance", "net.learned_variance", "net.dropout", "net.attention", "sampler",
    "solvers", "solvers.0", "condition.guidance.low", "condition.guidance.high",
    "net.guidance.0", "net.guidance.1",
}  # fmt: skip


def places(node: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value within the object."""
    if path:
        yield path
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*path, key))


def changed(values: dict, path: Sequence, value: object) -> dict:
    """A copy with another value at that place, or without it."""
    values = json.loads(json.dumps(values))
    *above, last = path
    node: Any = values
    for key in above:
        node = node[key]
    if value is ABSENT:
        del node[last]
    else:
        node[last] = value
    return values
