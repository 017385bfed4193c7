"""The records as a table: rich for a terminal, Markdown for a page."""

from statistics import mean, median

from rich import box
from rich.table import Table

from eval.quality import warnings
from eval.records import Record

COLUMNS = (
    "method",
    "steps",
    "NFE",
    "quality",
    "× teacher",
    "ms @1",
    "images/s",
    "speed-up",
    "size",
)


def teacher_of(records: list[Record]) -> Record | None:
    """The row that others are compared with: a first ancestor's own plan, the longest."""
    roots = [record for record in records if record.own and record.parent is None]
    return max(roots, key=lambda record: record.nfe, default=None)


def images_per_second(record: Record) -> float:
    return min(record.batch_size, record.num_images) / median(record.batch_seconds)


def ratio(record: Record, teacher: Record) -> float:
    """To the larger of the teacher's figure and the floor."""
    return record.score / max(teacher.score, mean(teacher.floor))


def cells(records: list[Record]) -> list[tuple[str, ...]]:
    teacher = teacher_of(records)
    rows = []
    for record in records:
        times = images_per_second(record) / images_per_second(teacher) if teacher else None
        rows.append(
            (
                " ".join([title(record), *warned(record)]),
                str(record.steps),
                str(record.nfe),
                f"{record.score:.3g} ± {record.spread:.2g}",
                f"{ratio(record, teacher):.2f}" if teacher else "-",
                short(1000 * median(record.single_seconds)),
                short(images_per_second(record)),
                f"{short(times)}×" if times else "-",
                f"{record.parameters / 1e6:.2f} M",
            )
        )
    return rows


def title(record: Record) -> str:
    return record.method if record.own else f"{record.method}, {record.sampler}"


def warned(record: Record) -> list[str]:
    return [f"({word})" for word in warnings(record.further, record.held_out)]


def short(number: float) -> str:
    """Three digits, in full."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def caption(records: list[Record]) -> str:
    first = records[0]
    accuracy = first.extractor.get("accuracy")
    classifier = f", classifier's accuracy {accuracy:.1%}" if accuracy else ""
    return (
        f"quality (lower is better): {first.metric} of {first.num_images} images, mean ± spread over seeds "
        f"{', '.join(map(str, first.seeds))}; floor (as many real images) "
        f"{mean(first.floor):.3g}{classifier}; × teacher: over the larger of the "
        f"teacher's and the floor; ms @1: per image at batch 1; images/s at batch {first.batch_size} on "
        f"{first.environment['device']}, {first.environment['precision']}"
    )


def rich_table(records: list[Record]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption=caption(records), caption_justify="left")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in cells(records):
        table.add_row(*row)
    return table


def markdown(records: list[Record]) -> str:
    """The table, and one of the further figures."""
    further = [("method", "steps", *records[0].held_out)]
    for record in records:
        figures = (f"{record.further[name]:.3g}" for name in further[0][2:])
        further.append((title(record), str(record.steps), *figures))
    further.append(("held-out images", "", *(f"{v:.3g}" for v in records[0].held_out.values())))
    return f"{_grid([COLUMNS, *cells(records)])}\n{caption(records)}\n\n{_grid(further)}"


def _grid(lines: list[tuple[str, ...]]) -> str:
    rule = tuple("--:" if i else "---" for i in range(len(lines[0])))
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])
