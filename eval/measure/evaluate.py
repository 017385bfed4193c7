"""Measure rows: network calls, times, quality, teachers' likelihood; resumable at every part."""

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from math import isfinite

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffusion.console import UserError, printable, say, track
from diffusion.samplers import SOLVERS
from eval.measure import likelihood, machine, nfe, stream
from eval.measure.judge import Judge
from eval.measure.outside import Outside
from eval.measure.plans import Row
from eval.measure.quality import Measured
from eval.measure.race import Lap, race, sweep
from eval.measure.seen import SHOWN
from eval.measure.timing import InPassing, Timing
from eval.results.records import Extractor, Head, Record, Training
from eval.results.store import Store

REPEATS = 0.5  # seconds of repeats for each row and batch size; the least number always


@dataclass(frozen=True)
class Bench:
    """What all rows are measured with."""

    judge: Judge
    num_images: int
    long_images: int
    """Images for a teacher's own plan of very many steps."""
    seeds: tuple[int, ...]
    batch_size: int
    precision: str
    compile: bool
    times: bool
    sweep: bool
    likelihood: int
    """Held-out images, at most, on which likelihoods are measured."""
    floors: dict[int, tuple[list[float], float]]
    """Number of images -> the metric of as many real ones, for each draw; its mean's error."""
    held_out: dict[int, dict[str, float]]
    """Number of images -> the further figures of as many held-out ones."""


def recipe(settings: dict) -> str:
    """What trainings that differ in their seed alone have in common: all settings that are not off,
    so that an option that is new, and off, makes no other recipe."""
    # a seed's parents are its own; the images are named, and rows of others share no table
    apart = ("seed", "parent", "start", "data_sha256")
    rest = {name: value for name, value in settings.items() if value and name not in apart}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]


def template(bench: Bench, row: Row | Outside) -> Record:
    """The record of a row before it is measured."""
    num_images = bench.long_images if row.long else bench.num_images
    judge, extractor = bench.judge, bench.judge.extractor
    used: Extractor = {"sha256": extractor.sha256, "accuracy": extractor.accuracy}
    if judge.more:
        used["further"] = [other.extractor.name for other in judge.more]
    shared = Head(
        data=judge.data,
        metric=extractor.name,
        extractor=used,
        num_images=num_images,
        seeds=list(bench.seeds),
        floor=bench.floors[num_images][0],
        floor_error=bench.floors[num_images][1],
        held_out=bench.held_out[num_images],
        batch_size=bench.batch_size,
        environment=machine.environment(judge.device, bench.precision, bench.compile),
    )
    place, conditions = printable(str(row.path)), machine.conditions(judge.device)
    if isinstance(row, Outside):
        return Record(
            **vars(shared),
            run=place,
            method=row.method,
            sha256=row.sha256,
            sampler=row.sampler,
            steps=0,
            own_plan=True,
            parameters=0,
            conditions=conditions,
        )
    card = row.model.card
    spent = ("iterations", "images", "total_images", "passes", "seconds")
    training = Training(**{name: card.training[name] for name in spent if name in card.training})
    if "settings" in card.training:
        training["recipe"] = recipe(card.training["settings"])
    return Record(
        **vars(shared),
        run=place,
        method=row.method,
        sha256=row.model.sha256,
        parent=card.parent,
        sampler=row.plan.sampler,
        steps=row.plan.num_steps,
        own_plan=row.own_plan,
        angles=list(row.plan.angles),
        guidance=row.plan.guidance,
        note=row.plan.note,
        parameters=sum(p.numel() for p in row.model.denoiser.parameters()),
        training=training,
        conditions=conditions,
    )


def time_rows(bench: Bench, rows: dict[Row, Record]) -> dict[Row, Record]:
    """With the times that are asked for and lacking: all rows in turn, size by size."""
    device, sizes = bench.judge.device, sorted({1, bench.batch_size})
    timings = {row: {t.batch_size: t for t in record.timings} for row, record in rows.items()}
    whole = {n: [n in known and known[n].over for known in timings.values()] for n in sizes}
    lacking = {n: [bench.times and not over for over in whole[n]] for n in sizes}
    (lacking,) = broadcast_object_list([lacking])  # the first process's, which alone has seen all
    untimed = {
        n: [row for row, lacks in zip(rows, lacking[n], strict=True) if lacks] for n in sizes
    }
    races = {n: {row: partial(sample, row, n) for row in untimed[n]} for n in sizes if untimed[n]}
    unswept = [
        row for row in rows if bench.times and bench.sweep and len(timings[row]) <= len(sizes)
    ]
    laps = [race(calls, n, device, REPEATS) for n, calls in races.items()]
    if unswept:
        laps.append(sweep({row: partial(sample, row) for row in unswept}, device, timings))
    for each in laps:
        for lap in track(each, "speed", Lap.progress):
            known, size = timings[lap.key], lap.timing.batch_size
            first = known[size].first if size in known else lap.timing.first
            known[size] = replace(lap.timing, first=first)  # with what was compiled for its images
    changed = {row: [timings[row][n] for n in sorted(timings[row])] for row in rows}
    conditions = machine.conditions(device)
    return {
        row: replace(record, timings=changed[row], conditions=conditions)
        if changed[row] != record.timings
        else record
        for row, record in rows.items()
    }


def sample(row: Row, size: int) -> Tensor:
    return row.model.sample(row.plan, 0, stream.indices(row.model, 0, size))


