"""Many calls timed against one another, in turn: at one batch size, or at ever larger ones."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from eval.measure.timing import Timing, again, begin, settled

GROWTH = 1.05  # in images/s, less than which a larger batch is not worth it

K = TypeVar("K")


@dataclass(frozen=True)
class Lap(Generic[K]):
    """One call's timing so far; the last lap of a key and batch size holds all of it."""

    key: K
    timing: Timing
    done: int
    total: int
    words: str

    def progress(self) -> tuple[int, int, str]:
        """What console.track shows."""
        return self.done, self.total, self.words


def race(
    calls: Mapping[K, Callable[[], Tensor]],
    batch_size: int,
    device: torch.device,
    budget: float = 2.0,
) -> Iterator[Lap[K]]:
    """Time calls of that batch size against one another, `budget` seconds of repeats each.

    Each call's first run is apart and its second warms it up; then all are repeated in turn, the
    order reversed from round to round, so that a machine that drifts slows them all alike. A call
    that runs out of memory is marked, and the others go on.

        timings = {lap.key: lap.timing for lap in track(race(...), "speed", Lap.progress)}
    """
    total = int(len(calls) * budget)
    timings: dict[K, Timing] = {}
    spent: dict[K, float] = {}
    for key, timing in _rounds(calls, batch_size, device, budget):
        timings[key] = timing
        spent[key] = budget if settled(timing, budget) else min(sum(timing.seconds), budget)
        begun = f", {len(timings)} calls begun" if len(timings) < len(calls) else ""
        yield Lap(key, timing, int(sum(spent.values())), total, f"s of repeats{begun}")


def sweep(
    calls: Mapping[K, Callable[[int], Tensor]],
    device: torch.device,
    known: Mapping[K, Mapping[int, Timing]] | None = None,
    limit: float = 30.0,
    budget: float = 1.0,
) -> Iterator[Lap[K]]:
    """Time calls of a batch size at 1, 2, 4, ...: each a race of those whose images/s still grow.

    A call drops out when it runs out of memory, when two doublings have not brought 5 %, or when
    the next may take longer than the limit of seconds (twice the last), marked "over 30 s".
    known: by batch size, what is not measured again.

        for lap in track(sweep(calls, device, known), "batch sizes", Lap.progress):
            timings[lap.key][lap.timing.batch_size] = lap.timing
    """
    timings: dict[K, dict[int, Timing]] = {key: {} for key in calls}
    going, size, ended = list(calls), 1, 0
    while going:
        words = f"swept, batch {size}"
        entrants: dict[K, Callable[[], Tensor]] = {}
        for key in going:
            before = (known or {}).get(key, {}).get(size)
            if before:
                timings[key][size] = before
            elif size > 1 and 2 * timings[key][size // 2].median > limit:
                timings[key][size] = Timing(size, failed=f"over {limit:g} s")
                yield Lap(key, timings[key][size], ended, len(calls), words)
            else:
                entrants[key] = partial(calls[key], size)
        for key, timing in _rounds(entrants, size, device, budget):
            timings[key][size] = timing
            yield Lap(key, timing, ended, len(calls), words)
        for key in [key for key in going if not _grows(list(timings[key].values()))]:
            going.remove(key)
            ended += 1
            yield Lap(key, timings[key][size], ended, len(calls), words)
        size *= 2


def _rounds(
    calls: Mapping[K, Callable[[], Tensor]], batch_size: int, device: torch.device, budget: float
) -> Iterator[tuple[K, Timing]]:
    """Each call's timing after its first two runs, then after each repeat until it is settled."""
    timings: dict[K, Timing] = {}
    for key, call in calls.items():
        timings[key] = begin(call, batch_size, device)
        yield key, timings[key]
    order = list(calls)
    while order := [key for key in reversed(order) if not settled(timings[key], budget)]:
        for key in order:
            timings[key] = again(calls[key], timings[key], device)
            yield key, timings[key]


def _grows(timings: list[Timing]) -> bool:
    """Whether the next doubling may bring more: one of the last two beat all before by 5 %."""
    if timings[-1].failed:
        return False
    rates = [timing.images_per_second for timing in timings]
    return len(rates) < 3 or max(rates[-2:]) >= GROWTH * max(rates[:-2])
