"""The records as tables: for a terminal, as Markdown, LaTeX, CSV or JSON lines."""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from diffusion.console import out, printable, write
from eval.measure import quality
from eval.measure.quality import SHARE
from eval.results import jsonl, together
from eval.results.records import Record
from eval.show import columns
from eval.show.columns import ABOVE, TIMES, TRAININGS, TRIED, Cell, Columns, cell
from eval.show.lines import Comparison, Line

FURTHER, CLASSES = "Further figures", "Classes"  # too many columns for a terminal
SPEED_NOTES = {  # columns that need a word
    "first call, s": "first call: with compilation and warm-up",
    "ms @1": "ms @1: per image at batch 1, median and quartiles of the repeats",
    "p90, ms": "p90: of ms @1, where the repeats are enough to tell",
    "images/s": "images/s: at batch {batch_size}",
    "best images/s": "best images/s: @ the batch size that has them",
    "50,000 images": "50,000 images: at the most images/s that were timed",
    "peak MB": "peak MB: beyond what was held before the call",
}


@dataclass(frozen=True)
class Table:
    """What every format shows; the first two columns say which row it is."""

    title: str
    heads: tuple[str, ...]
    lines: list[Line]
    rows: list[tuple[Cell, ...]]
    """One for each line."""
    caption: str
    foot: tuple[Cell, ...] = ()
    """A last row, which stays last however the others are sorted."""

    @property
    def name(self) -> str:
        """Its title's first word: quality, speed, likelihood or further."""
        return self.title.split()[0].lower()

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The text of every row, the foot included."""
        feet = [self.foot] if self.foot else []
        return [tuple(cell.text for cell in row) for row in (*self.rows, *feet)]


def tables(comparison: Comparison) -> list[Table]:
    """Quality and its cost; where there are any, times in full, likelihoods, further figures."""
    rows, times = comparison.lines, comparison.times
    idle = () if times else TIMES
    idle += (TRAININGS,) * (max(len(line.trainings) for line in rows) == 1)
    idle += (ABOVE,) * all(line.above is None for line in rows)
    made = [_table("Quality and cost", columns.QUALITY, rows, caption(rows, times), leave_out=idle)]
    if times:
        first = comparison.records[0]
        speed = _table("Speed", columns.SPEED, rows, "", only_filled=True)
        notes = [f"noise to uint8 on {machine(first)}, synchronised"]
        notes += [note for head, note in SPEED_NOTES.items() if head in speed.heads]
        made.append(replace(speed, caption="; ".join(notes).format(batch_size=first.batch_size)))
    mine = [line for line in rows if line.record.own_plan]
    if trained := [line for line in mine if line.record.training or line.record.tried]:
        words = "images: that the network took gradients of, each as often as it did, and those of "
        words += "the students that it goes on from; network passes: forward, on an image each, of "
        words += "teacher and student together; these, iterations and minutes: of its own training"
        if any(line.record.tried for line in trained):
            words += f"; {TRIED}: that the method was tuned over, as whoever compared says"
        made.append(_table("Training", columns.TRAINING, trained, words, only_filled=True))
    if likely := [line for line in rows if line.record.likelihood]:
        images = likely[0].record.likelihood.get("images", "the")
        words = f"of {images} held-out images: the variational bound, and by the probability flow"
        made.append(_table("Likelihood", columns.LIKELIHOOD, likely, words, only_filled=True))
    others, real = (
        columns.further(comparison.records),
        together.fullest(comparison.records).held_out,
    )
    if len(others) > 2:
        figures = [cell(real.get(head), "{:.3g}".format) for head in [*others][2:]]
        foot = (Cell("held-out images"), Cell(""), *figures) if real else ()
        words = "a good model comes near to the held-out images"
        words = words if real else "no images are held out to compare with"
        note = "in brackets 95 % intervals, by a jackknife over the images"
        further = _table(FURTHER, others, rows, f"means over the seeds; {note}; {words}")
        made.append(replace(further, foot=foot))
    shares = columns.classes(comparison.records)
    if len(shares) > 2:
        figures = [columns.share(real.get(head.replace("class ", SHARE))) for head in [*shares][2:]]
        foot = (Cell("held-out images"), Cell(""), *figures) if real else ()
        words = "share of the images that the classifier takes for each class"
        made.append(replace(_table(CLASSES, shares, rows, words), foot=foot))
    return made


def _table(
    title: str,
    some: Columns,
    rows: list[Line],
    caption: str,
    leave_out: tuple[str, ...] = (),
    only_filled: bool = False,
) -> Table:
    """The columns' cells of each line; only_filled: of columns in which any line has something."""
    cells = {
        printable(head): [each._replace(text=printable(each.text)) for each in map(column, rows)]
        for head, column in some.items()
    }
    for head, made in [*cells.items()]:
        if head in leave_out or (only_filled and all(cell.text == "-" for cell in made)):
            del cells[head]
    body = list(zip(*cells.values(), strict=True))
    return Table(title, tuple(cells), rows, body, printable(caption))


