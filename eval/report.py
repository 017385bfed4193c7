"""A comparison as one web page: `python -m eval.report runs/digits/compare`."""

from collections import Counter
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import tyro
from torch import Tensor

from diffusion.checkpoint import load_tensors, write_atomic
from diffusion.console import UserError, run, say
from eval.results import jsonl, together
from eval.results.records import Record
from eval.show import closing, pages, table
from eval.show.lines import lines
from eval.show.pages import chart, grids, pictures, provenance
from eval.show.pages.verdict import choice, verdict


@dataclass(frozen=True)
class Options:
    """Write one web page of a comparison: the tables, the charts, the samples, and which student to
    take."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/digits/compare"),)
    """Folders that eval.compare wrote, or results.jsonl files, of one or several machines."""
    times: bool = True
    """Show times. Without them, rows of several machines may share the page."""
    out: Path | None = None
    """The page to write. If left out: report.html in the first folder."""
    data: str | None = None
    """The folder that the training images are in now, if it has moved. The page shows the nearest
    ones."""
    data_dir: Path | None = None
    """The folder that holds a named dataset's files, for the same."""


def latest(found: list[Record], times: bool = True) -> list[Record]:
    """Those measured as the last one was, the latest of each run's plans alone, teachers first."""
    setting, most = _last_setting(found, times) if found else ({}, 0)
    same = [record for record in found if together.setting(record, times, most) == setting]
    kept = {
        (r.run, r.title, r.guidance, r.sampler, r.steps, r.environment["device"]): r for r in same
    }
    return sorted(kept.values(), key=lambda record: record.parent is not None)


def newest(found: list[Record]) -> Record:
    return max(reversed(found), key=lambda record: record.date)


def _last_setting(found: list[Record], times: bool) -> tuple[dict[str, str], int]:
    """That of the newest row and its number of images; a long plan of fewer is no measure of others."""
    last = newest([record for record in found if not record.long] or found)
    return together.setting(last, times), 0 if last.long else last.num_images


def left_out(found: list[Record], kept: list[Record], times: bool) -> list[str]:
    """Why rows of a file are not on the page, and how many."""
    setting, most = _last_setting(found, times)
    shown = {id(record) for record in kept}
    reasons: Counter[str] = Counter()
    for record in found:
        own = together.setting(record, times, most)
        other = [
            f"{name} {own.get(name)}"
            for name in own | setting
            if own.get(name) != setting.get(name)
        ]
        if id(record) not in shown:
            reasons[f"with {', '.join(other)}" if other else "of runs since made anew"] += 1
    return [f"{count} row{'s' * (count > 1)} {reason}" for reason, count in reasons.items()]


def gather(
    paths: tuple[Path, ...], times: bool
) -> tuple[list[Record], list[str], dict[str, Tensor]]:
    """The rows, what the files hold besides, and the sample images by tag."""
    rows, others, images = [], [], {}
    for path in paths:
        file = path / "results.jsonl" if path.is_dir() else path
        found = jsonl.read(file)
        if not found:
            raise UserError(
                f"{file} holds no records: expected what eval.compare wrote; run it first"
            )
        rows.append(latest(found, times))
        others += left_out(found, rows[-1], times)
        samples = file.with_name("samples.safetensors")
        images |= load_tensors(samples)[0] if samples.exists() else {}
    merged = together.merge(rows)
    together.require_comparable(merged, times)
    return [record if times else replace(record, timings=[]) for record in merged], others, images


def page(options: Options) -> str:
    """The page's HTML."""
    rows, others, images = gather(options.paths, options.times)
    tables = table.tables(rows, options.times)
    found = tables[0].lines
    several = max(len(line.trainings) for line in found) > 1
    looks, ship = chart.looks(found), choice(found)
    quality = f"{rows[0].metric} (lower is better)"
    by_calls = chart.draw(found, lambda x: x.record.nfe, "network calls per image (NFE)", quality)
    by_time = chart.draw(found, lambda x: x.milliseconds, "ms per image at batch 1", quality)
    shown = [grids.section(each, looks, ship) for each in tables]
    near = ""
    if ship and ship.record.tag in images:
        near = pictures.nearest(ship, images[ship.record.tag], options.data, options.data_dir)
    data = Path(rows[0].data["name"]).name
    return pages.fill(
        "report",
        title=escape(f"{data}: what fewer network calls cost"),
        verdict=verdict(found),
        charts=by_calls + by_time,
        legend=chart.legend(found),
        tables="".join(shown[:2]),
        samples=pictures.same_noise(found, images),
        nearest=near,
        further="".join(shown[2:]),
        facts=provenance.facts(rows, others, several),
        measured=provenance.measured(found),
        checkpoints=provenance.checkpoints(found),
    )


def write(options: Options) -> Path:
    first = options.paths[0]
    path = options.out or (first if first.is_dir() else first.parent) / "report.html"
    write_atomic(path, page(options))
    return path


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m eval.report", config=config)
    path = write(options)
    rows, _, _ = gather(options.paths, options.times)
    say(f"{path}: {len(rows)} rows of {rows[0].data['name']}, their tables, charts and pictures")
    say(closing.take(lines(rows)))
    say(f"open the page: {closing.opener(path)}")


if __name__ == "__main__":
    run(main)
