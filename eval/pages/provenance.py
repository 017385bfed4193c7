"""How each number of a report was made, and what else was measured."""

from html import escape
from statistics import mean

from eval.pages import table as grid
from eval.records import Record
from eval.table import short, title, warned


def facts(rows: list[Record], left_out: int) -> str:
    first = rows[0]
    accuracy = first.extractor.get("accuracy")
    pairs = {
        "quality": f"{escape(first.metric)}, lower is better: mean ± spread over the noise seeds "
        f"{', '.join(map(str, first.seeds))}, {first.num_images:,} images each",
        "extractor": f"sha256 <code>{escape(str(first.extractor['sha256']))}</code>"
        + (f", {accuracy:.2%} of held-out images classified rightly" if accuracy else ""),
        "floor": f"{mean(first.floor):.3g}: the same metric of {first.num_images:,} real images, mean of "
        f"{len(first.floor)} draws between {min(first.floor):.3g} and {max(first.floor):.3g}",
        "NFE": "network calls per image, counted by a hook on the network",
        "ms @1": "noise to uint8 of one image, device synchronised, warmed up; median of the repeats",
        "images/s": f"the same for a batch of {min(first.batch_size, first.num_images)}",
        "machine": escape(", ".join(f"{k} {v}" for k, v in first.environment.items())),
    }
    if left_out:
        pairs["not shown"] = f"{left_out} records measured otherwise, or of runs since made anew"
    return "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in pairs.items())


def measured(rows: list[Record]) -> str:
    """What each row's figures are the mean and the median of."""
    body = []
    for r in rows:
        seconds = [1000 * s for s in r.single_seconds]
        times = f"{short(min(seconds))} to {short(max(seconds))} in {len(seconds)}"
        angles = f"{max(r.angles):.3g} to {min(r.angles):.3g}"
        by_seed = ", ".join(f"{q:.3g}" for q in r.quality)
        name = escape(title(r))
        body.append(("", name, r.steps, escape(r.sampler), angles, by_seed, times))
    heads = ("row", "steps", "sampler", "angles, rad", "quality by seed", "ms @1, repeats")
    return grid(heads, body)


def parents(record: Record, known: dict[str, Record]) -> str:
    """What it was distilled from, and that in turn, as far back as the records know."""
    names = []
    while record and record.parent and len(names) <= len(known):
        sha256, record = record.parent, known.get(record.parent)
        method = record.method if record else "not measured"
        names.append(f"{escape(method)} <code>{escape(sha256[:8])}</code>")
    return " ← ".join(names) or "none"


def checkpoints(rows: list[Record], found: list[Record]) -> str:
    known = {r.sha256: r for r in found}
    body = [
        (
            "",
            escape(r.method),
            f"{escape(r.run)}<br><code>{escape(r.sha256)}</code>",
            parents(r, known),
        )
        for r in {r.sha256: r for r in rows}.values()
    ]
    return grid(("checkpoint", "file, sha256 of the weights", "parents"), body)


def further(rows: list[Record]) -> str:
    """Figures beside the main one, of each row and, last, of held-out images; "" where none were measured."""
    names = list(dict.fromkeys(name for r in rows for name in r.others))
    if not names:
        return ""

    def cells(figures: dict[str, float]) -> list[str]:
        return [f"{figures[name]:.3g}" if name in figures else "-" for name in names]

    body = [
        ("", escape(" ".join([title(r), *warned(r)])), r.steps, *cells(r.further)) for r in rows
    ]
    body.append(("ship", "held-out real images", "", *cells(rows[0].held_out)))
    return (
        "<section><h2>Further figures</h2>"
        '<p class="note">Means over the seeds. The last row is what held-out real images have: a good model '
        "comes near to it.</p>"
        f'<div class="wide">{grid(("row", "steps", *map(escape, names)), body)}</div></section>'
    )
