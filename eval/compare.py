"""Compare runs in one table and one plot: `python -m eval.compare runs/digits`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from diffusion import data as datasets
from diffusion.checkpoint import load_tensors, save_tensors, write_atomic
from diffusion.console import UserError, out, run, track
from diffusion.model import Model, load, require_same_images, this_device
from diffusion.samplers import SOLVERS
from eval import measure, plots, quality, records, table
from eval.features import EXTRACTORS
from eval.quality import Judge
from eval.records import Record

OWN_CLASSIFIER = ("digits", "fashion-mnist")  # where it is the default extractor; elsewhere, fid
SHOWN = 16  # images in a row of samples


@dataclass(frozen=True)
class Options:
    """Evaluate every checkpoint at its own step counts, and the teacher with training-free solvers."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/digits"),)
    """Runs, checkpoints, or folders that hold runs."""
    steps: str | None = None
    """Network calls to compare at, e.g. 1,2,4,8; the teacher's own plan is always shown."""
    num_images: int = 1024
    """Images per seed."""
    seeds: tuple[int, ...] = (0, 1)
    """Noise seeds; the spread is over them."""
    batch_size: int = 256
    """For quality and for images/s."""
    features: Literal["classifier", "random", "inception"] | None = None
    """What quality is measured on: the dataset's own classifier for digits and fashion-mnist,
    else Inception (fid), unless told."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the network, for all rows."""
    data_dir: Path | None = None
    """Where a named dataset's files are."""
    out: Path | None = None
    """Where the results go; compare/ beside the runs unless told."""


@dataclass(frozen=True)
class Bench:
    """What all rows are measured with."""

    options: Options
    judge: Judge
    floor: list[float]
    held_out: dict[str, float]


