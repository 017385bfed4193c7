"""Pictures of the table: quality against cost, and samples from the same noise."""

import io
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import matplotlib
from torch import Tensor

from diffusion.checkpoint import write_atomic
from diffusion.pictures import grid
from eval.records import Record
from eval.table import title

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter


def cost_plot(
    path: Path, records: list[Record], cost: Callable[[Record], float], label: str
) -> None:
    """Quality against a cost on log axes, one line per method, with the floor."""
    figure, axes = plt.subplots(figsize=(7.5, 5), dpi=120)
    markers = iter("osD^vP*X<>hd")
    for method in dict.fromkeys(map(title, records)):
        rows = sorted((r for r in records if title(r) == method), key=cost)
        style = "-" if rows[0].own else "--"
        x, y, spread = zip(*((cost(r), r.score, r.spread) for r in rows), strict=True)
        axes.errorbar(
            x, y, spread, label=method, marker=next(markers, "."), linestyle=style, capsize=2,
            alpha=1 if rows[0].own else 0.6,
        )  # fmt: skip
    axes.axhline(mean(records[0].floor), color="gray", linestyle=":", label="floor: real images")
    axes.set(
        xscale="log", yscale="log", xlabel=label, ylabel=f"{records[0].metric} (lower is better)"
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper right")
    _save(path, figure)


def nfe_plot(path: Path, records: list[Record]) -> None:
    cost_plot(path, records, lambda record: record.nfe, "network calls per image (NFE)")


def time_plot(path: Path, records: list[Record]) -> None:
    def milliseconds(record: Record) -> float:
        return 1000 * median(record.single_seconds)

    cost_plot(path, records, milliseconds, "ms per image at batch 1")


def sample_rows(path: Path, records: list[Record], samples: list[Tensor], real: Tensor) -> None:
    """A row of images per record, all from the same noise, and a row of real images."""
    rows = [*samples, real]
    titles = [f"{title(r)}\n{r.steps} steps, {r.nfe} calls" for r in records] + ["real images"]
    width = 0.5 * rows[0].shape[0] + 2.4
    figure, axes = plt.subplots(len(rows), 1, figsize=(width, 0.54 * len(rows)), dpi=120)
    for axis, images, words in zip(axes, rows, titles, strict=True):
        axis.imshow(
            grid(images, columns=len(images)).permute(1, 2, 0).numpy(), interpolation="nearest"
        )
        axis.set_axis_off()
        axis.text(-0.01, 0.5, words, ha="right", va="center", fontsize=7, transform=axis.transAxes)
    figure.subplots_adjust(left=2.3 / width, right=0.995, top=0.995, bottom=0.005, hspace=0.04)
    _save(path, figure, tight=False)


def _save(path: Path, figure, tight: bool = True) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight" if tight else None)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
