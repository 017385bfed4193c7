"""The tables of eval.table as HTML that sorts by any column."""

from html import escape

from eval.show.columns import Cell
from eval.show.lines import Line
from eval.show.pages.chart import Look
from eval.show.table import Table


def section(table: Table, looks: dict[str, Look], ship: Line | None) -> str:
    """A heading, the table, its caption. looks: by title; ship: the row that stands out."""
    return (
        f"<section><h2>{escape(table.title)}</h2>"
        f'<div class="wide"><table id="{name(table)}" class="sortable">{grid(table, looks, ship)}'
        f'</table></div><p class="note">{escape(table.caption)}.</p></section>'
    )


def name(table: Table) -> str:
    """The id of its element: quality, speed, likelihood or further."""
    return table.title.split()[0].lower()


def grid(table: Table, looks: dict[str, Look], ship: Line | None) -> str:
    """Head, body and foot; each cell with the number that it is sorted by."""
    heads = (f'<button type="button">{escape(head)}</button>' for head in table.heads)
    head = "".join(f'<th scope="col">{button}</th>' for button in heads)
    body = []
    for line, cells in zip(table.lines, table.rows, strict=True):
        shown = [escape(cell.text) for cell in cells]
        pill = '<span class="pill">ship</span>' if line is ship else ""
        shown[0] = looks[line.title].mark() + shown[0] + pill
        kind = ' class="ship"' if line is ship else ""
        body.append(f'<tr{kind} data-tag="{line.record.tag}">{_cells(cells, shown)}</tr>')
    foot = _cells(table.foot, [escape(cell.text) for cell in table.foot])
    return (
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        f"{f'<tfoot><tr>{foot}</tr></tfoot>' if foot else ''}"
    )


def _cells(cells: tuple[Cell, ...], shown: list[str]) -> str:
    parts = []
    for i, (cell, text) in enumerate(zip(cells, shown, strict=True)):
        tag, more = ("td", "") if i else ("th", ' scope="row"')
        value = "" if cell.value is None else escape(str(cell.value))
        parts.append(f'<{tag}{more} data-value="{value}">{text}</{tag}>')
    return "".join(parts)