def caption(rows: list[Line], times: bool) -> str:
    """What the figures of the first table are."""
    first = together.fullest([line.record for line in rows])
    accuracy = first.extractor.get("accuracy")
    sticks = _sticks(rows)
    floor = next(line.floor for line in rows if line.record.floor == first.floor)
    parts = [
        f"quality (lower is better): {first.metric} of {first.num_images} images, {over(rows)}",
        f"floor (as many real images{drawn(first)}) {floor:.3g}"
        + (f", classifier's accuracy {accuracy:.1%}" if accuracy else ""),
    ]
    if sticks:
        stick = sticks[0] if len(sticks) == 1 else f"that of its own teacher, {' or '.join(sticks)}"
        parts.append(f"× teacher: over {stick}")
    if any(line.above is not None for line in rows):
        parts.append(f"{ABOVE}: the same ratio of what both are above the floor")
    if any(line.interval for line in rows):
        parts.append(
            "in brackets 95 % intervals, over the images drawn and the seeds of the noise"
            + _trainings(rows)
        )
    if any(line.mark for line in rows):
        parts.append("*: best at its number of calls; ≈: the best there, and what ties with it")
    parts += [
        f"{line.title}: of so few, with a floor of {line.floor:.3g} and another bias, "
        "so that it is not compared with the others"
        for line in rows
        if line.fewer
    ]
    if times:
        batch = f"images/s at batch {first.batch_size} on {machine(first)}"
        parts += ["ms @1: per image at batch 1", batch]
    if judged := [line.title for line in rows if line.record.method.endswith("-frechet")]:
        parts.append(
            f"{', '.join(dict.fromkeys(judged))}: trained on a Fréchet distance, which so cannot "
            "judge it: see kid, precision, recall, density and coverage"
        )
    if any("collapsed" in line.warnings for line in rows):
        parts.append("(collapsed): coverage is below half of the held-out images'")
    if any(quality.unheld(line.record.further) for line in rows):
        parts.append(
            "no images are held out, so that neither collapse nor copying can be judged against "
            f"them; (copies) marks a row of which more than {quality.COPIED:.0%} are three times "
            "as near to one training image as to any other"
        )
    elif any("copies" in line.warnings for line in rows):
        parts.append("(copies): images too often lie on a training image")
    return "; ".join(parts)


def _trainings(rows: list[Line]) -> str:
    """Whether the intervals hold for other trainings too."""
    several = max(len(line.trainings) for line in rows) > 1
    return ", and over trainings where there are several" if several else " of this one training"


def _sticks(rows: list[Line]) -> list[str]:
    """The yardsticks' names, where any row has a ratio: one, or several teachers' each."""
    sticks = {line.yardstick.key: line.yardstick for line in rows if line.yardstick and line.ratio}
    titles = {line.record.key: line.title for line in rows}
    return [
        f"{titles.get(key, stick.title)} at {stick.nfe:,} calls ({stick.score:.3g})"
        for key, stick in sticks.items()
    ]


def drawn(record: Record) -> str:
    """How the floor's images are drawn, where they are more than the data has."""
    if not record.data["images"]:
        return ", drawn from a normal distribution of the saved statistics"
    if record.num_images <= record.data["images"]:
        return ""
    return f", drawn with replacement from {record.data['images']:,}"


