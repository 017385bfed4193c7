"""Quality against a cost as inline SVG: log axes, a line per method, the floor, the Pareto front."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import cycle

from eval.results.together import fullest
from eval.show.columns import short
from eval.show.lines import Line

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 350, 48, 34, 24, 44
COLOURS = 7  # --c0, the first teacher's, to --c6 in base.css
SHAPES = (
    "M4 0A4 4 0 1 1-4 0 4 4 0 1 1 4 0Z",
    "M-3.6-3.6H3.6V3.6H-3.6Z",
    "M0-5L5 0 0 5-5 0Z",
    "M0-4.8L4.6 3.4H-4.6Z",
    "M0 4.8L4.6-3.4H-4.6Z",
    "M-4.6 0L-2.3-4H2.3L4.6 0 2.3 4H-2.3Z",
)


@dataclass(frozen=True)
class Look:
    """A method's colour and marker: the same in both charts, the legend and the table."""

    own: bool
    colour: str
    shape: str

    @property
    def group(self) -> str:
        """An opening tag; what is in it is drawn in this look."""
        return f'<g class="series{"" if self.own else " free"}" style="--c:var(--{self.colour})">'

    def mark(self) -> str:
        line = '<path d="M-12 0H12"/>'
        dot = f'<path class="dot" d="{self.shape}"/>'
        return f'<svg class="mark" viewBox="-12 -7 24 14" aria-hidden="true">{self.group}{line}{dot}</g></svg>'


def looks(found: list[Line]) -> dict[str, Look]:
    """Title -> colour: students have the colours, teachers and solvers without training the greys."""
    # a student's colours and shapes are as many as have no common factor: 30 looks, all different
    made, shapes = {}, {True: cycle(SHAPES[1:]), False: cycle(SHAPES)}
    colours = cycle(f"c{i}" for i in range(1, COLOURS))
    for line in found:
        own, parent = line.record.own_plan, line.record.parent
        if line.title not in made:
            grey = "muted" if not own else "c0" if parent is None else None
            shape = SHAPES[0] if grey == "c0" else next(shapes[own])
            made[line.title] = Look(own, grey or next(colours), shape)
    return made


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, score) pairs that no other beats in one and equals in the other, by rising cost."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


@dataclass(frozen=True)
class Axis:
    """A log axis from value `low` at pixel `start` to value `high` at pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def over(values: list[float], start: float, end: float) -> "Axis":
        """Around the values, and never so short that it has no tick."""
        middle, pad = math.sqrt(min(values) * max(values)), 1.25
        low, high = min(min(values) / pad, middle / 2), max(max(values) * pad, middle * 2)
        return Axis(low, high, start, end)

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if self.high / self.low < 5000 else (1,)
        every = (digit * 10.0**decade for decade in decades for digit in digits)
        return [value for value in every if self.low <= value <= self.high]


def _text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def draw(found: list[Line], cost: Callable[[Line], float | None], xlabel: str, ylabel: str) -> str:
    """One chart of the rows that have that cost; "" where none has.

    A score at or below 0, which rounding can make of 0, is drawn at the bottom.
    """
    rows = [line for line in found if cost(line) is not None]
    if not rows:
        return ""
    first = fullest([line.record for line in rows])
    floor = [value for value in first.floor if value > 0] or [1e-9]
    middle = sum(floor) / len(floor)
    scores = [max(line.record.score, middle / 100) for line in rows]
    x = Axis.over([cost(line) for line in rows], LEFT, WIDTH - RIGHT)
    y = Axis.over([*scores, middle], HEIGHT - BOTTOM, TOP)
    whole = [line for line in rows if not line.fewer] or rows
    best = front([(cost(line), line.record.score) for line in whole])
    series = [_series(rows, title, look, cost, x, y) for title, look in looks(found).items()]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(ylabel)} against {escape(xlabel)}">'
        f"{_axes(x, y, xlabel, ylabel)}"
        f'<rect class="band" x="{x.start}" width="{x.end - x.start}" y="{y(max(floor))}" height="{y(min(floor)) - y(max(floor)):.2f}"/>'
        f'<path class="floor" d="M{x.start} {y(middle)}H{x.end}"/>{_text(x.end + 4, y(middle) + 4, "floor", "start")}'
        f"{_staircase(best, x, y)}{''.join(series)}</svg>"
    )


def _axes(x: Axis, y: Axis, xlabel: str, ylabel: str) -> str:
    parts = [f'<path class="grid" d="M{x(v)} {y.start}V{y.end}"/>' for v in x.ticks]
    parts += [f'<path class="grid" d="M{x.start} {y(v)}H{x.end}"/>' for v in y.ticks]
    parts += [_text(x(v), y.start + 16, _tick(v)) for v in x.ticks]
    parts += [_text(x.start - 6, y(v) + 4, _tick(v), "end") for v in y.ticks]
    parts.append(_text((x.start + x.end) / 2, HEIGHT - 8, xlabel))
    parts.append(_text(8, 15, ylabel, "start"))
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _staircase(points: list[tuple[float, float]], x: Axis, y: Axis) -> str:
    """The least score to be had at each cost: level from one point of the front to the next."""
    first, *rest = points
    path = f"M{x(first[0])} {y.end}V{y(first[1])}"
    path += "".join(f"H{x(c)}V{y(score)}" for c, score in rest)
    return f'<path class="front" d="{path}H{x.end}"/>'


def _series(rows: list[Line], title: str, look: Look, cost, x: Axis, y: Axis) -> str:
    own = sorted((line for line in rows if line.title == title), key=cost)
    if not own:
        return ""
    places = [(x(cost(line)), y(line.record.score)) for line in own]
    parts = [look.group, f'<path d="M{"L".join(f"{px} {py}" for px, py in places)}"/>']
    for line, (px, py) in zip(own, places, strict=True):
        r = line.record
        if r.spread:
            parts.append(
                f'<path class="bar" d="M{px} {y(r.score - r.spread)}V{y(r.score + r.spread)}"/>'
            )
        words = f"{line.name}, {r.steps:,} steps, {r.nfe:,} calls: {r.score:.3g} ± {r.spread:.2g}, {short(cost(line))}"
        dot = f'<path class="dot" transform="translate({px} {py})" d="{look.shape}">'
        parts.append(f"{dot}<title>{escape(words)}</title></path>")
    return "".join([*parts, "</g>"])


def legend(found: list[Line]) -> str:
    items = [f"{look.mark()}{escape(title)}" for title, look in looks(found).items()]
    small = '<svg class="mark" viewBox="-12 -7 24 14" aria-hidden="true">'
    items.append(
        f'{small}<path class="front" d="M-12 0H12"/></svg>Pareto front: none is both better and cheaper'
    )
    items.append(
        f'{small}<rect class="band" x="-12" y="-6" width="24" height="12"/><path class="floor" d="M-12 0H12"/></svg>'
        "floor: as many real images, least to greatest of the draws"
    )  # fmt: skip
    return "".join(f"<li>{item}</li>" for item in items)
