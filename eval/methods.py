"""Methods against network calls, over training seeds: `python -m eval.methods RESULTS`."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Literal

import tyro
from rich.table import Table
from scipy.stats import kendalltau

from diffusion.console import UserError, diverted, out, plain, printable, run, say, write
from diffusion.files import write_atomic
from eval.measure.intervals import Estimate, Interval
from eval.report import latest, left_out
from eval.results import jsonl, together
from eval.results.records import Record
from eval.show.columns import between, gradient_images
from eval.show.lines import lines
from eval.show.pictures import CALLS, Point, chart
from eval.show.table import literal, markdown_table


@dataclass(frozen=True)
class Options:
    """Set methods against numbers of calls: one figure for all students that differ in their seed
    alone.

    Say where another distance ranks the methods otherwise. Write methods.md, methods.json and
    methods.png beside the first file of results.
    """

    results: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/digits/compare/results.jsonl"),)
    """Files results.jsonl that eval.compare wrote, one or several."""
    table: Literal["rich", "markdown", "json"] = "rich"
    """How to print the table. With markdown or json all else goes to stderr."""


@dataclass(frozen=True)
class Pool:
    """One method at one number of calls: figures by name, one of each for each training seed."""

    method: str
    nfe: int
    own_plan: bool
    """Whether by its own plan, not a solver's."""
    student: bool
    images: int | None
    """That the student, and those that it goes on from, took gradients of."""
    figures: dict[str, list[float]]
    ratio: float | None
    """The mean over the teacher's figure."""
    interval: Interval | None = None
    """95 %, of the first figure."""
    mark: str = ""
    """Whether it is the best at its number of calls, or ties with it."""
    estimates: dict[str, Estimate] = field(default_factory=dict)
    """The figures' means with their variances, where these are known."""

    def mean(self, name: str) -> float:
        return mean(self.figures[name])

    def plain(self) -> dict[str, object]:
        """For a program to read."""
        return {name: value for name, value in asdict(self).items() if name != "estimates"}

    @property
    def text(self) -> str:
        name = next(iter(self.figures))
        ratio = "" if self.ratio is None else f", {self.ratio:.2f}×"
        return f"{self.mean(name):.3g}{between(self.interval)}{ratio} {self.mark}".strip()


def pools(records: list[Record]) -> list[Pool]:
    """The lines of the table, in its order.

    The first figure is the table's own; the others are distances too: on random features, sliced
    Wasserstein and KID.
    """
    first, *rest = records
    names = [
        name
        for name in first.others
        if (name.startswith("fd-random") or name in ("sliced-wasserstein", "kid"))
        and all(name in record.others for record in rest)
    ]
    made = []
    for line in (line for line in lines(records) if not line.record.outside):
        record, trainings = line.record, line.trainings
        figures = {record.metric: [training.score for training in trainings]}
        figures |= {name: [training.further[name] for training in trainings] for name in names}
        images = gradient_images(record)
        estimates = {record.metric: line.estimate} | {name: line.figure(name) for name in names}
        known = {name: one for name, one in estimates.items() if one}
        kind = line.title, record.nfe, record.own_plan, record.student
        made.append(Pool(*kind, images, figures, line.ratio, line.interval, line.mark, known))
    return made


@dataclass(frozen=True)
class Ranking:
    """How far another distance orders the methods at so many calls as the first does."""

    nfe: int
    distance: str
    tau: float
    """Kendall's, 1 for the same order."""
    swapped: list[tuple[str, str]]
    """Pairs (better by the first distance, better by this one), neither of them a tie."""


def rankings(pooled: list[Pool]) -> list[Ranking]:
    """One for each number of calls that several methods share, and each other distance."""

    def below(a: Pool, b: Pool, name: str) -> bool:
        if name not in a.estimates or name not in b.estimates:
            return False
        return a.estimates[name].less(b.estimates[name]).interval()[1] < 0

    made = []
    for nfe in sorted({pool.nfe for pool in pooled}):
        rivals = [pool for pool in pooled if pool.nfe == nfe]
        if len(rivals) < 2:
            continue
        first, *others = rivals[0].figures
        for other in others:
            ours, theirs = ([pool.mean(name) for pool in rivals] for name in (first, other))
            swapped = [
                (a.method, b.method)
                for pair in combinations(rivals, 2)
                for a, b in (pair, pair[::-1])
                if below(a, b, first) and below(b, a, other)
            ]
            tau = float(kendalltau(ours, theirs).statistic)
            made.append(Ranking(nfe, other, tau, swapped))
    return made


