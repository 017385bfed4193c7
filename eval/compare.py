"""Compare runs in one table and one plot: `python -m eval.compare runs/digits`."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from operator import or_
from pathlib import Path

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffusion import data as datasets
from diffusion import foreign, machine
from diffusion.condition import of_images
from diffusion.console import UserError, diverted, doing, printable, run, say, silence
from diffusion.data import ImageSpec
from diffusion.files import write_atomic
from diffusion.folders import check_claim, claim
from diffusion.images import InMemory
from diffusion.model import Model, load, require_same_images, this_device
from diffusion.owner import owned
from diffusion.plan import plan as plan_of
from eval.measure import outside
from eval.measure.agreement import clip_score
from eval.measure.evaluate import Bench, measure_rows, sample, template
from eval.measure.features import extractor
from eval.measure.features import usual as usual_extractor
from eval.measure.judge import Judge
from eval.measure.plans import Row, counts_of, find_runs, rows
from eval.measure.quality import held_out
from eval.measure.real import Real
from eval.measure.search import search_angles
from eval.measure.seen import SHOWN
from eval.measure.timing import timed
from eval.options import Options, check, tried
from eval.results import jsonl, together
from eval.results.records import Record
from eval.results.store import Store, samples_of
from eval.show import closing, pictures, table
from eval.show.lines import Comparison, comparison
from eval.show.pictures import CALLS, MILLISECONDS
from eval.show.verdict import choice
from students.start import home_of

COUNTS = (50_000, 10_000, 5_000, 2_000, 1_000)  # images of a row; the first on GPUs
A_ROW = 60.0  # seconds that a row may take, in the mean
DRAWS = 100  # of real images, for the floor
# Of a teacher's long plan, at least: its calls are then as many as those of a solver's 50 steps on
# 10,000 images, and every machine chooses alike, so that tables of several can be merged.
LONG_IMAGES, LONG_SHARE = 512, 20
SEARCHED = 1024  # images of each trial of a search, at most, where features have fewer dimensions


def compare(options: Options) -> list[Record]:
    """Measure what is not measured yet; write results.jsonl, the tables and the pictures."""
    check(options)
    options = replace(options, precision=machine.precision(options.precision))
    if not PartialState().is_main_process:
        silence()
    files = [path for path in options.runs if path.suffix == ".jsonl"]
    paths = tuple(path for path in options.runs if path not in files)
    given = together.merge(map(jsonl.read, files))
    if not paths:
        require_methods(options, given)
    folder = options.out or home(paths)
    check_claim(folder, "comparison")
    with owned(folder):
        return _compare(options, paths, files, given, Store.open(folder))


def _compare(
    options: Options, paths: tuple[Path, ...], files: list[Path], given: list[Record], store: Store
) -> list[Record]:
    """paths: of checkpoints and runs; given: the records of the files."""
    folder, first_process = store.folder, PartialState().is_main_process
    measured, refused, train = [], [], None
    if paths:
        images = [path for path in paths if outside.is_outside(path)]
        planned = plan(options, tuple(path for path in paths if path not in images))
        count = [options.num_images or affordable(options, planned, store)]
        (count,) = broadcast_object_list(count)  # the first process's
        options = replace(options, num_images=count)
        bench = prepare(options, planned[0].model.spec if planned else None, images)
        spec, size = bench.judge.dataset.spec, (bench.num_images, bench.seeds)
        device = bench.judge.device
        others = [outside.row(path, spec, *size, options.onnx_range, device) for path in images]
        rows_so_far = [*planned, *others]
        usual = next((row for row in rows_so_far if not row.long), rows_so_far[0])
        together.require_comparable([*given, template(bench, usual)], options.times)
        require_methods(options, [*given, *rows_so_far])
        planned += searched(options, planned, bench)
        if first_process:
            claim(folder, "comparison")
        with doing(f"measuring for {folder}", "all rows so far are kept; the same command goes on"):
            measured, refused = measure_rows(bench, [*planned, *others], store)
        train = bench.judge.dataset.train if len(bench.judge.train) else None
        if train is not None:
            store.put(images={"real": train[:SHOWN]})
        if first_process:
            with suppress(OSError):  # none was made, or a refused row's is still there
                (folder / "partial").rmdir()
    said = tried(options)
    records = [
        replace(record, tried=said.get(record.method, record.tried))
        for record in together.merge([measured, given])
    ]
    together.require_comparable(records, options.times)
    if first_process and records:  # the other processes have not the figures of all images
        claim(folder, "comparison")
        store.put(*records, images=reduce(or_, (samples_of(file.parent) for file in files), {}))
        write_results(store, comparison(records, options.times), train, options.table)
    if refused:
        raise UserError(f"{len(refused)} rows are left out: {'; '.join(refused)}")
    return records


def require_methods(options: Options, rows: Sequence[Row | outside.Outside | Record]) -> None:
    """UserError where --tried names a method that no row is of."""
    methods = list(dict.fromkeys(row.method for row in rows))
    if unknown := [name for name in tried(options) if name not in methods]:
        raise UserError(f"--tried names {unknown[0]}: expected of {', '.join(methods)}")


def plan(options: Options, paths: tuple[Path, ...]) -> list[Row]:
    """The rows to measure: of all models in the paths, teachers first."""
    if not paths:
        return []
    counts = counts_of(options.steps)
    place, trust = options.autoencoder, options.trust
    models = [
        (path, load(path, options.precision, autoencoder=place, trust=trust))
        for path in find_runs(paths)
    ]
    models.sort(key=lambda item: item[1].card.parent is not None)
    spec = next((model.spec for _, model in models if model.spec.name), None)
    if spec is None:
        spec = datasets.reload(models[0][1].spec, options.data, options.data_dir).spec
    models = [(path, model.of_images(spec)) for path, model in models]
    for path, model in models:
        require_same_images(spec, model, path)
    asked = counts, options.solvers, options.long, options.shifts, options.guidance
    planned = [row for path, model in models for row in rows(path, model, *asked)]
    if not planned:
        raise UserError(
            f"none of the runs samples in --steps {options.steps}: give others, or leave it out"
        )
    if options.search_steps and not students(planned):
        raise UserError(
            "--search-steps needs a consistency student, and there is none among the rows"
        )
    return planned


def students(planned: list[Row]) -> dict[Path, Model]:
    """The consistency students among the rows."""
    usual = [row for row in planned if row.plan.sampler == "consistency" and row.own_plan]
    return {row.path: row.model for row in usual}


def searched(options: Options, planned: list[Row], bench: Bench) -> list[Row]:
    """A row for each consistency student and step count to search; the same in every process."""
    made = []
    for path, model in students(planned).items():
        for steps in options.search_steps:
            few = SEARCHED if bench.judge.extractor.dim < SEARCHED else bench.num_images
            size = min(few, bench.num_images), bench.batch_size
            angles = [search_angles(bench.judge, model, steps, *size)]
            (angles,) = broadcast_object_list(angles)  # the first process's, to the bit
            chosen = plan_of("consistency", angles, model.card.guidance, note="searched")
            made.append(Row(path, model, chosen, own_plan=True))
    return made


def prepare(options: Options, spec: ImageSpec | None, images: list[Path]) -> Bench:
    """The extractors and the real images; the first process makes what the others then read.

    spec: what the models say of their images; without one, --data says which are the real ones, at
    the size of those that others made (images).
    """
    device = this_device()
    with PartialState().main_process_first():
        if spec:
            dataset = datasets.reload(spec, options.data, options.data_dir, options.text_encoder)
            # by the name that it was trained under: what was measured before a move stays measured
            dataset = replace(dataset, spec=replace(dataset.spec, name=spec.name))
        elif options.data:
            form = outside.form_of(images[0])
            dataset = datasets.load(options.data, options.data_dir, form)
        elif options.reference:
            form = outside.form_of(images[0])
            none = InMemory(torch.zeros(0, form.channels, form.size, form.size, dtype=torch.uint8))
            known = ImageSpec(printable(str(options.reference)), form.channels, form.size)
            dataset = datasets.Dataset(known, none, none, outside.LEVELS)
        else:
            raise UserError(
                "there is no run among what is compared: name with --data the dataset, or the "
                "folder of real images, to measure against, or with --reference saved statistics"
            )
        name, real = dataset.spec.name, Real.sample(dataset)
        choices = (options.features or usual_extractor(name, options.inception)).split(",")
        if len(dataset.train) < 2 and (len(dataset.train) or not options.reference):
            raise UserError(
                f"{name} has {len(dataset.train)} image: expected 2 or more to judge by"
            )
        main, *more = [
            extractor(each, real, device, weights(options, each, choices), trust=options.trust)
            for each in choices
        ]
        num_images, long_images = sizes(options, max(each.dim for each in (main, *more)))
        cross = extractor("random", real, device)
        agreement = clip_score(choices, device) if of_images(dataset.kinds) else None
        judge = Judge.of(real, main, cross, device, more, options.reference, agreement)
    if options.write_reference and PartialState().is_main_process:
        judge.real["own"].save(options.write_reference, main.sha256)
    return Bench(
        judge=judge,
        num_images=num_images,
        long_images=long_images,
        seeds=options.seeds,
        batch_size=options.batch_size,
        precision=options.precision,
        compile=options.compile,
        times=options.times,
        sweep=options.sweep,
        likelihood=options.likelihood,
        floors={n: judge.floor(n, DRAWS) for n in {num_images, long_images}},
        held_out={n: held_out(judge, n) for n in {num_images, long_images}},
    )


def affordable(options: Options, planned: list[Row], store: Store) -> int:
    """Images of a row where --num-images does not say: those of the newest rows here, else as many
    as the rows make in a minute each. One batch in few calls is timed."""
    earlier = [record for record in store.records.values() if not record.long]
    if earlier:
        return max(earlier, key=lambda record: record.date).num_images
    rows = [row for row in planned if not row.long]
    if not rows:
        return COUNTS[1]
    least = min(rows, key=lambda row: row.calls)
    call = partial(sample, least, options.batch_size)
    seconds = min(timed(call, this_device())[1] for _ in range(2))
    calls = sum(row.calls for row in rows) / len(rows) / least.calls  # as many times as long
    made = A_ROW * options.batch_size / (seconds * calls)
    counts = COUNTS if this_device().type == "cuda" else COUNTS[1:]
    return next((count for count in counts if count <= made), counts[-1])


def weights(options: Options, choice: str, choices: list[str]) -> Path | None:
    """The --inception for an extractor: where Inception is among the choices, for that alone."""
    return options.inception if choice == "inception" or "inception" not in choices else None


def sizes(options: Options, dim: int) -> tuple[int, int]:
    """Images of a row, and of a teacher's long plan: whole batches, timed in passing."""
    num_images = options.num_images or COUNTS[1]
    for flag, number in (("num", num_images), ("long", options.long_images)):
        if number is not None and number <= dim:
            raise UserError(
                f"--{flag}-images must be more than the {dim} dimensions of the features, "
                f"got {number}"
            )
    # the features of as many real images, for the floor
    machine.require_memory("--num-images", num_images, 8 * dim * num_images)
    if options.long_images is None:
        batches = -(-max(LONG_IMAGES, dim + 1, num_images // LONG_SHARE) // options.batch_size)
        return num_images, min(num_images, batches * options.batch_size)
    if options.long_images > num_images:
        raise UserError(
            f"--long-images must be at most --num-images {num_images}, got {options.long_images}"
        )
    return num_images, options.long_images


def home(paths: tuple[Path, ...]) -> Path:
    """compare/ in the folder that was named, or beside the run that was."""
    if not paths:
        raise UserError(
            "--out is needed to merge files of results: name the folder for the merged ones"
        )
    first = next((path for path in paths if not outside.is_outside(path)), paths[0])
    if foreign.door(first):
        return home_of(first) / "compare"
    beside = first.is_file() or outside.is_outside(first)
    named = first.parent if beside else first
    return (named.parent if (named / "model.safetensors").exists() else named) / "compare"


def write_results(store: Store, compared: Comparison, train: Tensor | None, form: str) -> None:
    """The tables and pictures; train: the training images, where they are at hand; form: how to
    print the table."""
    folder, images, rows = store.folder, store.samples, compared.lines
    teachers = [line for line in rows if line.record.parent is None]
    longest = max(teachers, key=lambda line: line.record.steps, default=None)
    ship = choice(rows)
    pairs = [x for x in rows if x in (longest, ship) and x.record.tag in images]
    some = [x for x in rows if x.record.own_plan or x.record.sampler == "ddim"]
    made = {
        "quality_nfe.png": pictures.cost_chart(rows, lambda line: line.record.nfe or None, CALLS),
        "samples.png": pictures.samples(some, images),
    }
    if compared.times:
        time_chart = pictures.cost_chart(rows, lambda line: line.milliseconds, MILLISECONDS)
        made["quality_ms.png"] = time_chart
    if train is not None and pairs:
        near = [(line, images[line.record.tag]) for line in pairs]
        made["nearest.png"] = pictures.nearest(near, train)
    files = {name: picture.file("png") for name, picture in made.items() if picture}
    for name, content in files.items():
        write_atomic(folder / name, content)
    write_atomic(folder / "table.md", table.markdown(compared))
    table.show(form, compared)
    say(f"{folder}: {', '.join(['results.jsonl', 'table.md', *files])}")
    for words in closing.take(rows).splitlines():
        say(words)
    say(f"make a page of it: {closing.python()} -m {closing.quoted('eval.report', str(folder))}")


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m eval.compare", config=config)
    with diverted(options.table != "rich"):
        compare(options)


if __name__ == "__main__":
    run(main)
