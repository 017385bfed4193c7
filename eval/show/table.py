"""The records as tables: for a terminal, as Markdown, LaTeX, CSV or JSON lines."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from diffusion.console import out
from eval.measure import quality
from eval.results import jsonl, together
from eval.results.records import Record
from eval.show.columns import (
    LIKELIHOOD,
    QUALITY,
    SPEED,
    TIMES,
    TRAININGS,
    Cell,
    Columns,
    cell,
    further,
    plain,
)
from eval.show.lines import Line, lines

FURTHER = "Further figures"  # so many columns that a terminal does without them


@dataclass(frozen=True)
class Table:
    """What every format shows; the first two columns say which row it is."""

    title: str
    columns: Columns
    lines: list[Line]
    caption: str
    foot: tuple[Cell, ...] = ()
    """A last row, which stays last however the others are sorted."""

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(self.columns)

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        """One for each line."""
        return [tuple(column(line) for column in self.columns.values()) for line in self.lines]

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The text of every row, the foot included."""
        rows = [*self.rows, self.foot] if self.foot else self.rows
        return [tuple(cell.text for cell in row) for row in rows]


def tables(records: list[Record], times: bool = True) -> list[Table]:
    """Quality and what it costs; where there are any, times in full, likelihoods, further figures.

    UserError where the rows are not comparable.
    """
    together.require_comparable(records, times)
    found, times = lines(records), times and any(record.timings for record in records)
    made = [Table("Quality and cost", _costs(found, times), found, caption(found, times))]
    if times:
        speed = _filled(SPEED, found)
        made.append(Table("Speed", speed, found, _speed_caption(speed, records[0])))
    if likely := [line for line in found if line.record.likelihood]:
        images = likely[0].record.likelihood.get("images", "the")
        words = f"of {images} held-out images: the variational bound, and by the probability flow"
        made.append(Table("Likelihood", _filled(LIKELIHOOD, likely), likely, words))
    columns, real = further(records), together.fullest(records).held_out
    if len(columns) > 2:
        foot = [Cell("held-out images"), Cell("")]
        foot += [cell(real.get(head), "{:.3g}".format) for head in [*columns][2:]]
        words = "means over the seeds; a good model comes near to the held-out images"
        if not real:
            foot, words = [], "means over the seeds; no images are held out to compare with"
        made.append(Table(FURTHER, columns, found, words, tuple(foot)))
    return made


def _costs(found: list[Line], times: bool) -> Columns:
    """QUALITY without what these rows have nothing to say of."""
    idle = () if times else TIMES
    idle += (TRAININGS,) * (max(len(line.trainings) for line in found) == 1)
    return {head: column for head, column in QUALITY.items() if head not in idle}


def _filled(columns: Columns, found: list[Line]) -> Columns:
    """Those in which any row has something."""
    return {
        head: column
        for head, column in columns.items()
        if any(column(line).text != "-" for line in found)
    }


def caption(found: list[Line], times: bool) -> str:
    """What the figures of the first table are."""
    first = together.fullest([line.record for line in found])
    accuracy = first.extractor.get("accuracy")
    several = max(len(line.trainings) for line in found) > 1
    parts = [
        f"quality (lower is better): {first.metric} of {first.num_images} images, "
        + over(first, several),
        f"floor (as many real images{drawn(first)}) {mean(first.floor):.3g}"
        + (f", classifier's accuracy {accuracy:.1%}" if accuracy else ""),
    ]
    parts += [f"× teacher: over the larger of the floor and {stick}" for stick in _sticks(found)]
    parts += [
        f"{line.title}: of so few, with a floor of {mean(line.record.floor):.3g} and another bias, "
        "so that it is not compared with the others"
        for line in found
        if line.fewer
    ]
    if times:
        parts += [
            "ms @1: per image at batch 1",
            f"images/s at batch {first.batch_size} on {machine(first)}",
        ]
    if any("collapsed" in line.warnings for line in found):
        parts.append("(collapsed): coverage is below half of the held-out images'")
    if any(quality.unheld(line.record.further) for line in found):
        parts.append(
            "no images are held out, so that neither collapse nor copying can be judged against "
            f"them; (copies) marks a row of which more than {quality.COPIED:.0%} are three times as "
            "near to one training image as to any other"
        )
    elif any("copies" in line.warnings for line in found):
        parts.append("(copies): images too often lie on a training image")
    return "; ".join(parts)


def _sticks(found: list[Line]) -> list[str]:
    """The yardsticks' names, where any row has a ratio: one, or of several teachers its own each."""
    sticks = {line.yardstick.key: line.yardstick for line in found if line.ratio}
    titles = {line.record.key: line.title for line in found}
    words = [
        f"{titles.get(key, stick.title)} at {stick.nfe:,} calls ({stick.score:.3g})"
        for key, stick in sticks.items()
    ]
    if len(words) > 1:
        return [f"that of its own teacher, {' or '.join(words)}"]
    return words


