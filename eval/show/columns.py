"""The columns of the tables: from a line of the table to what its cell shows."""

from collections.abc import Callable
from functools import partial
from math import floor, log10
from statistics import mean
from typing import NamedTuple

from eval.measure.intervals import Interval
from eval.measure.quality import SHARE
from eval.results.records import Record, Timing
from eval.show.lines import Line


class Cell(NamedTuple):
    text: str
    value: float | str | None = None
    """What it is sorted by; None where there is nothing."""


Columns = dict[str, Callable[[Line], Cell]]


def short(number: float) -> str:
    """Three digits, in full."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """In the largest unit that it has one of."""
    unit, size = next((u, n) for u, n in (("h", 3600), ("min", 60), ("s", 0)) if seconds >= n)
    return f"{short(seconds / (size or 1))} {unit}"


def cell(value: float | None, text: Callable[[float], str] = short) -> Cell:
    return Cell("-") if value is None else Cell(text(value), value)


def _repeats(line: Line, single: bool) -> Cell:
    """Milliseconds at batch 1, or images/s of the table's batch: of the repeats' median, and in
    brackets of their quartiles."""
    size = 1 if single else line.record.batch_size
    timing = line.record.timing(size)
    if timing is None:
        failures = (t.failed for t in line.record.timings if t.batch_size == size and t.failed)
        return Cell(next(failures, "-"))
    middle, low, high = _quartiles(timing, single)
    return Cell(f"{short(middle)} ({short(low)}–{short(high)})", middle)


def _quartiles(timing: Timing, single: bool) -> tuple[float, float, float]:
    """The median and both quartiles, in milliseconds or in images/s."""

    def figure(seconds: float) -> float:
        return 1000 * seconds if single else timing.batch_size / seconds

    low, high = sorted(map(figure, timing.iqr))
    return figure(timing.median), low, high


def _first_call(line: Line) -> Cell:
    timings = line.record.timings
    return cell(next((timing.first for timing in timings if timing.first is not None), None))


def _p90(line: Line) -> Cell:
    p90 = line.record.single.p90 if line.record.single else None
    return cell(None if p90 is None else 1000 * p90)


def _best(record: Record) -> Timing | None:
    """The best batch size, where more than the table's two were timed."""
    sizes = {timing.batch_size for timing in record.timings if timing.seconds}
    return record.best if sizes - {1, record.batch_size} else None


def _best_cell(line: Line) -> Cell:
    best = _best(line.record)
    if best is None:
        return Cell("-")
    return Cell(f"{short(best.images_per_second)} @{best.batch_size}", best.images_per_second)


def _fifty_thousand(line: Line) -> Cell:
    """How long 50,000 images take at the most images/s that were timed."""
    best = line.record.best
    return cell(50_000 / best.images_per_second if best else None, duration)


def _megabytes(line: Line) -> Cell:
    batch = line.record.batch
    return cell(None if batch is None or batch.allocated is None else batch.allocated / 1e6)


def between(interval: Interval | None) -> str:
    """The interval's ends in brackets, rounded to a third of its width or less; or nothing."""
    if interval is None:
        return ""
    width = interval[1] - interval[0]
    digits = max(0, -floor(log10(width / 3))) if width > 0 else 2
    low, high = (f"{end:,.{digits}f}" for end in interval)
    return f" ({low}–{high})" if interval[0] >= 0 else f" ({low} to {high})"


def _quality(line: Line) -> Cell:
    text = f"{line.record.score:.3g}{between(line.interval)}"
    return Cell(f"{text} {line.mark}".strip(), line.record.score)


def _ratio(value: float | None, interval: Interval | None) -> Cell:
    return cell(value, lambda ratio: f"{ratio:.2f}{between(interval)}")


def _figure(name: str, line: Line) -> Cell:
    value, known = line.record.further.get(name), line.figure(name)
    interval = known.interval() if known else None
    return cell(value, lambda number: f"{number:.3g}{between(interval)}")


def _bits(name: str, line: Line) -> Cell:
    likelihood = line.record.likelihood
    error = likelihood.get(f"{name}-error")
    within = "" if error is None else f" ± {error:.2g}"
    return cell(likelihood.get(name), lambda value: f"{value:.4g}{within}")


