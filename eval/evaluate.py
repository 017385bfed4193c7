"""Measure rows: network calls, times, quality and, of teachers, likelihood; resumable at every part."""

import json
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from math import isfinite

import torch
from accelerate import PartialState
from torch import Tensor

from diffusion.console import UserError, track
from eval import likelihood, machine, measure, stream
from eval.plans import Row
from eval.quality import SHOWN, Judge
from eval.race import Lap, race, sweep
from eval.records import Record
from eval.store import Store


@dataclass(frozen=True)
class Bench:
    """What all rows are measured with."""

    judge: Judge
    num_images: int
    seeds: tuple[int, ...]
    batch_size: int
    precision: str
    compile: bool
    times: bool
    sweep: bool
    likelihood: int
    """Of how many held-out images, at most."""
    floor: list[float]
    held_out: dict[str, float]


def recipe(settings: dict) -> str:
    """What trainings that differ in their seed alone have in common: all settings that are not off,
    so that an option that is new, and off, makes no other recipe."""
    # a seed's parents are its own; the images are named, and rows of others share no table
    own = ("seed", "parent", "start", "data_sha256")
    rest = {name: value for name, value in settings.items() if value and name not in own}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]


def template(bench: Bench, row: Row) -> Record:
    """The record of a row before it is measured."""
    judge, card = bench.judge, row.model.card
    extractor = judge.extractor
    spent = ("iterations", "images", "total_images", "seconds")
    training = {name: card.training[name] for name in spent if name in card.training}
    if "settings" in card.training:
        training["recipe"] = recipe(card.training["settings"])
    return Record(
        run=str(row.path),
        method=row.method,
        sha256=row.model.sha256,
        parent=card.parent,
        sampler=row.sampler,
        steps=len(row.angles) - 1,
        own=row.own,
        angles=row.angles.tolist(),
        parameters=sum(p.numel() for p in row.model.denoiser.parameters()),
        training=training,
        data=judge.data,
        metric=extractor.name,
        extractor={"sha256": extractor.sha256, "accuracy": extractor.accuracy},
        num_images=bench.num_images,
        seeds=list(bench.seeds),
        floor=bench.floor,
        held_out=bench.held_out,
        batch_size=bench.batch_size,
        environment=machine.environment(judge.device, bench.precision, bench.compile),
        conditions=machine.conditions(judge.device),
    )


def time_rows(bench: Bench, rows: dict[Row, Record]) -> dict[Row, Record]:
    """With the times that are asked for and lacking: all rows in turn, size by size."""
    device, sizes = bench.judge.device, sorted({1, bench.batch_size})
    found = {row: {t.batch_size: t for t in record.timings} for row, record in rows.items()}
    untimed = [row for row in rows if bench.times and not found[row]]
    unswept = [row for row in rows if bench.times and bench.sweep and len(found[row]) <= len(sizes)]
    laps = []
    if untimed:
        laps += [race({row: partial(sample, row, n) for row in untimed}, n, device) for n in sizes]
    if unswept:
        laps.append(sweep({row: partial(sample, row) for row in unswept}, device, found))
    for each in laps:
        for lap in track(each, "speed", Lap.progress):
            found[lap.key][lap.timing.batch_size] = lap.timing
    changed = {row: [found[row][n] for n in sorted(found[row])] for row in [*untimed, *unswept]}
    conditions = machine.conditions(device)
    return rows | {
        row: replace(rows[row], timings=timings, conditions=conditions)
        for row, timings in changed.items()
    }


def sample(row: Row, size: int) -> Tensor:
    return row.model.sample(row.plan, 0, *stream.indices(row.model, 0, size))


def judge_rows(
    bench: Bench, found: dict[Row, Record], store: Store, refused: dict[Row, str]
) -> Iterator[tuple[int, int, str]]:
    """Fill in the figures of all seeds, each on disk before the next begins: (images, of, words).

    A row whose images are none is moved from `found` to `refused`, with the reason.
    """
    judge, done = bench.judge, 0
    left = {row: record.seeds[len(record.quality) :] for row, record in found.items()}
    total = bench.num_images * sum(map(len, left.values()))
    for row, seeds in left.items():
        for seed in seeds:
            record = found[row]
            part = store.folder / "partial" / f"{record.tag}-{seed}"
            look = stream.look(
                judge, row.model, row.plan, seed, bench.num_images, bench.batch_size, part
            )
            try:
                for count, seen in look:  # noqa: B007
                    yield done + count, total, f"images, {row.title}"
            except UserError as error:
                refused[row] = f"{row.title} ({row.path}): {error}"
                del found[row]
                total -= bench.num_images * len(seeds)
                break
            done += bench.num_images
            if PartialState().is_main_process:
                found[row] = record = with_seed(record, judge.distance(seen), judge.others(seen))
                first = len(record.quality) == 1
                shown = {record.tag: seen.rows("pixels")[:SHOWN].cpu()}
                store.put(record, images=shown if first else None)
                stream.forget(part)


def with_seed(record: Record, quality: float, others: dict[str, float]) -> Record:
    """The record with one more seed's figures. One that is not finite for every seed, such as a
    ratio to nothing, is left out."""
    finite = {name: value for name, value in others.items() if isfinite(value)}
    before = record.others if record.quality else {name: [] for name in finite}
    others = {name: [*before[name], finite[name]] for name in finite if name in before}
    return replace(record, quality=[*record.quality, quality], others=others)


def likelihood_of(bench: Bench, row: Row, record: Record) -> Record:
    """With bits per dimension, where the row is a teacher's own."""
    test, labels = bench.judge.dataset.test, bench.judge.dataset.test_labels
    teacher = row.own and record.parent is None and "ddim" in row.model.card.solvers
    some = slice(0, bench.likelihood)
    if record.likelihood or not teacher or len(test[some]) < 2:
        return record
    conditional = row.model.card.net["num_classes"] > 0
    exact = copy(row.model.denoiser)
    exact.precision = "fp32"
    model = replace(row.model, denoiser=exact)
    with torch.compiler.set_stance("force_eager"):  # compiled was the other precision
        bits = likelihood.bits_per_dim(model, test[some], labels[some] if conditional else None)
    return replace(record, likelihood=bits)


def measure_rows(bench: Bench, rows: list[Row], store: Store) -> tuple[list[Record], list[str]]:
    """A record for each row, measured where it was not before, and why some have none."""
    blank = {row: template(bench, row) for row in rows}
    found = {row: store.records.get(record.key, record) for row, record in blank.items()}
    for row, record in found.items():
        if not record.nfe:
            found[row] = replace(record, nfe=measure.count_calls(row.model, row.plan))
    if bench.compile:
        for model in {id(row.model): row.model for row in rows}.values():
            model.denoiser.compile_network()
    found, refused = time_rows(bench, found), {}
    store.put(*found.values())
    for _ in track(judge_rows(bench, found, store, refused), "quality", lambda told: told):
        pass
    found = {row: likelihood_of(bench, row, record) for row, record in found.items()}
    store.put(*found.values())
    return list(found.values()), list(refused.values())
