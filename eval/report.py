"""A comparison as one web page: `python -m eval.report runs/digits/compare`."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from torch import Tensor

from diffusion import data as datasets
from diffusion.console import UserError, run, say
from diffusion.files import write_atomic
from diffusion.image_file import Form
from eval.measure.real import Real, fingerprint
from eval.results import jsonl, together
from eval.results.records import Data, Record
from eval.results.store import samples_of
from eval.show import closing, page, pictures, provenance, table, verdict
from eval.show.lines import Comparison, Line, comparison
from eval.show.pictures import CALLS, MILLISECONDS, Picture


@dataclass(frozen=True)
class Options:
    """Write one web page of a comparison: the tables, the charts, the samples, and which row to
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


def latest(records: list[Record], times: bool = True) -> list[Record]:
    """Those measured as the last one was, the latest of each run's plans alone, teachers first."""
    setting, most = _last_setting(records, times) if records else ({}, 0)
    kept: dict[tuple, Record] = {}
    for r in records:
        if together.setting(r, times, most) == setting:
            plan = r.title, r.guidance, r.sampler, r.steps
            kept[r.run, plan, r.environment["device"]] = r
    return sorted(kept.values(), key=lambda record: record.parent is not None)


def _last_setting(records: list[Record], times: bool) -> tuple[dict[str, str], int]:
    """The newest row's setting and number of images; a long plan of fewer images sets nothing."""
    rest = [record for record in records if not record.long] or records
    last = max(reversed(rest), key=lambda record: record.date)
    return together.setting(last, times), 0 if last.long else last.num_images


def left_out(records: list[Record], kept: list[Record], times: bool) -> list[str]:
    """Why rows of a file are not on the page, and how many."""
    setting, most = _last_setting(records, times)
    on_page = {id(record) for record in kept}
    reasons: Counter[str] = Counter()
    for record in (record for record in records if id(record) not in on_page):
        values = together.setting(record, times, most)
        names = [name for name in values | setting if values.get(name) != setting.get(name)]
        differ = ", ".join(f"{name} {values.get(name)}" for name in names)
        reasons[f"with {differ}" if differ else "of runs since made anew"] += 1
    return [f"{count} row{'s' * (count > 1)} {reason}" for reason, count in reasons.items()]


def gather(paths: tuple[Path, ...], times: bool) -> tuple[Comparison, list[str], dict[str, Tensor]]:
    """The rows, what the files hold besides, and the sample images by tag."""
    rows, others, images = [], [], {}
    for path in paths:
        file = path / "results.jsonl" if path.is_dir() else path
        records = jsonl.read(file)
        if not records:
            raise UserError(
                f"{file} holds no records: expected what eval.compare wrote; run it first"
            )
        rows.append(latest(records, times))
        others += left_out(records, rows[-1], times)
        images |= samples_of(file.parent)
    merged = together.merge(rows)
    rows = [record if times else replace(record, timings=[]) for record in merged]
    return comparison(rows, times), others, images


def nearest(
    line: Line, made: Tensor, data: str | None = None, data_dir: Path | None = None
) -> Picture | None:
    """A row's images above the training images nearest to them; None, with a line that says why,
    where those are not on this disk."""
    real = line.record.data
    look = real.get("background", Form.background), real.get("aspect", Form.aspect)
    form = Form(made.shape[-1], made.shape[1], *look)
    try:
        images = _measured_against(real, form, data, data_dir)
    except UserError as error:
        say(f"the nearest training images are left out: {error}")
        return None
    if images.train.shape[1:] != made.shape[1:]:
        return None
    return pictures.nearest([(line, made)], images.train, images.test)


def _measured_against(real: Data, form: Form, data: str | None, data_dir: Path | None) -> Real:
    """The images that a record was measured against. A report downloads nothing."""
    name = data or datasets.at_hand(real["name"])
    images = Real.sample(datasets.load(name, data_dir, form, download=False))
    if real.get("sha256", "") not in ("", fingerprint(images.train)):
        raise UserError(f"{name} does not hold the images that were measured against")
    return images


def html(options: Options) -> tuple[str, list[Line]]:
    """The page, and the lines that it shows."""
    compared, others, images = gather(options.paths, options.times)
    records, rows = compared.records, compared.lines
    ship = verdict.choice(rows)
    titles = [line.title for line in rows]
    by_method = sorted(rows, key=lambda line: (titles.index(line.title), -line.record.nfe))
    charts = [
        pictures.cost_chart(rows, lambda line: line.record.nfe or None, CALLS),
        pictures.cost_chart(rows, lambda line: line.milliseconds, MILLISECONDS),
    ]
    near = None
    if ship and ship.record.tag in images:
        near = nearest(ship, images[ship.record.tag], options.data, options.data_dir)
    text = page.render(
        "report.html",
        title=f"{Path(records[0].data['name']).name}: what fewer network calls cost",
        verdict=verdict.sentences(rows),
        best=verdict.best_by_calls(rows),
        budgets=verdict.budgets(rows),
        ship=ship,
        charts=[chart for chart in charts if chart],
        tables=table.tables(compared),
        samples=pictures.samples(by_method, images),
        nearest=near,
        facts=provenance.facts(rows, records, others),
        measured_heads=provenance.MEASURED,
        measured=provenance.measured(rows),
        checkpoint_heads=provenance.CHECKPOINTS,
        checkpoints=provenance.checkpoints(rows),
    )
    return text, rows


def write(options: Options) -> Path:
    """Write the page, say where it is and which row to take."""
    first = options.paths[0]
    path = options.out or (first if first.is_dir() else first.parent) / "report.html"
    text, rows = html(options)
    write_atomic(path, text)
    name = rows[0].record.data["name"]
    count = sum(len(line.trainings) for line in rows)
    say(f"{path}: {count} rows of {name}, their tables, charts and pictures")
    for words in closing.take(rows).splitlines():
        say(words)
    say(f"open the page: {closing.opener(path)}")
    return path


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    write(tyro.cli(Options, prog="python -m eval.report", config=config))


if __name__ == "__main__":
    run(main)