def gradient_images(record: Record) -> int | None:
    """Images that the training, and those that it goes on from, took gradients of."""
    return record.training.get("total_images", record.training.get("images"))


def _minutes(record: Record) -> float | None:
    seconds = record.training.get("seconds")
    return None if seconds is None else seconds / 60


TRAININGS, ABOVE, TRIED = "trainings", "above floor", "settings tried"
TIMES = ("ms @1", "images/s", "speed-up")
NAMES: Columns = {
    "method": lambda line: Cell(line.name, line.name),
    "steps": lambda line: cell(line.record.steps or None, str),
}
QUALITY: Columns = NAMES | {
    "NFE": lambda line: cell(line.record.nfe or None, str),
    TRAININGS: lambda line: cell(len(line.trainings), str),
    "quality": _quality,
    "× teacher": lambda line: _ratio(line.ratio, line.ratio_interval),
    ABOVE: lambda line: _ratio(line.above, line.above_interval),
    "ms @1": lambda line: cell(line.milliseconds),
    "images/s": lambda line: cell(line.images_per_second),
    "speed-up": lambda line: cell(line.speed_up, lambda times: f"{short(times)}×"),
    "size": lambda line: cell(line.record.parameters or None, lambda n: f"{n / 1e6:.2f} M"),
}
SPEED: Columns = NAMES | {
    "first call, s": _first_call,
    "ms @1": partial(_repeats, single=True),
    "p90, ms": _p90,
    "images/s": partial(_repeats, single=False),
    "best images/s": _best_cell,
    "50,000 images": _fifty_thousand,
    "peak MB": _megabytes,
}
TRAINING: Columns = NAMES | {
    "images": lambda line: cell(gradient_images(line.record), "{:,}".format),
    "network passes": lambda line: cell(line.record.training.get("passes") or None, "{:,}".format),
    "iterations": lambda line: cell(line.record.training.get("iterations"), "{:,}".format),
    "minutes": lambda line: cell(_minutes(line.record)),
    TRIED: lambda line: cell(line.record.tried, "{:,}".format),
}
LIKELIHOOD: Columns = NAMES | {
    "bits/dim ≤": partial(_bits, "variational-bound"),
    "bits/dim": partial(_bits, "probability-flow"),
}


def further(records: list[Record]) -> Columns:
    """The further figures that any row has, shares of classes apart."""
    names = dict.fromkeys(name for record in records for name in record.others)
    return NAMES | {name: partial(_figure, name) for name in names if not name.startswith(SHARE)}


def classes(records: list[Record]) -> Columns:
    """The shares of the classes, in percent."""
    names = dict.fromkeys(name for record in records for name in record.others)
    return NAMES | {
        f"class {name.removeprefix(SHARE)}": lambda line, name=name: share(
            line.record.further.get(name)
        )
        for name in names
        if name.startswith(SHARE)
    }


def share(value: float | None) -> Cell:
    return cell(value, "{:.1%}".format)


def plain(line: Line, columns: Columns, times: bool) -> dict[str, object]:
    """The columns' numbers, and what no cell has room for: for a program to read."""
    record = line.record
    values = {head: column(line).value for head, column in columns.items()}
    values |= {"method": line.title, "warnings": " ".join(line.warnings), "sampler": record.sampler}
    values |= {"own": record.own_plan, "guidance": record.guidance}
    for head, interval in (
        ("quality", line.interval),
        ("× teacher", line.ratio_interval),
        (ABOVE, line.above_interval),
    ):
        values |= dict(zip((f"{head} low", f"{head} high"), interval or (None, None), strict=True))
    values |= {"mark": line.mark, "floor": mean(record.floor)}
    if times:
        for head, timing in (("ms @1", record.single), ("images/s", record.batch)):
            quartiles = _quartiles(timing, head == "ms @1")[1:] if timing else (None, None)
            values |= dict(zip((f"{head} q1", f"{head} q3"), quartiles, strict=True))
        best = _best(record)
        values |= {"best batch size": best.batch_size if best else None}
        values |= {"batch size": record.batch_size}
    values |= {"metric": record.metric, "num images": record.num_images}
    values |= {"seeds": " ".join(map(str, record.seeds))}
    values |= {"run": record.run, "sha256": record.sha256}
    place = record.environment  # its precision is not the figure of that name
    return values | {"device": place["device"], "network precision": place["precision"]}
