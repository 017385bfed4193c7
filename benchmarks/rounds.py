"""Calls timed in turn, the order reversed from round to round, so that a drifting machine favours none."""

from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

import torch

from eval.measure.timing import timed

K = TypeVar("K")


def rounds(calls: Mapping[K, Callable], repeats: int, device: torch.device) -> dict[K, list[float]]:
    """Seconds of each call in each round; the round that warms them up is left out."""
    seconds: dict[K, list[float]] = {key: [] for key in calls}
    for i in range(repeats + 1):
        for key in reversed(calls) if i % 2 else calls:
            seconds[key].append(timed(calls[key], device)[1])
    return {key: took[1:] for key, took in seconds.items()}


def relative(seconds: list[float], others: list[float]) -> float:
    """The median, over the rounds, of one call's time over another's."""
    return median(a / b for a, b in zip(seconds, others, strict=True))