def judge_rows(
    bench: Bench,
    records: dict[Row | Outside, Record],
    store: Store,
    refused: dict[Row | Outside, str],
) -> Iterator[tuple[int, int, str]]:
    """Fill in the figures of all seeds, each on disk before the next begins: (calls, of, words).

    Rows of few network calls come first, so that the pace is known when the longest begins. A row
    whose batches are long is timed in passing. A row whose images are none is moved from `records`
    to `refused`, with the reason.
    """
    judge, done = bench.judge, 0
    left = {row: record.seeds[len(record.quality) :] for row, record in records.items()}
    # of unknown calls: one, to count the images by
    costs = {row: max(1, record.nfe) * record.num_images for row, record in records.items()}
    total = sum(cost * len(left[row]) for row, cost in costs.items())
    for row in sorted(left, key=lambda row: costs[row]):
        watch = InPassing(bench.batch_size, judge.device, bench.compile)
        known = [t for t in records[row].timings if t.batch_size == bench.batch_size]
        timed = not bench.times or any(t.over for t in known) or isinstance(row, Outside)
        for seed in left[row]:
            record, words = records[row], f"network calls, {row.title}"
            part = store.folder / "partial" / f"{record.tag}-{seed}"
            size = record.num_images, bench.batch_size
            more = () if timed else (watch,)
            maker = row if isinstance(row, Outside) else row.model
            look = stream.look(judge, maker, row.plan, seed, *size, part, *more)
            yield done, total, words
            try:
                with heard(row):
                    for count, seen in look:  # noqa: B007
                        yield done + max(1, record.nfe) * count, total, words
            except UserError as error:
                refused[row] = f"{row.title} ({row.path}): {error}"
                del records[row]
                total -= costs[row] * len(left[row])
                break
            done += costs[row]
            if PartialState().is_main_process:
                record = with_seed(record, Measured(judge, seen))
                records[row] = record = with_timing(record, watch.result)
                first = len(record.quality) == 1
                first_images = {record.tag: seen.rows("pixels")[:SHOWN].cpu()}
                store.put(record, images=first_images if first else None)
                stream.forget(part)


@contextmanager
def heard(row: Row | Outside, every: float = 30.0) -> Generator[None]:
    """A line every so many seconds while a long plan's batch is made: how far it is."""
    if isinstance(row, Outside) or not row.long:
        yield
        return
    calls = SOLVERS[row.plan.sampler].calls(row.plan.num_steps)
    done, begun, said = 0, 0.0, 0.0

    def tell(*_) -> None:
        nonlocal done, begun, said
        now = time.monotonic()
        if done in (0, calls):
            done, begun, said = 0, now, now
        done += 1
        if now - said > every and done < calls:
            left = (now - begun) / done * (calls - done)
            say(f"{row.title}: call {done:,} of {calls:,} of this batch, {left:.0f} s left of it")
            said = now

    hook = row.model.denoiser.register_forward_hook(tell)
    try:
        yield
    finally:
        hook.remove()


def with_timing(record: Record, timing: Timing | None) -> Record:
    """The record with that timing, if any, in place of one of its batch size."""
    if timing is None:
        return record
    others = [each for each in record.timings if each.batch_size != timing.batch_size]
    return replace(record, timings=[*others, timing])


def with_seed(record: Record, measured: Measured) -> Record:
    """The record with one more seed's figures. One that is not finite for every seed, such as a
    ratio to nothing, is left out."""

    def longer(before: dict[str, list[float]], new: dict[str, float]) -> dict[str, list[float]]:
        before = before if record.quality else {name: [] for name in new}
        finite = {name: value for name, value in new.items() if isfinite(value) and name in before}
        return {name: [*before[name], value] for name, value in finite.items()}

    return replace(
        record,
        quality=[*record.quality, measured.distance],
        others=longer(record.others, measured.others),
        uncertainty=[*record.uncertainty, measured.uncertainty],
        errors=longer(record.errors, measured.errors),
    )


def likelihood_of(bench: Bench, row: Row, record: Record) -> Record:
    """With bits per dimension, where the row is a teacher's own."""
    real, some = bench.judge.dataset, slice(0, bench.likelihood)
    teacher = row.own_plan and record.parent is None and "denoise" in row.model.card.abilities
    measurable = teacher and row.model.codec.grey_levels and len(real.test[some]) >= 2
    if record.likelihood or not measurable:
        return record
    exact = copy(row.model.denoiser)
    exact.precision = "fp32"
    model = replace(row.model, denoiser=exact)
    # compiled was the other precision, and "fp32" alone leaves convolutions in TF32 on a GPU
    with torch.compiler.set_stance("force_eager"), machine.full_float32():
        known = real.known(some, model.kinds)
        bits = likelihood.bits_per_dim(model, real.test[some], known or None, batch_size=64)
    return replace(record, likelihood=bits)


def measure_rows(
    bench: Bench, rows: Sequence[Row | Outside], store: Store
) -> tuple[list[Record], list[str]]:
    """A record for each row, measured where it was not before, and why some have none. Of images
    that others made there are neither calls nor times."""
    blank = {row: template(bench, row) for row in rows}
    records = {row: store.records.get(record.key, record) for row, record in blank.items()}
    for row, record in records.items():
        if isinstance(row, Row) and not record.nfe:
            records[row] = replace(record, nfe=nfe.count_calls(row.model, row.plan))
    if bench.compile:
        for model in {id(row.model): row.model for row in rows if isinstance(row, Row)}.values():
            model.denoiser.compile_network()
    refused: dict[Row | Outside, str] = {}
    store.put(*records.values())
    for _ in track(
        judge_rows(bench, records, store, refused), "quality", lambda progress: progress
    ):
        pass
    own = {row: record for row, record in records.items() if isinstance(row, Row)}
    timed = time_rows(bench, own)
    store.put(*timed.values())
    likely = {row: likelihood_of(bench, row, record) for row, record in timed.items()}
    store.put(*likely.values())
    return list((records | likely).values()), list(refused.values())