def in_words(ranked: list[Ranking]) -> list[str]:
    """The rankings, one distance a line."""
    words = []
    for name in dict.fromkeys(ranking.distance for ranking in ranked):
        counts = [ranking for ranking in ranked if ranking.distance == name]
        taus = ", ".join(f"{r.tau:.2f} at {r.nfe}" for r in counts)
        pairs = [f"{b} before {a} at {r.nfe}" for r in counts for a, b in r.swapped]
        swaps = (
            f"it puts {', '.join(pairs)}"
            if pairs
            else "no two that both distances part swap places"
        )
        words.append(f"{name} orders the methods with Kendall's tau {taus} calls; {swaps}")
    return words


def matrix(pooled: list[Pool]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows: a method a row, its calls a column."""
    counts = sorted({pool.nfe for pool in pooled})
    body = []
    for method in dict.fromkeys(pool.method for pool in pooled):
        cells = {pool.nfe: pool for pool in pooled if pool.method == method}
        # a chain of rounds has spent the most at its end
        images = max((pool.images for pool in cells.values() if pool.images), default=None)
        texts = (cells[n].text if n in cells else "-" for n in counts)
        body.append((method, "-" if images is None else f"{images:,}", *texts))
    return ("method", "images", *(f"{n} call{'s' * (n > 1)}" for n in counts)), body


def summarise(options: Options) -> list[Pool]:
    """The pooled table of these files; writes it, its figures and its plot."""
    for path in options.results:
        if not path.exists():
            raise UserError(
                f"there is no file {path}: expected a results.jsonl that eval.compare wrote"
            )
    given = together.merge(map(jsonl.read, options.results))
    records = latest(given, times=False)
    if not records:
        raise UserError(f"{options.results[0]} holds no rows: measure some with eval.compare")
    for reason in left_out(given, records, times=False):
        say(f"left out: {reason}")
    pooled = pools(records)
    seeds = max(len(next(iter(pool.figures.values()))) for pool in pooled)
    first, ranked = together.fullest(records), rankings([pool for pool in pooled if pool.student])
    notes = [
        f"{first.metric} of {first.num_images} images (lower is better), the mean of noise seeds "
        f"{', '.join(map(str, first.seeds))} and of up to {seeds} training seeds; in brackets 95 % "
        "intervals over the images drawn, the noise seeds and, where there are several, the "
        "trainings; ×: the ratio to the teacher's; *: best at its number of calls; ≈: the best "
        f"there, and what ties with it. Floor: {mean(first.floor):.3g}. "
        "Images: those that the student, and the students it goes on from, took gradients of.",
        *in_words(ranked),
    ]
    folder, (heads, body), name = options.results[0].parent, matrix(pooled), first.metric
    text = "\n\n".join([markdown_table(heads, body).rstrip(), *map(literal, notes)]) + "\n"
    figures = {"pools": [p.plain() for p in pooled], "rankings": [asdict(r) for r in ranked]}
    points = [Point(p.method, not p.own_plan, p.nfe, p.mean(name), p.interval) for p in pooled]
    write_atomic(folder / "methods.md", text)
    write_atomic(folder / "methods.json", json.dumps(figures, indent=1) + "\n")
    write_atomic(folder / "methods.png", chart(points, first, CALLS).file("png"))
    show: dict[str, Callable[[], None]] = {
        "rich": lambda: _rich(heads, body, notes),
        "markdown": lambda: write(text),
        "json": lambda: write(json.dumps(figures) + "\n"),
    }
    show[options.table]()
    say(f"{folder}: methods.md, methods.json, methods.png")
    return pooled


def _rich(heads: tuple[str, ...], body: list[tuple[str, ...]], notes: list[str]) -> None:
    table = Table()
    for i, head in enumerate(heads):
        table.add_column(plain(head), justify="right" if i else "left")
    for row in body:
        table.add_row(*map(plain, row))
    out.print(table)
    for note in notes:
        out.print(printable(note), highlight=False, markup=False)


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m eval.methods", config=config)
    with diverted(options.table != "rich"):
        summarise(options)


if __name__ == "__main__":
    run(main)
