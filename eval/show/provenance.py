"""How each number of a report was made: facts, and a row for each measurement and checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from eval.results import together
from eval.results.records import Record
from eval.show.columns import short
from eval.show.lines import Line
from eval.show.table import drawn, over

MEASURED = ("row", "steps", "sampler", "angles, rad", "quality by seed; by training")
MEASURED += ("ms @1, range", "repeats @batch", "measured", "conditions")
CHECKPOINTS = ("checkpoint", "file, sha256 of the weights", "its own training", "parents")


def facts(lines: list[Line], rows: list[Record], left_out: list[str]) -> dict[str, str]:
    """What holds for all rows. left_out: what else the files hold."""
    first = together.fullest(rows)
    real, extractor, floor = first.data, first.extractor, first.floor
    accuracy = extractor.get("accuracy")
    dates = [_when(date) for date in sorted(record.date for record in rows if record.date)]
    made = {
        "quality": f"{first.metric}, lower is better, of {first.num_images:,} images: "
        + over(lines),
        "extractor": f"sha256 {extractor['sha256']}"
        + (f", {accuracy:.2%} of held-out images classified rightly" if accuracy else ""),
        "real images": f"{real['images']:,} of {Path(real['name']).name}, {real['split']}"
        + (f", sha256 {real['sha256']}" if "sha256" in real else "")
        + (f"; saved statistics {real['statistics']}" if "statistics" in real else ""),
        "floor": f"{mean(floor):.3g}: the same metric of {first.num_images:,} real images"
        f"{drawn(first)}, mean of {len(floor)} draws between {min(floor):.3g} and {max(floor):.3g}",
        "NFE": "network calls per image, counted by a wrapper of the network, in a pass of its own",
    }
    if any(record.timings for record in rows):
        made |= {
            "times": "noise to uint8, device synchronised, the first call apart; the rows in turn, "
            "so that a machine that drifts slows them all alike; medians and quartiles of repeats",
            "images/s": f"at batch {first.batch_size}, unless another batch is named",
        }
    alike = all(record.environment == first.environment for record in rows)
    made["machine"] = words(first.environment) if alike else "several: below, by checkpoint"
    if dates:
        made["measured"] = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return made | ({"not shown": "; ".join(left_out)} if left_out else {})


def words(values: Mapping[str, object]) -> str:
    known = (f"{name} {value}" for name, value in values.items() if value is not None)
    return ", ".join(known).replace("_", " ")


def _when(date: str) -> str:
    return f"{date[:16].replace('T', ' ')} UTC" if date else "-"


def measured(lines: list[Line]) -> list[tuple]:
    """What each row's figures are the mean and the median of, under MEASURED."""
    made = []
    for line in lines:
        record, single = line.record, line.record.single
        range = [short(1000 * end(single.seconds)) for end in (min, max)] if single else ["-"]
        sizes = [f"{t.failed or f'×{len(t.seconds)}'} @{t.batch_size:,}" for t in record.timings]
        figures = [", ".join(f"{x:.3g}" for x in each.quality) for each in line.trainings]
        others = {name: value for name, value in record.conditions.items() if name != "date"}
        ends = [f"{end(record.angles):.3g}" for end in (max, min)] if record.angles else ["-"]
        angles = " to ".join(ends)
        plan = (line.title, record.steps or "-", record.sampler, angles)
        times = (" to ".join(range), ", ".join(sizes) or "-")
        made.append((*plan, "; ".join(figures), *times, _when(record.date), words(others) or "-"))
    return made


def parents(record: Record | None, known: dict[str, Record]) -> str:
    """What it was distilled from, and that in turn, as far back as the records know."""
    names = []
    while record and record.parent and len(names) <= len(known):
        sha256, record = record.parent, known.get(record.parent)
        names.append(f"{record.method if record else 'not measured'} {sha256[:8]}")
    return " ← ".join(names) or "none"


def checkpoints(lines: list[Line]) -> list[tuple]:
    """Each checkpoint once, under CHECKPOINTS: where it lay, its training, what it comes from."""
    known: dict[str, Record] = {}
    for record in (record for line in lines for record in line.trainings):
        known.setdefault(record.sha256, record)
    alike = len({str(record.environment) for record in known.values()}) == 1
    made = []
    for sha256, record in known.items():
        place = f"{record.run}, {sha256}" + ("" if alike else f", {words(record.environment)}")
        counts = {n: value for n, value in record.training.items() if not isinstance(value, str)}
        spent = (f"{value:,.0f} {name.replace('_', ' ')}" for name, value in counts.items())
        made.append((record.method, place, ", ".join(spent) or "-", parents(record, known)))
    return made
