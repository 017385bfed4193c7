"""A comparison as one web page: `python -m eval.report runs/digits/compare`."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, median

import tyro
from torch import Tensor

from diffusion import checkpoint
from diffusion import data as datasets
from diffusion.checkpoint import load_tensors, write_atomic
from diffusion.console import UserError, out, run
from diffusion.data import Dataset
from eval import pages, records, sets, table
from eval.pages import chart, provenance
from eval.records import Record

LIMITS = (1.2, 2.0)  # how much worse than the teacher a student that ships may be


@dataclass(frozen=True)
class Options:
    """Write report.html: the table, quality against cost, the samples, and which student to ship."""

    folder: tyro.conf.Positional[Path] = Path("runs/digits/compare")
    """What eval.compare wrote: results.jsonl and samples.safetensors."""
    data_dir: Path | None = None
    """Where a named dataset's files are, for the nearest training images."""


def comparable(found: list[Record]) -> list[Record]:
    """Those measured as the last one was, the latest of each run's plans alone, teachers first."""

    def setting(r: Record) -> tuple:
        place = sorted(r.environment.items())
        return r.metric, r.extractor["sha256"], r.num_images, r.seeds, r.batch_size, place

    same = [r for r in found if setting(r) == setting(found[-1])]
    latest = {(r.run, r.sampler, r.steps): r for r in same}
    return sorted(latest.values(), key=lambda r: r.parent is not None)


def milliseconds(record: Record) -> float:
    """Per image at batch 1."""
    return 1000 * median(record.single_seconds)


def students(rows: list[Record]) -> list[Record]:
    return [r for r in rows if r.own and r.parent is not None]


def cheapest(rows: list[Record], teacher: Record | None, limit: float) -> Record | None:
    """The fewest network calls within `limit` times the teacher; of equals, the best. None with a warning."""
    sound = [r for r in rows if teacher and not table.warned(r)]
    within = [r for r in sound if table.ratio(r, teacher) <= limit]
    return min(within, key=lambda r: (r.nfe, r.score), default=None)


def choice(rows: list[Record]) -> Record | None:
    """The student to ship: the cheapest within the first limit that any is within, else the best."""
    made, teacher = students(rows), table.teacher_of(rows)
    found = (cheapest(made, teacher, limit) for limit in LIMITS)
    return next(filter(None, found), best(made))


def best(rows: list[Record]) -> Record | None:
    """The least score of those without a warning, or where all have one, of all."""
    return min(rows, key=lambda r: (bool(table.warned(r)), r.score), default=None)


def calls(number: int) -> str:
    return f"{number:,} call" + "s" * (number != 1)


def named(record: Record) -> str:
    return f"<b>{full_title(record)} at {calls(record.nfe)}</b>"


def full_title(record: Record) -> str:
    return escape(" ".join([table.title(record), *table.warned(record)]))


def verdict(rows: list[Record]) -> str:
    """What to ship, in sentences, and the best student of each number of calls."""
    made, teacher, ship = students(rows), table.teacher_of(rows), choice(rows)
    if ship is None:
        return '<p class="lede">No student is among these rows, so there is none to ship.</p>'
    if teacher is None:
        words = f"The teacher is not among these rows. Of the students, {named(ship)} is the best."
        return f'<p class="lede">{words}</p>'

    def figures(r: Record) -> str:
        times = table.images_per_second(r) / table.images_per_second(teacher)
        return f"×&nbsp;teacher {table.ratio(r, teacher):.2f}, speed-up {table.short(times)}×"

    near, far = (cheapest(made, teacher, limit) for limit in LIMITS)
    words = f"the cheapest student within {LIMITS[0]:g}× of the teacher"
    lines = []
    if far is None:
        sound = "sound student" if table.warned(ship) else "student"
        words = f"the best, though no {sound} is within {LIMITS[1]:g}× of the teacher"
    elif near is None:
        words = f"the cheapest student within {LIMITS[1]:g}× of the teacher; none is within {LIMITS[0]:g}×"
    elif near is far:
        words += f", and within {LIMITS[1]:g}×"
    else:
        lines.append(f"If {LIMITS[1]:g}× will do: {named(far)} ({figures(far)}).")
    free = cheapest([r for r in rows if not r.own], teacher, LIMITS[0])
    lines.append(
        f"Without any training, the cheapest within {LIMITS[0]:g}× is {named(free)}."
        if free
        else f"Without any training, nothing compared here is within {LIMITS[0]:g}×."
    )
    floor = mean(ship.floor)
    tied = sum(r.score <= floor for r in rows)
    if tied > 1:
        lines.append(
            f"{tied} rows are at or below the floor ({floor:.3g}), where {ship.num_images:,} images "
            f"do not tell them from real ones: their order among themselves says little."
        )
    lede = f'<p class="lede">Ship {named(ship)}: {words} ({figures(ship)}).</p>'
    return f"{lede}<p>{' '.join(lines)}</p>{best_per_count(rows, teacher, ship)}"


def best_per_count(rows: list[Record], teacher: Record, ship: Record) -> str:
    body = []
    for nfe in sorted({r.nfe for r in students(rows)}):
        first = best([r for r in students(rows) if r.nfe == nfe])
        rival = best([r for r in rows if not r.own and r.nfe <= nfe])
        other = f"{table.ratio(rival, teacher):.2f} by {escape(rival.sampler)}" if rival else "-"
        ratio = f"{table.ratio(first, teacher):.2f}"
        body.append(("ship" * (first is ship), nfe, full_title(first), ratio, other))
    heads = ("calls", "best student", "× teacher", "without training")
    return f'<div class="wide best">{pages.table(heads, body)}</div>'


