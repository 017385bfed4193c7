"""The columns of the tables: from a line of the table to what its cell shows."""

from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

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


def _repeats(record: Record, batch_size: int, figure: Callable[[float], float]) -> Cell:
    """A figure of that batch's seconds: of their median, and in brackets of their quartiles."""
    timing = record.timing(batch_size)
    if timing is None:
        failed = (t.failed for t in record.timings if t.batch_size == batch_size and t.failed)
        return Cell(next(failed, "-"))
    middle, (low, high) = figure(timing.median), sorted(map(figure, timing.iqr))
    return Cell(f"{short(middle)} ({short(low)}–{short(high)})", middle)


def _milliseconds(seconds: float) -> float:
    return 1000 * seconds


def _first(record: Record) -> float | None:
    """Seconds of the first call."""
    return next((timing.first for timing in record.timings if timing.first is not None), None)


def _p90(record: Record) -> float | None:
    p90 = record.single.p90 if record.single else None
    return None if p90 is None else 1000 * p90


def _best(record: Record) -> Timing | None:
    """The best batch size, where more than the table's two were timed."""
    sizes = {timing.batch_size for timing in record.timings if timing.seconds}
    return record.best if sizes - {1, record.batch_size} else None


def _best_cell(line: Line) -> Cell:
    best = _best(line.record)
    if best is None:
        return Cell("-")
    return Cell(f"{short(best.images_per_second)} @{best.batch_size}", best.images_per_second)


def _spread(record: Record) -> float | None:
    return record.spread if len(record.quality) > 1 else None


def _seconds_for(record: Record, images: int) -> float | None:
    """At the most images/s that were timed."""
    best = record.best
    return images / best.images_per_second if best else None


def _megabytes(record: Record) -> float | None:
    batch = record.batch
    return None if batch is None or batch.allocated is None else batch.allocated / 1e6


NAMES: Columns = {
    "method": lambda line: Cell(line.name, line.name),
    "steps": lambda line: cell(line.record.steps, str),
}
TRAININGS = "trainings"
QUALITY: Columns = NAMES | {
    "NFE": lambda line: cell(line.record.nfe, str),
    TRAININGS: lambda line: cell(len(line.trainings), str),
    "quality": lambda line: cell(line.record.score, _within(_spread(line.record))),
    "× teacher": lambda line: cell(line.ratio, "{:.2f}".format),
    "ms @1": lambda line: cell(line.milliseconds),
    "images/s": lambda line: cell(line.images_per_second),
    "speed-up": lambda line: cell(line.speed_up, lambda times: f"{short(times)}×"),
    "size": lambda line: cell(line.record.parameters, lambda n: f"{n / 1e6:.2f} M"),
}
TIMES = ("ms @1", "images/s", "speed-up")
SPEED: Columns = NAMES | {
    "first call, s": lambda line: cell(_first(line.record)),
    "ms @1": lambda line: _repeats(line.record, 1, _milliseconds),
    "p90, ms": lambda line: cell(_p90(line.record)),
    "images/s": lambda line: _repeats(
        line.record, line.record.batch_size, lambda seconds: line.record.batch_size / seconds
    ),
    "best images/s": _best_cell,
    "50,000 images": lambda line: cell(_seconds_for(line.record, 50_000), duration),
    "peak MB": lambda line: cell(_megabytes(line.record)),
}


def _within(error: float | None, digits: str = ".3g") -> Callable[[float], str]:
    """The text of a number that has that error, if one is known."""
    return lambda value: f"{value:{digits}}" + ("" if error is None else f" ± {error:.2g}")


def _bits(name: str) -> Callable[[Line], Cell]:
    def column(line: Line) -> Cell:
        found = line.record.likelihood
        return cell(found.get(name), _within(found.get(f"{name}-error"), ".4g"))

    return column


LIKELIHOOD: Columns = NAMES | {
    "bits/dim ≤": _bits("variational-bound"),
    "bits/dim": _bits("probability-flow"),
}


def further(records: list[Record]) -> Columns:
    """The further figures that any row has."""
    columns = dict(NAMES)
    for name in dict.fromkeys(name for record in records for name in record.others):
        columns[name] = lambda line, name=name: cell(line.record.further.get(name), "{:.3g}".format)
    return columns


def plain(line: Line, columns: Columns, times: bool) -> dict[str, object]:
    """The columns' numbers, and what no cell has room for: for a program to read."""
    record = line.record
    found = {head: column(line).value for head, column in columns.items()}
    found |= {"method": line.title, "warnings": " ".join(line.warnings), "sampler": record.sampler}
    found |= {"own": record.own_plan, "spread": _spread(record), "floor": mean(record.floor)}
    if times:
        for head, timing, figure in (
            ("ms @1", record.single, _milliseconds),
            ("images/s", record.batch, lambda seconds: record.batch_size / seconds),
        ):
            quartiles = sorted(map(figure, timing.iqr)) if timing else (None, None)
            found |= dict(zip((f"{head} q1", f"{head} q3"), quartiles, strict=True))
        best = _best(record)
        found |= {"best batch size": best.batch_size if best else None}
        found |= {"batch size": record.batch_size}
    found |= {"metric": record.metric, "num images": record.num_images}
    found |= {"seeds": " ".join(map(str, record.seeds)), "run": record.run, "sha256": record.sha256}
    place = record.environment  # its precision is not the figure of that name
    return found | {"device": place["device"], "network precision": place["precision"]}
