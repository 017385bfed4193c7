"""Pictures of the table: quality against cost, and samples from the same noise."""

import io
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import matplotlib
from torch import Tensor

from diffusion.checkpoint import write_atomic
from diffusion.pictures import grid
from eval.measure import sets
from eval.results.records import Record
from eval.results.together import fullest
from eval.show.lines import Line, lines

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogFormatter


class Plain(LogFormatter):
    """2 and 0.5, not 2×10^0 and 5×10^-1; between powers of ten where there is room."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return f"{value:g}" if super().__call__(value, position) else ""


def cost_plot(
    path: Path, records: list[Record], cost: Callable[[Line], float | None], label: str
) -> None:
    """Quality against a cost on log axes, one line per method, with the floor.

    Rows that have no such cost are left out; where none has one, no file is written.
    """
    found = [line for line in lines(records) if cost(line) is not None]
    if not found:
        return
    points = [
        (line.title, line.record.own_plan, cost(line), line.record.score, line.record.spread)
        for line in found
    ]
    curves(path, points, fullest([line.record for line in found]), label)


def curves(
    path: Path, points: list[tuple[str, bool, float, float, float]], any_of_them: Record, label: str
) -> None:
    """Points (title, own, cost, quality, spread) on log axes, a line a title; a solver's is dashed."""
    figure, axes = plt.subplots(figsize=(7.5, 5), dpi=120)
    colours, markers = plt.colormaps["tab20"].colors, iter("osD^vP*X<>hd")
    axes.set_prop_cycle(color=[*colours[::2], *colours[1::2]])
    for title in dict.fromkeys(title for title, *_ in points):
        same = sorted(rest for name, *rest in points if name == title)
        (own, *_), x, y, spread = zip(*same, strict=True)
        axes.errorbar(
            x, y, spread, label=_literal(title), marker=next(markers, "."), linestyle="-" if own else "--",
            capsize=2, alpha=1 if own else 0.6,
        )  # fmt: skip
    metric, floor = any_of_them.metric, mean(any_of_them.floor)
    axes.axhline(floor, color="gray", linestyle=":", label="floor: real images")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=f"{metric} (lower is better)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(Plain())
        axis.set_minor_formatter(Plain())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper right")
    _save(path, figure)


def nfe_plot(path: Path, records: list[Record]) -> None:
    cost_plot(path, records, lambda line: line.record.nfe, "network calls per image (NFE)")


def time_plot(path: Path, records: list[Record]) -> None:
    cost_plot(path, records, lambda line: line.milliseconds, "ms per image at batch 1")


def sample_rows(path: Path, records: list[Record], samples: dict[str, Tensor]) -> None:
    """A row of images per record, all from the same noise, and a row of real images.

    samples: by the records' tags, and of real images by "real" where there are any.
    """
    found = [(_words(line), samples[line.record.tag]) for line in lines(records)]
    found += [("real images", samples["real"])] if "real" in samples else []
    _strips(path, found)


def nearest_rows(path: Path, shown: list[Line], samples: dict[str, Tensor], train: Tensor) -> None:
    """Each line's images, and below them the training images nearest to them, pixel by pixel."""
    found = []
    for line in shown:
        made = samples[line.record.tag]
        distance, which = sets.nearest(made, train)
        away = f"nearest training images:\n{distance.median():.0f} of 255 away in the median"
        found += [(_words(line), made), (away, train[which])]
    _strips(path, found)


def _literal(text: str) -> str:
    """As it is: a name between two dollars is no formula."""
    return text.replace("$", r"\$")


def _words(line: Line) -> str:
    steps, nfe = line.record.steps, line.record.nfe
    return f"{_literal(line.title)}\n{steps} step{'s' * (steps > 1)}, {nfe} call{'s' * (nfe > 1)}"


def _strips(path: Path, found: list[tuple[str, Tensor]]) -> None:
    """A row of images each, with words at its left."""
    left = 0.1 + 0.063 * max(len(line) for words, _ in found for line in words.split("\n"))
    width = 0.5 * len(found[0][1]) + left + 0.1
    figure, grids = plt.subplots(
        len(found), 1, figsize=(width, 0.54 * len(found)), dpi=120, squeeze=False
    )
    for axis, (words, images) in zip(grids[:, 0], found, strict=True):
        picture = grid(images, columns=len(images)).permute(1, 2, 0)
        axis.imshow(picture.numpy(), interpolation="nearest")
        axis.set_axis_off()
        axis.text(-0.01, 0.5, words, ha="right", va="center", fontsize=7, transform=axis.transAxes)
    figure.subplots_adjust(left=left / width, right=0.995, top=0.995, bottom=0.005, hspace=0.04)
    _save(path, figure, tight=False)


def _save(path: Path, figure, tight: bool = True) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight" if tight else None)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
