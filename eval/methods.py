"""Methods against network calls, over training seeds: `python -m eval.methods RESULTS`."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import tyro
from rich.markup import escape
from rich.table import Table
from scipy.stats import kendalltau

from diffusion.checkpoint import write_atomic
from diffusion.console import UserError, diverted, out, run, say
from eval.report import latest, left_out
from eval.results import jsonl, together
from eval.results.records import Record
from eval.show import plots
from eval.show.lines import lines


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
    own: bool
    """Whether by its own plan, not a solver's."""
    student: bool
    images: int | None
    """That the student, and those that it goes on from, took gradients of."""
    figures: dict[str, list[float]]
    ratio: float | None
    """The mean over the larger of the teacher's figure and the floor."""

    def mean(self, name: str) -> float:
        return mean(self.figures[name])

    def spread(self, name: str) -> float:
        """Over the training seeds; 0 of one."""
        found = self.figures[name]
        return stdev(found) if len(found) > 1 else 0.0

    @property
    def text(self) -> str:
        name = next(iter(self.figures))
        spread = f" ± {self.spread(name):.2g}" if len(self.figures[name]) > 1 else ""
        ratio = "" if self.ratio is None else f" ({self.ratio:.2f}×)"
        return f"{self.mean(name):.3g}{spread}{ratio}"


def pools(found: list[Record]) -> list[Pool]:
    """The lines of the table, in its order.

    The first figure is the table's own; the others are distances too: on random features, sliced
    Wasserstein and KID.
    """
    names = [n for n in found[0].others if _distance(n) and all(n in r.others for r in found)]
    made = []
    for line in lines(found):
        record, same = line.record, line.trainings
        figures = {record.metric: [training.score for training in same]}
        figures |= {name: [training.further[name] for training in same] for name in names}
        student = record.own_plan and record.parent is not None
        made.append(
            Pool(
                line.title,
                record.nfe,
                record.own_plan,
                student,
                _images(record),
                figures,
                line.ratio,
            )
        )
    return made


def _distance(name: str) -> bool:
    return name.startswith("fd-random") or name in ("sliced-wasserstein", "kid")


def _images(record: Record) -> int | None:
    training = record.training
    return training.get("total_images", training.get("images"))


@dataclass(frozen=True)
class Ranking:
    """How far another distance orders the methods at so many calls as the first does."""

    nfe: int
    distance: str
    tau: float
    """Kendall's, 1 for the same order."""
    swapped: list[tuple[str, str]]
    """Pairs (better by the first distance, better by this one) further apart than their spreads
    over training seeds, of which both have several."""


def rankings(found: list[Pool]) -> list[Ranking]:
    """One for each number of calls that several methods share, and each other distance."""
    made = []
    for nfe in sorted({pool.nfe for pool in found}):
        same = [pool for pool in found if pool.nfe == nfe]
        if len(same) < 2:
            continue
        own, *others = same[0].figures
        for other in others:
            tau = kendalltau([p.mean(own) for p in same], [p.mean(other) for p in same]).statistic
            several = [pool for pool in same if len(pool.figures[own]) > 1]
            swapped = [
                (a.method, b.method)
                for pair in combinations(several, 2)
                for a, b in (pair, pair[::-1])
                if _below(a, b, own) and _below(b, a, other)
            ]
            made.append(Ranking(nfe, other, float(tau), swapped))
    return made


def _below(a: Pool, b: Pool, name: str) -> bool:
    return a.mean(name) + a.spread(name) < b.mean(name) - b.spread(name)


def told(found: list[Ranking]) -> list[str]:
    """The rankings in words, one distance a line."""
    words = []
    for name in dict.fromkeys(ranking.distance for ranking in found):
        same = [ranking for ranking in found if ranking.distance == name]
        taus = ", ".join(f"{r.tau:.2f} at {r.nfe}" for r in same)
        pairs = [f"{b} before {a} at {r.nfe}" for r in same for a, b in r.swapped]
        swaps = f"it puts {', '.join(pairs)}" if pairs else "no pair beyond its spreads swaps"
        words.append(f"{name} orders the methods with Kendall's tau {taus} calls; {swaps}")
    return words


def matrix(found: list[Pool]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a method a row, its calls a column."""
    counts = sorted({pool.nfe for pool in found})
    body = []
    for method in dict.fromkeys(pool.method for pool in found):
        same = {pool.nfe: pool for pool in found if pool.method == method}
        # a chain of rounds has spent the most at its end
        images = max((pool.images for pool in same.values() if pool.images), default=None)
        cells = [same[n].text if n in same else "-" for n in counts]
        body.append([method, "-" if images is None else f"{images:,}", *cells])
    heads = ["method", "images", *(f"{n} call{'s' * (n > 1)}" for n in counts)]
    return heads, body


def markdown(heads: list[str], body: list[list[str]], notes: list[str]) -> str:
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)], *body]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return text + "\n\n" + "\n\n".join(notes) + "\n"


def summarise(options: Options) -> list[Pool]:
    """The pooled table of these files; writes it, its figures and its plot."""
    for path in options.results:
        if not path.exists():
            raise UserError(
                f"there is no file {path}: expected a results.jsonl that eval.compare wrote"
            )
    given = together.merge(map(jsonl.read, options.results))
    found = latest(given, times=False)
    if not found:
        raise UserError(f"{options.results[0]} holds no rows: measure some with eval.compare")
    for reason in left_out(given, found, times=False):
        say(f"left out: {reason}")
    pooled = pools(found)
    seeds = max(len(next(iter(pool.figures.values()))) for pool in pooled)
    first, ranked = together.fullest(found), rankings([pool for pool in pooled if pool.student])
    notes = [
        f"{first.metric} of {first.num_images} images (lower is better), the mean of noise seeds "
        f"{', '.join(map(str, first.seeds))}; mean ± spread over up to {seeds} training seeds; in "
        f"brackets the ratio to the larger of the teacher's and the floor, {mean(first.floor):.3g}. "
        "Images: those that the student, and the students it goes on from, took gradients of.",
        *told(ranked),
    ]
    folder, (heads, body) = options.results[0].parent, matrix(pooled)
    text = markdown(heads, body, notes)
    figures = {"pools": [asdict(p) for p in pooled], "rankings": [asdict(r) for r in ranked]}
    write_atomic(folder / "methods.md", text)
    write_atomic(folder / "methods.json", json.dumps(figures, indent=1) + "\n")
    name = first.metric
    points = [(p.method, p.own, p.nfe, p.mean(name), p.spread(name)) for p in pooled]
    plots.curves(folder / "methods.png", points, first, "network calls per image (NFE)")
    show: dict[str, Callable[[], None]] = {
        "rich": lambda: _rich(heads, body, notes),
        "markdown": lambda: print(text, end=""),
        "json": lambda: print(json.dumps(figures)),
    }
    show[options.table]()
    say(f"{folder}: methods.md, methods.json, methods.png")
    return pooled


def _rich(heads: list[str], body: list[list[str]], notes: list[str]) -> None:
    table = Table()
    for i, head in enumerate(heads):
        table.add_column(escape(head), justify="right" if i else "left")
    for row in body:
        table.add_row(*map(escape, row))
    out.print(table)
    for note in notes:
        out.print(note, highlight=False, markup=False)


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m eval.methods", config=config)
    with diverted(options.table != "rich"):
        summarise(options)


if __name__ == "__main__":
    run(main)