def find_runs(paths: tuple[Path, ...]) -> list[Path]:
    """Checkpoints named, and those in folders named, teachers before students, fewer steps last."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("model.safetensors"), reverse=True) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path} holds no finished run (no model.safetensors below it)")
        found += inside
    return list(dict.fromkeys(found))


def rows(model: Model, counts: list[int] | None) -> Iterator[tuple[str, Tensor, bool]]:
    """(sampler, angles, own) of each row: its own plans, then solvers at the other counts."""
    card = model.card
    for steps in card.plans:
        if counts is None or steps in counts or len(card.plans) == 1:
            yield *model.plan(steps), True
    for solver in card.solvers:
        if solver == card.sampler:
            continue
        for nfe in counts or (1, 2, 4, 8, 16, 32):
            steps = SOLVERS[solver].steps(nfe)
            if steps > 1 or solver == card.solvers[0]:  # in one step all solvers are the same
                yield *model.plan(nfe, solver), False


def evaluate(bench: Bench, path: Path, model: Model, row: tuple, template: Record) -> tuple:
    """The record of one row, and its first images."""
    sampler, angles, _ = row
    options, plan = bench.options, (sampler, angles)
    nfe = measure.count_calls(model, plan)
    single = measure.single_seconds(model, plan)
    judge, seconds, done, made = bench.judge, [], 0, []
    total = len(options.seeds) * options.num_images
    title = f"{template.method} {sampler} {len(angles) - 1}"

    def generated() -> Iterator[tuple[Tensor, float]]:
        for seed in options.seeds:
            yield from measure.batches(model, plan, seed, options.num_images, options.batch_size)

    def describe(batch: tuple[Tensor, float]) -> tuple[int, int, str]:
        return done + len(batch[0]), total, "images"

    full = min(options.batch_size, options.num_images)
    for images, took in track(generated(), title, describe):
        made.append(images)
        done += len(images)
        if len(images) == full:
            seconds.append(took)
    sets = torch.cat(made).split(options.num_images)  # one a seed
    others = [judge.others(images) for images in sets]
    record = replace(
        template,
        nfe=nfe,
        quality=[judge.distance(images) for images in sets],
        others={name: [figures[name] for figures in others] for name in others[0]},
        single_seconds=single,
        batch_seconds=seconds[1:] if len(seconds) > 3 else seconds,  # the first warmed up
    )
    return record, sets[0][:SHOWN].cpu()


def template(bench: Bench, path: Path, model: Model, row: tuple) -> Record:
    """The record of a row before it is measured."""
    sampler, angles, own = row
    options, extractor = bench.options, bench.judge.extractor
    return Record(
        run=str(path),
        method=model.card.method,
        sha256=model.sha256,
        parent=model.card.parent,
        sampler=sampler,
        steps=len(angles) - 1,
        own=own,
        angles=angles.tolist(),
        nfe=0,
        metric=extractor.name,
        extractor={"sha256": extractor.sha256, "accuracy": extractor.accuracy},
        num_images=options.num_images,
        seeds=list(options.seeds),
        quality=[],
        floor=bench.floor,
        batch_size=options.batch_size,
        batch_seconds=[],
        single_seconds=[],
        parameters=sum(p.numel() for p in model.denoiser.parameters()),
        environment=records.environment(bench.judge.device, options.precision),
        held_out=bench.held_out,
    )


def compare(options: Options) -> list[Record]:
    """Measure what is not measured yet; write results.jsonl, table.md, the plots and the samples."""
    counts = _counts(options)
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {options.batch_size}")
    if not options.seeds:
        raise UserError("--seeds takes at least one number, e.g. 0 1, got none")
    device = this_device()
    paths = find_runs(options.runs)
    models = [(path, load(path, options.precision)) for path in paths]
    models.sort(key=lambda item: item[1].card.parent is not None)  # teachers first
    first_path, first = models[0]
    for path, model in models:
        require_same_images(first.spec, model, path)
    planned = [(path, model, row) for path, model in models for row in rows(model, counts)]
    if not planned:
        raise UserError(f"none of the runs samples in --steps {options.steps}")
    bench = prepare(options, first, device)
    folder = options.out or _home(options.runs[0], first_path) / "compare"
    results, pictures = folder / "results.jsonl", folder / "samples.safetensors"
    known = {record.key: record for record in records.read(results)}
    samples = load_tensors(pictures)[0] if pictures.exists() else {}
    shown: list[tuple[Record, Tensor]] = []
    for path, model, row in planned:
        blank = template(bench, path, model, row)
        record, tag = known.get(blank.key), blank.tag
        if record is None or tag not in samples:
            record, samples[tag] = evaluate(bench, path, model, row, blank)
            known[record.key] = record
            save_tensors(pictures, samples, {})
            records.write(results, list(known.values()))
        shown.append((record, samples[tag]))
    write_results(folder, shown, bench.judge.dataset.train[:SHOWN])
    return [record for record, _ in shown]


def prepare(options: Options, model: Model, device: torch.device) -> Bench:
    spec = model.spec
    dataset = datasets.load(spec.name, options.data_dir, spec.size, spec.channels)
    usual = "classifier" if spec.name in OWN_CLASSIFIER else "inception"
    extractor = EXTRACTORS[options.features or usual](dataset, device)
    if options.num_images <= extractor.dim:
        raise UserError(
            f"--num-images must be more than the {extractor.dim} dimensions of the features, "
            f"got {options.num_images}"
        )
    judge = Judge.of(dataset, extractor, EXTRACTORS["random"](dataset, device), device)
    draws = quality.real_draws(dataset, options.num_images, draws=8)
    unseen = quality.held_out(dataset, options.num_images)
    others = judge.others(unseen) if unseen is not None else {}
    return Bench(options, judge, [judge.distance(images) for images in draws], others)


def write_results(folder: Path, shown: list[tuple[Record, Tensor]], real: Tensor) -> None:
    measured = [record for record, _ in shown]
    write_atomic(folder / "table.md", table.markdown(measured))
    plots.nfe_plot(folder / "quality_nfe.png", measured)
    plots.time_plot(folder / "quality_ms.png", measured)
    pictured = [(r, images) for r, images in shown if r.own or r.sampler == "ddim"]
    plots.sample_rows(folder / "samples.png", *map(list, zip(*pictured, strict=True)), real)
    out.print(table.rich_table(measured))
    out.print(f"{folder}: results.jsonl, table.md, quality_nfe.png, quality_ms.png, samples.png")


def _counts(options: Options) -> list[int] | None:
    if options.steps is None:
        return None
    try:
        counts = sorted({int(word) for word in options.steps.split(",")})
    except ValueError:
        raise UserError(f"--steps takes numbers such as 1,2,4,8, got {options.steps!r}") from None
    if counts[0] < 1:
        raise UserError(f"--steps must be at least 1, got {counts[0]}")
    return counts


def _home(named: Path, found: Path) -> Path:
    """Where compare/ goes: the folder that was named, or the one that holds the run."""
    if named.is_dir() and not (named / "model.safetensors").exists():
        return named
    return found.parent.parent if found.name == "model.safetensors" else found.parent


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    compare(tyro.cli(Options, prog="python -m eval.compare", config=config))


if __name__ == "__main__":
    run(main)
