"""Pictures of a comparison, each drawn by one function for the PNG and for the web page: quality
against a cost, samples from the same noise, the nearest training images."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import mean
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

from diffusion.console import printable
from diffusion.pictures import grid
from eval.measure import sets
from eval.measure.intervals import Interval
from eval.results.records import Record
from eval.results.together import fullest
from eval.show.lines import Line

matplotlib.rcdefaults()  # a user's file may ask for LaTeX, or for letters that cannot be read
CALLS, MILLISECONDS = "network calls per image (NFE)", "ms per image at batch 1"
COLOURS = [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
MARKERS = "osD^vP*X<>hd"
FRONT = "goldenrod"


@dataclass(frozen=True)
class Picture:
    figure: Figure
    words: str
    """What it shows, for those who do not see it."""
    tight: bool = True
    """Whether its margins are cut off."""

    def file(self, form: str) -> bytes:
        """As a file; form: png or svg."""
        buffer = io.BytesIO()
        date = {"Date": None} if form == "svg" else None  # the same bytes every time
        box = "tight" if self.tight else None
        with matplotlib.rc_context({"svg.hashsalt": self.words}):
            self.figure.savefig(buffer, format=form, bbox_inches=box, metadata=date)
        return buffer.getvalue()

    def uri(self, form: str) -> str:
        """As an address that holds the whole file."""
        kind = {"png": "image/png", "svg": "image/svg+xml"}[form]
        return f"data:{kind};base64,{base64.b64encode(self.file(form)).decode()}"


class Point(NamedTuple):
    """A row on a chart."""

    title: str
    free: bool
    """Whether it is a solver's row, which needs no training."""
    cost: float
    score: float
    interval: Interval | None
    """95 %; None where it is not known."""
    alone: bool = False
    """Whether its score, on fewer images, is not compared with the others'."""


class PlainNumbers(LogFormatter):
    """2 and 0.5, not 2×10^0 and 5×10^-1; between powers of ten where there is room."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def cost_chart(
    lines: list[Line], cost: Callable[[Line], float | None], label: str
) -> Picture | None:
    """Quality against a cost of the rows that have it; None where none has."""
    costs = [(line, value) for line in lines if (value := cost(line)) is not None]
    points = [
        Point(x.title, x.free, value, x.record.score, x.interval, x.fewer) for x, value in costs
    ]
    return chart(points, fullest([x.record for x, _ in costs]), label) if costs else None


def chart(points: Sequence[Point], first: Record, label: str) -> Picture:
    """Quality against a cost on log axes: a line for each title, the floor, the Pareto front.

    first: the record that names the metric and the floor. A score at or below 0, which rounding
    can make of 0, is drawn at the bottom.
    """
    figure = Figure(figsize=(7.5, 5), dpi=120)
    axes = figure.add_subplot()
    floor = [value for value in first.floor if value > 0] or [1e-9]
    bottom, colours, markers = mean(floor) / 100, cycle(COLOURS), cycle(MARKERS)
    points = [point._replace(score=max(point.score, bottom)) for point in points]
    for title in dict.fromkeys(point.title for point in points):
        row = sorted(point for point in points if point.title == title)
        colour = "gray" if row[0].free else next(colours)
        axes.errorbar(
            [point.cost for point in row],
            [point.score for point in row],
            [*zip(*(_bars(point, bottom) for point in row), strict=True)],
            label=_literal(title),
            color=colour,
            marker=next(markers),
            linestyle="--" if row[0].free else "-",
            capsize=2,
        )
    compared = [point for point in points if not point.alone] or points
    costs, scores = zip(*front([(point.cost, point.score) for point in compared]), strict=True)
    (steps,) = axes.step(costs, scores, where="post", color=FRONT, linewidth=6, alpha=0.4, zorder=0)
    steps.set_label("Pareto front: none is both better and cheaper")
    axes.axhspan(min(floor), max(floor), color="gray", alpha=0.12, linewidth=0)
    axes.axhline(
        mean(floor), color="gray", linestyle=":", label="floor: as many real images, and the draws"
    )
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.set_ylabel(_literal(f"{first.metric} (lower is better)"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PlainNumbers())
        axis.set_minor_formatter(PlainNumbers())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    titles = ", ".join(dict.fromkeys(point.title for point in points))
    return Picture(figure, f"{first.metric} against {label}, both logarithmic, of {titles}")


def _bars(point: Point, bottom: float) -> tuple[float, float]:
    """How far its error bar reaches down and up; not below the chart."""
    low, high = point.interval or (point.score, point.score)
    return max(0.0, point.score - max(low, bottom)), max(0.0, high - point.score)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, score) pairs that no other beats in one and equals in the other, by cost."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def samples(lines: list[Line], images: dict[str, Tensor]) -> Picture | None:
    """A strip of images per row that has some, all from the same noise, and one of real images.

    images: by the records' tags, and of real images by "real" where there are any.
    """
    strips = [(label(line), images[line.record.tag]) for line in lines if line.record.tag in images]
    if not strips:
        return None
    strips += [("real images", images["real"])] if "real" in images else []
    titles = "; ".join(label.replace("\n", ", ") for label, _ in strips)
    return _strips(strips, f"Images from the same noise, a row each: {titles}")


def nearest(made: list[tuple[Line, Tensor]], train: Tensor, test: Tensor | None = None) -> Picture:
    """Each row's images, and below them the training images nearest to them, pixel by pixel.

    test: held-out images, to say how near such images lie.
    """
    strips, words = [], []
    for line, images in made:
        distance, which = sets.nearest(images, train)
        middle, least = f"{distance.median():.0f}", f"{distance.min():.0f}"
        near = f"nearest training images:\n{middle} of 255 away in the median"
        strips += [(label(line), images), (near, train[which])]
        words.append(
            f"below each image of {line.name} at {line.calls}, the training image nearest to it in "
            f"root mean square of the pixels' differences: {middle} of 255 in the median, at least "
            f"{least}"
        )
    if test is not None and len(test):
        usual, _ = sets.nearest(test[:256], train)
        words.append(f"held-out real images lie {usual.median():.0f} away")
    return _strips(strips, f"{'; '.join(words)}. A copy would be 0 away.")


def label(line: Line) -> str:
    """A row's name beside its images, in two lines."""
    return f"{printable(line.title)}\n{line.calls}, {line.record.score:.3g}"


def _literal(text: str) -> str:
    """As it is: a name between two dollars is no formula, and what no font has is written out."""
    return printable(text).replace("$", r"\$")


def _strips(strips: list[tuple[str, Tensor]], words: str) -> Picture:
    """A row of images each, with words at its left."""
    left = 0.1 + 0.063 * max(len(line) for label, _ in strips for line in label.split("\n"))
    width, height = 0.5 * len(strips[0][1]) + left + 0.1, 0.54 * len(strips)
    figure = Figure(figsize=(width, height), dpi=120)
    grids = figure.subplots(len(strips), 1, squeeze=False)
    for axis, (label, images) in zip(grids[:, 0], strips, strict=True):
        picture = grid(images, columns=len(images)).permute(1, 2, 0)
        axis.imshow(picture.numpy(), interpolation="nearest")
        axis.set_axis_off()
        place = {"ha": "right", "va": "center", "fontsize": 7, "transform": axis.transAxes}
        axis.text(-0.01, 0.5, "\n".join(map(_literal, label.split("\n"))), **place)
    figure.subplots_adjust(left=left / width, right=0.995, top=0.995, bottom=0.005, hspace=0.04)
    return Picture(figure, words, tight=False)
