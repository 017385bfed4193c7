"""As many steps as a budget allows: quality from the measured table, time from this machine."""

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from diffusion.console import UserError
from diffusion.model import Model
from diffusion.plan import Angles, Plan, Weight
from diffusion.samplers import SOLVERS
from diffusion.typed import OPEN, Count, Sha256, Text, checked, parse

UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0}
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 50)  # of calls, to choose among without a table
PLACE = Path("compare") / "results.jsonl"


@with_config(OPEN)
class Line(TypedDict, total=False, extra_items=Any):
    """The fields of a line of results.jsonl that are read here (docs/formats.md)."""

    metric: Text
    sha256: Sha256
    parent: Sha256 | None
    sampler: Text
    angles: Angles | list[float]
    guidance: Weight | None
    quality: Annotated[list[float], Field(max_length=1000)]
    nfe: Count


LINE = TypeAdapter(Line)


@dataclass(frozen=True)
class Way:
    """A plan, the network calls that it makes for an image, and the distance that it measured."""

    plan: Plan
    calls: int
    distance: float | None = None


@dataclass(frozen=True)
class Choice:
    """The way that was chosen, and why."""

    way: Way
    seconds: float
    """What it should take."""
    words: str


def seconds_of(text: str) -> float:
    """The seconds of a text such as 20ms, 1.5s or 2min."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|min)", text)
    if not match or float(match[1]) <= 0:
        raise UserError(
            f"--time-budget must be a time above 0 such as 20ms, 1.5s or 2min, got {text}"
        )
    return float(match[1]) * UNITS[match[2]]


def times_of(text: str) -> float:
    """The factor of a text such as 1.2x."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x", text)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--quality must be a factor above 0 such as 1.2x, got {text}")
    return float(match[1])


def table_of(checkpoint: Path) -> Path | None:
    """The table that eval.compare wrote for the folder of runs that a checkpoint is in."""
    above = [checkpoint, *checkpoint.parents][:4]
    return next((folder / PLACE for folder in above if (folder / PLACE).is_file()), None)


def read_table(path: Path, model: Model) -> tuple[list[Way], float]:
    """The model's ways that were measured, and the least distance of a teacher.

    The distances are of the table's first metric of which the model has a row.
    """
    metric, ways, teachers = "", {}, {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"--table {path} cannot be read ({error.strerror})") from error
    for number, text in enumerate(lines, 1):
        try:
            line = checked(LINE, parse(text), f"{path}, line {number}")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: expected JSON ({error})") from error
        if "metric" in line:
            metric = f"{line['metric']} {line.get('num_images')}"
        if not line.get("quality") or not line.get("angles"):
            continue
        distance, guidance = mean(line["quality"]), line.get("guidance")
        if line.get("parent") is None:
            teachers.setdefault(metric, []).append(distance)
        if line["sha256"] == model.sha256 and line["sampler"] in SOLVERS:
            plan = Plan(line["sampler"], tuple(line["angles"]), guidance)
            ways.setdefault(metric, []).append(Way(plan, line["nfe"], distance))
    if not ways:
        raise UserError(f"{path} has no row of this model: measure it with eval.compare")
    first = next(iter(ways))
    return ways[first], min(teachers.get(first) or [way.distance for way in ways[first]])


def ways_without(model: Model, guidance: float | None) -> list[Way]:
    """The model's own plans and those of its usual solver, of which nothing is known but calls."""
    plans = {plan.num_steps: model.guided(plan, guidance) for plan in model.card.plans}
    for count in COUNTS if model.solvers else ():
        with suppress(UserError):  # more than it has angles for
            plans.setdefault(count, model.plan(count, guidance=guidance))
    return [Way(plan, model.calls(plan)) for _, plan in sorted(plans.items())]


def timed(model: Model, ways: list[Way], batch: int) -> list[float]:
    """Seconds of a batch by each way: a line through the times of the fewest and of more calls.

    The time of a call depends on no angle, so two ways tell of all.
    """
    few = min(ways, key=lambda way: way.calls)
    more = min(ways, key=lambda way: (abs(way.calls - few.calls - 4), way.calls))
    indices = torch.arange(batch, device=model.device)

    def seconds(way: Way) -> float:
        times = []
        for _ in range(6):  # the first prepares
            begun = time.perf_counter()
            model.sample(way.plan, 0, indices).cpu()
            times.append(time.perf_counter() - begun)
            if sum(times) > 2.0:
                break
        return median(times[1:] or times)

    start = seconds(few)
    if more.calls == few.calls:
        return [start * way.calls / few.calls for way in ways]
    each = max(0.0, (seconds(more) - start) / (more.calls - few.calls))
    return [start + each * (way.calls - few.calls) for way in ways]


def choose(
    model: Model,
    num: int,
    batch_size: int,
    time_budget: str | None = None,
    quality: str | None = None,
    table: Path | None = None,
    guidance: float | None = None,
) -> Choice:
    """The best way to make so many images within a time, or the quickest of a quality, or both.

    time_budget: for all of them, such as 20ms. quality: at most so many times the least distance of
    a teacher in the table, such as 1.2x. Without a table more calls are taken to be better.
    UserError where no way fits.
    """
    limit = seconds_of(time_budget) if time_budget else None
    factor = times_of(quality) if quality else None
    if table:
        ways, best = read_table(table, model)
        if guidance is not None:
            ways = [way for way in ways if way.plan.guidance == guidance] or ways
    elif factor is not None:
        raise UserError(
            "--quality needs a table of what was measured: run eval.compare on the folder of runs, "
            "or name its results.jsonl with --table"
        )
    else:
        ways, best = ways_without(model, guidance), 1.0
    batch = min(num, batch_size)
    seconds = [each * -(-num // batch) for each in timed(model, ways, batch)]
    fitting = list(zip(ways, seconds, strict=True))
    if factor is not None:
        fitting = [pair for pair in fitting if (pair[0].distance or 0) <= factor * best]
        if not fitting:
            least = min(way.distance or 0 for way in ways) / best
            raise UserError(
                f"--quality {quality}: the best of this model's {len(ways)} ways in {table} has "
                f"{least:.2f}x: give that, or more"
            )
    if limit is not None:
        least = min(each for _, each in fitting)
        fitting = [pair for pair in fitting if pair[1] <= limit]
        if not fitting:
            raise UserError(
                f"--time-budget {time_budget}: the quickest way takes about {1e3 * least:.3g} ms "
                f"for {num} images here: give that, or fewer images"
            )
    if factor is not None:
        way, took = min(fitting, key=lambda pair: (pair[1], pair[0].distance or 0))
    elif table:
        way, took = min(fitting, key=lambda pair: (pair[0].distance or 0, pair[1]))
    else:
        way, took = max(fitting, key=lambda pair: pair[0].calls)
    known = (
        f"distance {way.distance:.3g}, {way.distance / best:.2f}x"
        if way.distance
        else ("its quality is not known: no table")
    )
    words = f"chosen: {way.plan.sampler} in {way.plan.num_steps} steps, {way.calls} calls, "
    return Choice(way, took, words + f"about {1e3 * took:.3g} ms ({known})")
