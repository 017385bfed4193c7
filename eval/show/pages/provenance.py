"""How each number of a report was made."""

from html import escape
from pathlib import Path
from statistics import mean

from eval.results import together
from eval.results.records import Record
from eval.show.columns import short
from eval.show.lines import Line
from eval.show.pages import table as grid
from eval.show.table import drawn, over


def facts(rows: list[Record], not_shown: list[str], several: bool) -> str:
    """not_shown: what else the files hold; several: whether any row has several trainings."""
    first = together.fullest(rows)
    real = first.data
    accuracy = first.extractor.get("accuracy")
    dates = [_when(date) for date in sorted(filter(None, (record.date for record in rows)))]
    pixels = f", sha256 <code>{escape(real['sha256'])}</code>" if "sha256" in real else ""
    pairs = {
        "quality": f"{escape(first.metric)}, lower is better, of {first.num_images:,} images: "
        + over(first, several),
        "extractor": f"sha256 <code>{escape(first.extractor['sha256'])}</code>"
        + (f", {accuracy:.2%} of held-out images classified rightly" if accuracy else ""),
        "real images": f"{real['images']:,} of {escape(Path(real['name']).name)}, "
        f"{escape(real['split'])}{pixels}",
        "floor": f"{mean(first.floor):.3g}: the same metric of {first.num_images:,} real images{drawn(first)}, mean of "
        f"{len(first.floor)} draws between {min(first.floor):.3g} and {max(first.floor):.3g}",
        "NFE": "network calls per image, counted by a wrapper of the network, in a pass of its own",
    }
    if any(record.timings for record in rows):
        pairs |= {
            "times": "noise to uint8, device synchronised, the first call apart; the rows in turn, so that a "
            "machine that drifts slows them all alike; medians and quartiles of the repeats",
            "images/s": f"at batch {first.batch_size}, unless another batch is named",
        }
    alike = all(record.environment == first.environment for record in rows)
    pairs["machine"] = _words(first.environment) if alike else "several: below, by checkpoint"
    if dates:
        pairs["measured"] = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    if not_shown:
        pairs["not shown"] = escape("; ".join(not_shown))
    return "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in pairs.items())


def _words(facts: dict) -> str:
    return escape(
        ", ".join(f"{k} {v}" for k, v in facts.items() if v is not None).replace("_", " ")
    )


def _when(date: str) -> str:
    return f"{escape(date[:16].replace('T', ' '))} UTC" if date else "-"


def measured(found: list[Line]) -> str:
    """What each row's figures are the mean and the median of."""
    body = []
    for line in found:
        record, single = line.record, line.record.single
        times = "-"
        if single:
            ends = (short(1000 * end(single.seconds)) for end in (min, max))
            times = " to ".join(ends)
        sizes = [f"{t.failed or f'×{len(t.seconds)}'} @{t.batch_size:,}" for t in record.timings]
        others = {k: v for k, v in record.conditions.items() if k != "date"}
        angles = f"{max(record.angles):.3g} to {min(record.angles):.3g}"
        by_seed = "; ".join(
            ", ".join(f"{figure:.3g}" for figure in each.quality) for each in line.trainings
        )
        cells = (angles, by_seed, times, escape(", ".join(sizes)) or "-")
        name, sampler = escape(line.title), escape(record.sampler)
        body.append(
            (
                "",
                name,
                record.steps,
                sampler,
                *cells,
                _when(record.date),
                _words(others) or "-",
            )
        )
    heads = (
        "row",
        "steps",
        "sampler",
        "angles, rad",
        "quality by seed; by training",
        "ms @1, range",
    )
    return grid((*heads, "repeats @batch", "measured", "conditions"), body)


def parents(record: Record, known: dict[str, Record]) -> str:
    """What it was distilled from, and that in turn, as far back as the records know."""
    names = []
    while record and record.parent and len(names) <= len(known):
        sha256, record = record.parent, known.get(record.parent)
        method = record.method if record else "not measured"
        names.append(f"{escape(method)} <code>{escape(sha256[:8])}</code>")
    return " ← ".join(names) or "none"


def checkpoints(found: list[Line]) -> str:
    """Each checkpoint once: where it lay, how it was trained, what it comes from."""
    known: dict[str, Record] = {}
    for record in (record for line in found for record in line.trainings):
        known.setdefault(record.sha256, record)
    alike = len({str(record.environment) for record in known.values()}) == 1
    body = []
    for sha256, record in known.items():
        place = f"{escape(record.run)}<br><code>{escape(sha256)}</code>"
        place += "" if alike else f'<div class="long">{_words(record.environment)}</div>'
        counts = {n: value for n, value in record.training.items() if not isinstance(value, str)}
        spent = (f"{value:,.0f} {name.replace('_', ' ')}" for name, value in counts.items())
        line = f'<div class="long">{parents(record, known)}</div>'
        body.append(("", escape(record.method), place, "<br>".join(spent) or "-", line))
    heads = ("checkpoint", "file, sha256 of the weights", "its own training", "parents")
    return grid(heads, body)
