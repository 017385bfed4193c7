"""The timing loop of all benchmarks: in turns, so that a drifting machine favours none."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from scipy.stats import binom

from diffusion.console import at_least, out, say
from diffusion.files import require_folder, write_atomic
from diffusion.machine import this_device
from eval.measure import machine
from eval.measure.timing import timed


@dataclass(frozen=True)
class TimingOptions:
    """The options of every benchmark."""

    repeats: int = 30
    """How often each alternative is timed."""
    out: Path | None = None
    """A .json file to write all seconds to."""


@dataclass(frozen=True)
class Comparison:
    """Alternatives to be timed. The first is the one that the others are measured against."""

    title: str
    calls: Mapping[str, Callable[[], object]]
    images: int | None = None
    """Images that each call makes, or takes gradients of."""


@dataclass(frozen=True)
class Times:
    """Seconds of each alternative in each round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """How many times as long as the other it takes, round by round: see `interval`."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return interval([a / b for a, b in pairs])


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval, by order statistics; below 6 values, the extremes."""
    ranked = sorted(values)
    cut = max(0, int(binom.ppf(0.025, len(ranked), 0.5)) - 1)
    return median(ranked), ranked[cut], ranked[-1 - cut]


def take_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> Times:
    """Time each call once a round, in an order that is reversed from round to round.

    The first round warms them up and is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name in reversed([*calls]) if i % 2 else calls:
            seconds[name].append(timed(calls[name], device)[1])
    return Times({name: rounds[1:] for name, rounds in seconds.items()})


def summary(comparison: Comparison, times: Times) -> str:
    """A line for each alternative: its time, its images/s, and how it compares with the first."""
    first, *_ = comparison.calls
    lines = [comparison.title]
    for name in comparison.calls:
        cells = [f"  {name:22} {1000 * times.median(name):10.2f} ms"]
        if comparison.images:
            cells.append(f"{comparison.images / times.median(name):10,.0f} images/s")
        if name != first:
            pair = (first, name) if comparison.images else (name, first)
            words = "times as many" if comparison.images else "times as long"
            middle, low, high = times.ratio(*pair)
            cells.append(f"  {middle:.3f} ({low:.3f}–{high:.3f}) {words}")
        lines.append(" ".join(cells))
    return "\n".join(lines)


def compare(
    options: TimingOptions,
    comparisons: Iterable[Comparison],
    precision: Literal["fp32", "bf16"] = "bf16",
    compiled: bool = False,
) -> None:
    """Time the comparisons one by one; print a summary of each, and write --out after each.

    UserError, before the first is begun, for a count below 1 or an --out that cannot be written.
    """
    counts = [f.name for f in fields(options) if f.default and type(f.default) in (int, tuple)]
    at_least(1, options, *counts)
    if options.out:
        require_folder(options.out.parent)
    device = this_device()
    environment = machine.environment(device, precision, compiled)
    figures = {"environment": environment, "conditions": machine.conditions(device)}
    figures["comparisons"] = []
    spread = "95 % intervals" if options.repeats >= 6 else "the least and the greatest"
    say(f"{environment['device']}, {precision}, {options.repeats} rounds; in brackets {spread}")
    for comparison in comparisons:
        times = take_turns(comparison.calls, options.repeats, device)
        out.print(summary(comparison, times), markup=False)
        figures["comparisons"].append(
            {"title": comparison.title, "images": comparison.images, **asdict(times)}
        )
        if options.out:
            write_atomic(options.out, json.dumps(figures, indent=1))