def over(rows: list[Line]) -> str:
    """What the means are taken over."""
    seeds = together.fullest([line.record for line in rows]).seeds
    names = ", ".join(map(str, seeds))
    noise = f"mean over seeds {names}" if len(seeds) > 1 else f"seed {names}"
    several = max(len(line.trainings) for line in rows) > 1
    return f"{noise}; of a row of several trainings, their mean" if several else noise


def machine(record: Record) -> str:
    compiled = ", compiled" if record.environment.get("compile") else ""
    return f"{record.environment['device']}, {record.environment['precision']}{compiled}"


def terminal(comparison: Comparison) -> Group:
    """For rich; a table that is too wide goes on below, its rows named anew."""
    parts: list[RenderableType] = []
    for table in tables(comparison):
        if table.title in (FURTHER, CLASSES):
            continue
        for some in _blocks(table, out.width):
            block = RichTable(
                title=table.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
            )
            for i in some:
                justify = "right" if i else "left"
                block.add_column(escape(table.heads[i]), justify=justify, overflow="fold")
            for row in table.cells:
                block.add_row(*(escape(row[i]) for i in some))
            parts.append(block)
        parts += [Text(table.caption, "italic"), ""]
    return Group(*parts)


def _blocks(table: Table, width: int) -> list[list[int]]:
    """The columns of each part, as many as fit, after the two that name the row."""
    cells = [table.heads, *table.cells]
    widths = [2 + max(len(row[i]) for row in cells) for i in range(len(table.heads))]
    blocks: list[list[int]] = []
    for i in range(2, len(widths)):
        if not blocks or sum(widths[j] for j in [*blocks[-1], i]) >= width:
            blocks.append([0, 1])
        blocks[-1].append(i)
    return blocks


def literal(text: str) -> str:
    """A text as Markdown that shows it: no tag, no link, no emphasis, no formula."""
    return re.sub(r"[\\`*<>|$~&]|\](?=[(\[])|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text))


def markdown_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---", *["--:"] * (len(heads) - 1))
    texts = [[literal(cell) for cell in row] for row in (heads, *rows)]
    cells = (" | ".join(row) for row in (texts[0], rule, *texts[1:]))
    return "".join(f"| {line} |\n" for line in cells)


def markdown(comparison: Comparison) -> str:
    return "\n".join(
        f"**{table.title}**\n\n{markdown_table(table.heads, table.cells)}\n"
        f"{literal(table.caption)}\n"
        for table in tables(comparison)
    )


LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "[": "{[}", "–": "--"}
    | {"×": r"$\times$", "±": r"$\pm$", "≤": r"$\le$", "≈": r"$\approx$"}
)


def latex(comparison: Comparison) -> str:
    """Each a table that needs the package booktabs."""
    parts = []
    for table in tables(comparison):
        heads, *rows = (
            " & ".join(cell.translate(LATEX) for cell in row) + r" \\"
            for row in (table.heads, *table.cells)
        )
        alignment = "l" + "r" * (len(table.heads) - 1)
        parts.append(
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{table.title}: {table.caption.translate(LATEX)}.}}\n"
            f"\\begin{{tabular}}{{{alignment}}}\n\\toprule\n{heads}\n\\midrule\n"
            + "".join(f"{row}\n" for row in rows)
            + "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
        )
    return "% needs \\usepackage{booktabs}\n" + "\n".join(parts)


def comma_separated(comparison: Comparison) -> str:
    """One wide table of plain numbers, in full; nothing between two commas where there is none."""
    times = comparison.times
    heads = {name: column for name, column in columns.QUALITY.items() if times or name not in TIMES}
    heads |= columns.SPEED if times else {}
    heads |= columns.TRAINING | columns.LIKELIHOOD | columns.further(comparison.records)
    rows = [columns.plain(line, heads, times) for line in comparison.lines]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def json_lines(comparison: Comparison) -> str:
    """As results.jsonl, the whole of each record."""
    return jsonl.lines(comparison.records)


FORMATS: dict[str, Callable[[Comparison], RenderableType]] = {
    "rich": terminal,
    "markdown": markdown,
    "csv": comma_separated,
    "latex": latex,
    "jsonl": json_lines,
}


def show(form: str, comparison: Comparison) -> None:
    """Print the tables to stdout, in one of FORMATS."""
    made = FORMATS[form](comparison)
    if isinstance(made, str):
        write(made)
    else:
        out.print(made)