def main_table(rows: list[Record]) -> str:
    """The cells of eval.table, each with the number that it is sorted by."""
    rate, ship, teacher = table.images_per_second, choice(rows), table.teacher_of(rows)
    looks, lines = chart.looks(rows), []
    for record, cells in zip(rows, table.cells(rows), strict=True):
        ratio = table.ratio(record, teacher) if teacher else 0
        numbers = (record.steps, record.nfe, record.score, ratio, milliseconds(record))
        values = (cells[0], *numbers, rate(record), rate(record), record.parameters)
        pill = '<span class="pill">ship</span>' if record is ship else ""
        shown = [
            looks[table.title(record)].mark() + escape(cells[0]) + pill,
            *map(escape, cells[1:]),
        ]
        tags = ["th scope=row", *["td"] * (len(cells) - 1)]
        line = "".join(
            f'<{tag} data-value="{escape(str(value))}">{cell}</{tag[:2]}>'
            for tag, value, cell in zip(tags, values, shown, strict=True)
        )
        lines.append(f'<tr{" class=ship" * (record is ship)} data-tag="{record.tag}">{line}')
    head = "".join(
        f'<th scope="col"><button type="button">{escape(name)}</button></th>'
        for name in table.COLUMNS
    )
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"


def sample_section(rows: list[Record], images: dict[str, Tensor]) -> str:
    """A strip per row, a group per method, with falling numbers of steps."""
    shown = [r for r in rows if r.tag in images]
    if not shown:
        return ""
    groups = []
    for title in dict.fromkeys(map(table.title, shown)):
        own = sorted((r for r in shown if table.title(r) == title), key=lambda r: -r.steps)
        labels = [f"{escape(title)} <span>{calls(r.nfe)}, {r.score:.3g}</span>" for r in own]
        groups.append(list(zip(labels, (images[r.tag] for r in own), strict=True)))
    return (
        "<section><h2>The same noise through every row</h2>"
        '<p class="note">A column begins from one noise; the last figure is the quality. A sampler that draws '
        f"more noise on its way may end elsewhere.</p>{pages.strips(groups)}</section>"
    )


def dataset_of(record: Record, data_dir: Path | None) -> Dataset | None:
    """What the run was trained on, by its card, or by the metric's name where the run is gone."""
    name, size, channels = "-".join(record.metric.split("-")[2:-1]), 32, 3
    try:
        card = checkpoint.load(Path(record.run))[1]
        name, size, channels = (card.data[key] for key in ("name", "size", "channels"))
    except (UserError, OSError, KeyError):
        pass
    try:
        return datasets.load(name, data_dir, size, channels) if name else None
    except UserError:
        return None


def nearest_section(record: Record | None, images: dict[str, Tensor], load: Callable) -> str:
    made = images.get(record.tag) if record else None
    dataset = load(record) if made is not None else None
    if dataset is None or dataset.train.shape[1:] != made.shape[1:]:
        return ""
    distance, which = sets.nearest(made, dataset.train)
    usual = ""
    if len(dataset.test):
        held_out, _ = sets.nearest(dataset.test[:256], dataset.train)
        usual = f"; held-out real images lie {held_out.median():.0f} away"
    return (
        "<section><h2>Nearest training images</h2>"
        f'<p class="note">Below each image of {named(record)}, the training image nearest to it in root mean '
        f"square of the pixels' differences: {distance.median():.0f} of 255 in the median, at least "
        f"{distance.min():.0f}{usual}. A copy would be 0 away.</p>"
        f"{pages.strips([[('made', made), ('nearest', dataset.train[which])]])}</section>"
    )


def write(folder: Path, data_dir: Path | None = None) -> Path:
    """The page of a comparison's folder."""
    found = records.read(folder / "results.jsonl")
    if not found:
        raise UserError(f"{folder} holds no results.jsonl with records: run eval.compare first")
    rows = comparable(found)
    pictures = folder / "samples.safetensors"
    images = load_tensors(pictures)[0] if pictures.exists() else {}
    data = "-".join(rows[0].metric.split("-")[2:-1])
    quality = f"{rows[0].metric} (lower is better)"
    page = pages.fill(
        "report",
        title=escape(f"{data or 'Students'}: what fewer network calls cost"),
        verdict=verdict(rows),
        charts=chart.draw(rows, lambda r: r.nfe, "network calls per image (NFE)", quality)
        + chart.draw(rows, milliseconds, "ms per image at batch 1", quality),
        legend=chart.legend(rows),
        rows=main_table(rows),
        caption=escape(table.caption(rows)),
        samples=sample_section(rows, images),
        nearest=nearest_section(choice(rows), images, lambda r: dataset_of(r, data_dir)),
        further=provenance.further(rows),
        facts=provenance.facts(rows, len(found) - len(rows)),
        measured=provenance.measured(rows),
        checkpoints=provenance.checkpoints(rows, found),
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m eval.report", config=config)
    out.print(str(write(options.folder, options.data_dir)), markup=False)


if __name__ == "__main__":
    run(main)