def drawn(record: Record) -> str:
    """How the floor's images are drawn, where they are more than the data has."""
    if record.num_images <= record.data["images"]:
        return ""
    return f", drawn with replacement from {record.data['images']:,}"


def over(first: Record, several: bool) -> str:
    """What the means are of; several: whether any row has more than one training."""
    seeds = ", ".join(map(str, first.seeds))
    noise = f"mean ± spread over seeds {seeds}" if len(first.seeds) > 1 else f"seed {seeds}"
    if not several:
        return noise
    return f"{noise}; of a row of several trainings, mean ± spread over these"


def _speed_caption(columns: Columns, first: Record) -> str:
    told = {
        "first call, s": "first call: with compilation and warm-up",
        "ms @1": "ms @1: per image at batch 1, median and quartiles of the repeats",
        "p90, ms": "p90: of ms @1, where the repeats are enough to tell",
        "images/s": f"images/s: at batch {first.batch_size}",
        "best images/s": "best images/s: @ the batch size that has them",
        "50,000 images": "50,000 images: at the most images/s that were timed",
        "peak MB": "peak MB: beyond what was held before the call",
    }
    words = [f"noise to uint8 on {machine(first)}, synchronised"]
    return "; ".join([*words, *(text for head, text in told.items() if head in columns)])


def machine(record: Record) -> str:
    compiled = ", compiled" if record.environment.get("compile") else ""
    return f"{record.environment['device']}, {record.environment['precision']}{compiled}"


def terminal(records: list[Record], times: bool = True) -> Group:
    """For rich; a table that is too wide goes on below, its rows named anew."""
    parts: list[RenderableType] = []
    for table in tables(records, times):
        blocks = _blocks(table, out.width) if table.title != FURTHER else []
        for columns in blocks:
            shown = RichTable(
                title=table.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
            )
            for i in columns:
                justify = "right" if i else "left"
                shown.add_column(escape(table.heads[i]), justify=justify, overflow="fold")
            for row in table.cells:
                shown.add_row(*(escape(row[i]) for i in columns))
            parts.append(shown)
        parts += [Text(table.caption, "italic"), ""] if blocks else []
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


def markdown(records: list[Record], times: bool = True) -> str:
    parts = []
    for table in tables(records, times):
        rule = tuple("--:" if i else "---" for i in range(len(table.heads)))
        grid = [table.heads, rule, *table.cells]
        lines = (" | ".join(cell.replace("|", r"\|") for cell in row) for row in grid)
        body = "".join(f"| {line} |\n" for line in lines)
        parts.append(f"**{table.title}**\n\n{body}\n{table.caption}\n")
    return "\n".join(parts)


LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "[": "{[}", "–": "--"}
    | {"×": r"$\times$", "±": r"$\pm$", "≤": r"$\le$"}
)


def latex(records: list[Record], times: bool = True) -> str:
    """Each a table that needs the package booktabs."""
    parts = []
    for table in tables(records, times):
        rows = [" & ".join(cell.translate(LATEX) for cell in row) for row in table.cells]
        body = "".join(f"{row} \\\\\n" for row in rows)
        heads = " & ".join(head.translate(LATEX) for head in table.heads)
        parts.append(
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{table.title}: {table.caption.translate(LATEX)}.}}\n"
            f"\\begin{{tabular}}{{l{'r' * (len(table.heads) - 1)}}}\n\\toprule\n"
            f"{heads} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
        )
    return "% needs \\usepackage{booktabs}\n" + "\n".join(parts)


def comma_separated(records: list[Record], times: bool = True) -> str:
    """One wide table of plain numbers, in full; nothing between two commas where there is none."""
    together.require_comparable(records, times)
    columns = {head: column for head, column in QUALITY.items() if times or head not in TIMES}
    columns |= (SPEED if times else {}) | LIKELIHOOD | further(records)
    rows = [plain(line, columns, times) for line in lines(records)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def json_lines(records: list[Record], times: bool = True) -> str:
    """As results.jsonl, the whole of each record."""
    return jsonl.lines(records)


FORMATS: dict[str, Callable[[list[Record], bool], RenderableType]] = {
    "rich": terminal,
    "markdown": markdown,
    "csv": comma_separated,
    "latex": latex,
    "jsonl": json_lines,
}


def show(form: str, records: list[Record], times: bool = True) -> None:
    """Print the tables to stdout, in one of FORMATS."""
    found = FORMATS[form](records, times)
    if isinstance(found, str):
        print(found, end="")
    else:
        out.print(found)
