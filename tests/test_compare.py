"""The comparison: counted calls, every file, nothing measured twice, figures whatever the batch."""

import dataclasses
import io
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from made_up import record
from PIL import Image

from diffusion import data
from diffusion.console import UserError
from diffusion.image_file import Form
from diffusion.model import Model, load
from diffusion.schedules import cosine, respace, shifted
from eval import compare, report
from eval.compare import Options
from eval.measure import evaluate, nfe, race, stream, timing
from eval.measure.features import Extractor
from eval.measure.plans import rows
from eval.results import jsonl, together
from eval.results.records import Record
from eval.show import lines, table
from eval.show.lines import comparison

SETTINGS = {
    "steps": "1,2,4",
    "solvers": ("ddim", "heun", "dpm-solver++"),
    "num_images": 100,
    "batch_size": 64,
    "features": "random",
    "precision": "fp32",
    "likelihood": 8,
    "seeds": (0, 1),
}
CALLS = {  # of each sampler in so many steps
    "ancestral": lambda steps: steps,
    "ddim": lambda steps: steps,
    "heun": lambda steps: 2 * steps - 1,
    "dpm-solver++": lambda steps: steps,
}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """The fewest repeats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race.race, "__defaults__", (0.0,))
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory, teacher, student) -> tuple[Path, list[Record]]:
    """A comparison's folder and its rows, of a teacher and its student."""
    folder = tmp_path_factory.mktemp("compare")
    options = Options(runs=(teacher.parent,), out=folder, **SETTINGS)
    return folder, compare.compare(options)


def test_a_comparison_leaves_its_records_its_table_and_its_pictures(compared):
    folder, rows = compared
    assert [(r.method, r.sampler, r.steps, r.own_plan) for r in rows] == [
        ("teacher", "ancestral", 8, True),
        ("teacher", "ddim", 1, False),
        ("teacher", "ddim", 2, False),
        ("teacher", "ddim", 4, False),
        ("teacher", "heun", 2, False),
        ("teacher", "dpm-solver++", 2, False),
        ("teacher", "dpm-solver++", 4, False),
        ("progressive", "ddim", 4, True),
    ]
    assert jsonl.read(folder / "results.jsonl") == rows
    assert (folder / "table.md").read_text() == table.markdown(comparison(rows))
    for name in ("quality_nfe.png", "quality_ms.png", "samples.png", "nearest.png"):
        assert Image.open(io.BytesIO((folder / name).read_bytes())).size > (300, 100)


def test_the_calls_counted_are_those_that_the_sampler_claims(compared):
    _, rows = compared
    assert [row.nfe for row in rows] == [CALLS[row.sampler](row.steps) for row in rows]


def test_a_student_is_compared_with_its_own_teacher(compared):
    _, rows = compared
    assert lines.teachers(rows) == [rows[0]] * len(rows)
    assert rows[-1].parent == rows[0].sha256


def test_a_second_comparison_measures_nothing_anew(compared, teacher, monkeypatch):
    folder, rows = compared
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for module, name in ((nfe, "count_calls"), (evaluate, "race"), (stream, "look")):
        monkeypatch.setattr(module, name, None)
    again = compare.compare(Options(runs=(teacher.parent,), out=folder, **SETTINGS))
    assert again == rows
    for name in ("results.jsonl", "table.md", "samples.safetensors"):
        assert (folder / name).read_bytes() == before[name]


def test_a_table_says_how_many_settings_a_method_was_tuned_over(compared, tmp_path):
    folder, rows = compared
    files = (folder / "results.jsonl",)
    said = Options(runs=files, out=tmp_path, steps="1", tried=("progressive=12",))
    made = compare.compare(said)
    assert made == [dataclasses.replace(r, tried=12 if r.parent else None) for r in rows]
    assert "settings tried" in (tmp_path / "table.md").read_text()
    # it stays, and may be said anew
    kept = dataclasses.replace(said, runs=(tmp_path / "results.jsonl",), tried=("teacher=3",))
    assert [row.tried for row in compare.compare(kept)] == [3] * 7 + [12]


@pytest.mark.parametrize("from_files", [True, False])
def test_settings_of_a_method_that_no_row_is_of_are_refused_before_anything_is_measured(
    compared, teacher, tmp_path, monkeypatch, from_files
):
    monkeypatch.setattr(compare, "measure_rows", None)
    runs = (compared[0] / "results.jsonl",) if from_files else (teacher.parent,)
    options = Options(runs=runs, out=tmp_path / "new", tried=("cd=3",), **SETTINGS)
    with pytest.raises(UserError, match="--tried names cd: expected of teacher, progressive"):
        compare.compare(options)
    assert not (tmp_path / "new").exists()


def test_a_comparison_that_was_stopped_measures_only_what_is_left(
    compared, teacher, tmp_path, monkeypatch
):
    _, rows = compared
    options = Options(runs=(teacher.parent,), out=tmp_path, **SETTINGS)
    look, looked = stream.look, []

    def stopping(judge, model, plan, seed, *others):
        if len(looked) == 5:
            raise KeyboardInterrupt
        looked.append((seed, plan.sampler, plan.num_steps))
        return look(judge, model, plan, seed, *others)

    monkeypatch.setattr(stream, "look", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(options)
    begun = jsonl.read(tmp_path / "partial.jsonl")
    assert sorted(len(record.quality) for record in begun) == [0] * 5 + [1]
    first = list(looked)
    looked[:] = [None] * 6  # never again five
    again = compare.compare(options)
    cheapest = sorted(rows, key=lambda row: row.nfe)
    expected = [(seed, row.sampler, row.steps) for row in cheapest for seed in row.seeds]
    assert first + looked[6:] == expected
    assert not (tmp_path / "partial.jsonl").exists()
    assert [row.key for row in again] == [row.key for row in rows]
    assert all([t.batch_size for t in row.timings] == [1, 64] for row in again)


def test_quality_does_not_depend_on_the_batch_size(compared, student, tmp_path):
    _, rows = compared
    settings = SETTINGS | {"batch_size": 7, "num_images": 100}
    (small,) = compare.compare(Options(runs=(student,), out=tmp_path, **settings))
    assert small.sha256 == rows[-1].sha256
    assert small.quality == pytest.approx(rows[-1].quality, rel=1e-4)


@pytest.mark.parametrize("changed", [{"num_images": 90}, {"seeds": (3,)}, {"features": "other"}])
def test_what_is_measured_otherwise_is_not_taken_from_before(compared, changed):
    record = compared[1][0]
    changed = {"metric": "fd-other"} if "features" in changed else changed
    assert dataclasses.replace(record, **changed).key != record.key


def test_what_is_printed_holds_every_cell_of_the_table(compared, teacher, capsys):
    folder, rows = compared
    compare.compare(Options(runs=(teacher.parent,), out=folder, **SETTINGS))
    printed = capsys.readouterr().out
    first = table.tables(comparison(rows))[0]
    cells = {*first.heads, *(cell for row in first.cells for cell in row)}
    assert {cell for cell in cells if cell not in printed} == set()


def test_every_row_has_its_times_and_the_teacher_its_likelihood(compared):
    _, rows = compared
    for row in rows:
        assert [timing.batch_size for timing in row.timings] == [1, 64]
        assert all(len(timing.seconds) >= 3 and timing.first > 0 for timing in row.timings)
        assert row.conditions["date"] < "3"
    assert [bool(row.likelihood) for row in rows] == [True] + [False] * 7
    bits = rows[0].likelihood
    assert 0 < bits["probability-flow"] < bits["variational-bound"] < 9


@pytest.mark.parametrize("form", ["markdown", "csv", "latex", "jsonl"])
def test_a_table_to_be_piped_is_alone_on_stdout(compared, teacher, command, form):
    folder, rows = compared
    arguments = [
        "--steps",
        "1,2,4",
        "--solvers",
        "ddim",
        "heun",
        "dpm-solver++",
        "--num-images",
        100,
        "--batch-size",
        64,
        "--features",
        "random",
    ]
    arguments += [
        "--seeds",
        0,
        1,
        "--precision",
        "fp32",
        "--table",
        form,
        "--out",
        folder,
        teacher.parent,
    ]
    outcome = command(compare.main, *arguments)
    assert outcome.code == 0
    written = {
        "markdown": lambda: table.markdown(comparison(rows)),
        "csv": lambda: table.comma_separated(comparison(rows)),
        "latex": lambda: table.latex(comparison(rows)),
        "jsonl": lambda: table.json_lines(comparison(rows)),
    }
    assert outcome.out.strip() == written[form]().strip()
    assert str(folder) in outcome.err


def test_a_sweep_times_ever_larger_batches_and_says_where_it_ended(student, tmp_path):
    (row,) = compare.compare(Options((student,), out=tmp_path, sweep=True, **SETTINGS))
    sizes = [timing.batch_size for timing in row.timings]
    doubled = [size for size in sizes if size != 64 or size // 2 in sizes]
    assert doubled == [2**i for i in range(len(doubled))]  # it may have ended below the table's 64
    assert {1, 2, 64} <= {*sizes}
    assert row.best.images_per_second == max(t.images_per_second for t in row.timings if t.seconds)


def test_a_sweep_of_rows_that_were_timed_before_adds_to_their_times(student, tmp_path):
    (before,) = compare.compare(Options((student,), out=tmp_path, **SETTINGS))
    (after,) = compare.compare(Options((student,), out=tmp_path, sweep=True, **SETTINGS))
    assert after.timing(64) == before.timing(64)
    assert len(after.timings) > len(before.timings) == 2


def test_rows_of_another_machine_join_the_table_only_without_times(compared, student, tmp_path):
    _, rows = compared
    there = [
        dataclasses.replace(row, environment=row.environment | {"device": "another"})
        for row in rows[:3]
    ]
    jsonl.write(tmp_path / "theirs.jsonl", there)
    given = (student, tmp_path / "theirs.jsonl")
    with pytest.raises(UserError, match=r"another.*--no-times"):
        compare.compare(Options(runs=given, out=tmp_path / "timed", **SETTINGS))
    settings = SETTINGS | {"times": False}
    both = compare.compare(Options(runs=given, out=tmp_path / "both", **settings))
    assert [row.method for row in both] == ["teacher", "teacher", "teacher", "progressive"]
    assert both[-1].timings == []
    assert both[-1].conditions["date"] > both[0].conditions["date"]
    text = (tmp_path / "both" / "table.md").read_text()
    assert "images/s" not in text
    assert together.merge([jsonl.read(tmp_path / "both" / "results.jsonl")]) == both
    alone = Options(runs=given[1:], out=tmp_path / "merged", **settings)
    assert compare.compare(alone) == there


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_images": 90}, "num images 90 .*100 in"),
        ({"metric": "fd-other"}, "fd-other .*fd-random"),
        ({"data": {"name": "digits", "split": "test", "images": 359}}, "359 of digits test"),
    ],
)
def test_a_table_refuses_to_mix(compared, student, tmp_path, changed, words):
    _, rows = compared
    jsonl.write(tmp_path / "theirs.jsonl", [dataclasses.replace(rows[0], **changed)])
    given = (student, tmp_path / "theirs.jsonl")
    with pytest.raises(UserError, match=words):
        compare.compare(Options(runs=given, out=tmp_path / "out", times=False, **SETTINGS))
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_row_whose_images_are_none_is_left_out_with_the_reason(
    compared, teacher, tmp_path, monkeypatch
):
    x0 = Model.x0

    def broken(self, plan, *others):
        return x0(self, plan, *others) * (torch.nan if self.card.parent else 1)

    monkeypatch.setattr(Model, "x0", broken)
    settings = SETTINGS | {"times": False}
    with pytest.raises(UserError, match=r"1 rows are left out: progressive 4 .*NaN"):
        compare.compare(Options(runs=(teacher.parent,), out=tmp_path, **settings))
    assert [row.method for row in jsonl.read(tmp_path / "results.jsonl")] == ["teacher"] * 7


def test_a_comparison_without_the_long_row_has_all_others(compared, teacher, tmp_path):
    options = Options(runs=(teacher.parent,), out=tmp_path, **SETTINGS | {"long": False})
    planned = compare.plan(options, options.runs)
    keys = [(row.model.sha256, row.plan.sampler, row.plan.num_steps) for row in planned]
    _, rows = compared
    assert keys == [(r.sha256, r.sampler, r.steps) for r in rows][1:]


def test_a_models_own_sampler_is_compared_at_counts_that_are_not_its_own(teacher):
    planned = list(rows(teacher, load(teacher), [4, 8], ("ancestral",)))
    assert [(row.title, row.own_plan) for row in planned] == [
        ("teacher 8", True),
        ("teacher, ancestral 4", False),
    ]


@pytest.mark.parametrize(
    ("dim", "batch_size", "long_images"),
    [(64, 256, 512), (64, 100, 600), (64, 1000, 1000), (2048, 256, 2304)],
)
def test_a_long_plan_is_judged_on_whole_batches_of_as_few_images_as_the_features_allow(
    monkeypatch, teacher, dim, batch_size, long_images
):
    made = Extractor("fd", "0" * 64, dim, extract=None)
    monkeypatch.setattr(compare, "extractor", lambda *asked, **trust: made)
    monkeypatch.setattr(compare.Judge, "of", lambda *given: Mock())
    monkeypatch.setattr(compare, "held_out", lambda *given: {})
    bench = compare.prepare(Options(batch_size=batch_size), load(teacher).spec, [])
    assert (bench.num_images, bench.long_images) == (10_000, long_images)


def test_solvers_are_compared_at_every_shift_that_is_told(teacher):
    model = load(teacher)
    planned = list(rows(teacher, model, [1, 2, 4], ("ddim",), long=False, shifts=(1.0, 3.0)))
    counts = [(1, 1), (1, 2), (1, 4), (3, 2), (3, 4)]  # one step is the same at every shift
    assert [row.title for row in planned] == [f"teacher shift {k}, ddim {n}" for k, n in counts]
    for row, (shift, _) in zip(planned, counts, strict=True):
        expected = shifted(respace(model.schedule, row.plan.num_steps), shift)
        assert row.plan.angles == tuple(expected.tolist())


# --- a teacher's long plan

LONG = SETTINGS | {"steps": "1,2", "solvers": ("ddim", "unipc"), "seeds": (0,)}
LONG |= {"num_images": 200, "long_images": 128, "likelihood": 0}


@pytest.fixture(scope="module")
def slow(tmp_path_factory, train_tiny) -> Path:
    """A teacher of 120 steps."""
    return train_tiny(tmp_path_factory.mktemp("slow") / "teacher", angles=cosine(120))


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int]]:
    """(steps, images) of each call for images; by the clock of the times each takes 0.05 s a step,
    and the first of its kind a second more."""
    made, known, x0, timed = [], set(), Model.x0, timing.timed

    def counted(self, plan, seed, numbers, *others):
        made.append((plan.num_steps, len(numbers)))
        return x0(self, plan, seed, numbers, *others)

    def simulated(call, device):
        result, _ = timed(call, device)
        compiles = made[-1] not in known
        known.add(made[-1])
        return result, 0.05 * made[-1][0] + compiles

    monkeypatch.setattr(Model, "x0", counted)
    monkeypatch.setattr(timing, "timed", simulated)
    return made


def test_a_long_plan_is_timed_while_its_fewer_images_are_made(slow, tmp_path, calls):
    rows = compare.compare(Options(runs=(slow,), out=tmp_path, **LONG))
    names = [(row.sampler, row.steps, row.num_images) for row in rows]
    assert names == [
        ("ancestral", 120, 128),
        ("ddim", 1, 200),
        ("ddim", 2, 200),
        ("unipc", 2, 200),
        ("unipc", 32, 200),
    ]
    assert calls.count((120, 64)) == 2  # those of the quality run
    assert rows[0].timing(64).first == pytest.approx(7.0)
    assert rows[0].timing(64).seconds == pytest.approx((6.0,))
    assert calls.count((120, 1)) == 1 + 3  # counted; then the first and two repeats
    for row in rows[1:]:  # in a race
        assert [t.batch_size for t in row.timings] == [1, 64]
        assert row.timing(64).seconds[:2] == pytest.approx((0.05 * row.steps,) * 2)
    assert rows[-1].timing(64).first == pytest.approx(2.6)  # of its images, as it was compiled
    assert rows[0].floor != rows[1].floor
    in_table = lines.lines(rows)
    assert in_table[0].ratio is None
    assert [line.yardstick.steps for line in in_table] == [32] * 5
    assert in_table[1].speed_up == pytest.approx(120)


def test_a_comparison_stopped_within_its_long_row_still_ends_with_times(
    slow, tmp_path, calls, monkeypatch
):
    monkeypatch.setattr(stream, "SAVE_EVERY", -1.0)
    options = Options(runs=(slow,), out=tmp_path, **LONG)
    see = compare.Judge.see

    def stopping(self, x0, start, *others):
        if calls[-1][0] == 120 and start == 64:
            raise KeyboardInterrupt
        return see(self, x0, start, *others)

    with monkeypatch.context() as patch:
        patch.setattr(compare.Judge, "see", stopping)
        with pytest.raises(KeyboardInterrupt):
            compare.compare(options)
    calls.clear()
    rows = compare.compare(options)
    assert calls.count((120, 64)) == 1  # the batch that was lost
    assert rows[0].batch.seconds == pytest.approx((6.0,))
    assert jsonl.read(tmp_path / "results.jsonl") == rows


def test_a_long_batch_says_how_far_it_is(slow, monkeypatch, capsys):
    model, clock = load(slow), Mock(side_effect=iter(range(1000)))
    monkeypatch.setattr(evaluate, "time", Mock(monotonic=clock))  # a second passes with each call
    row = rows(slow, model, None, ())[0]
    with evaluate.heard(row):
        for start in (0, 2):
            model.x0(row.plan, 0, torch.arange(start, start + 2))
    assert capsys.readouterr().out.splitlines() == 2 * [
        "teacher 120: call 32 of 120 of this batch, 85 s left of it",
        "teacher 120: call 63 of 120 of this batch, 56 s left of it",
        "teacher 120: call 94 of 120 of this batch, 26 s left of it",
    ]
    model.x0(row.plan, 0, torch.arange(2))
    assert capsys.readouterr().out == ""


def test_rows_judged_without_times_get_them_later(slow, tmp_path, calls):
    options = Options(runs=(slow,), out=tmp_path, **LONG | {"times": False})
    before = compare.compare(options)
    assert all(row.timings == [] for row in before)
    after = compare.compare(dataclasses.replace(options, times=True))
    assert [row.quality for row in after] == [row.quality for row in before]
    assert all(row.batch and row.single for row in after)


def test_a_long_plan_on_as_many_images_as_the_rest_is_the_yardstick_itself(slow, tmp_path, calls):
    settings = LONG | {"long_images": 200, "times": False}
    rows = compare.compare(Options(runs=(slow,), out=tmp_path, **settings))
    in_table = lines.lines(rows)
    assert [line.yardstick.steps for line in in_table] == [120] * 5
    assert in_table[0].title == "teacher"


@pytest.mark.parametrize(
    ("steps", "solvers", "long", "added"),
    [
        ("1,2", ("ddim", "unipc"), True, [("unipc", 32)]),
        ("1,16", ("ddim", "unipc"), True, []),
        ("1,16", ("heun",), True, [("heun", 16)]),  # 16 calls are 8 steps: too few; 32 are 16
        ("1,2", (), True, [("unipc", 32)]),  # none is named: the last that the card takes
        ("1,2", ("ddim", "unipc"), False, []),
    ],
)
def test_a_row_that_can_stand_in_for_the_long_plan_is_added_where_none_can(
    slow, steps, solvers, long, added
):
    model, counts = load(slow), [int(n) for n in steps.split(",")]
    made = rows(slow, model, counts, solvers, long)
    plans = [(row.plan.sampler, row.plan.num_steps) for row in made]
    without = [each for each in plans if each not in added]
    assert plans == without + added
    assert all(steps in (1, 2, 8, 16, 120) for _, steps in without)
    assert (("ancestral", 120) in plans) == long


def test_images_of_a_long_plan_are_no_more_than_the_others(slow):
    with pytest.raises(UserError, match="--long-images must be at most --num-images 100"):
        compare.sizes(Options(num_images=100, long_images=200), dim=64)
    with pytest.raises(UserError, match="--long-images must be more than the 64"):
        compare.sizes(Options(long_images=64), dim=64)


# --- a folder too small to hold images out


@pytest.mark.parametrize("count", [3, 12, 40])
def test_a_handful_of_images_is_compared_to_the_end(
    tmp_path, train_tiny, quick, digits, count, capsys
):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(digits.train.images[:count, 0]):
        Image.fromarray(image.numpy()).save(tmp_path / "photos" / f"{i:02d}.png")
    photos = data.load(str(tmp_path / "photos"), form=Form(8, 1))
    assert (len(photos.train), len(photos.test)) == (count, 0)
    few = dataclasses.replace(quick, batch_size=min(count, quick.batch_size))
    train_tiny(tmp_path / "runs" / "teacher", few, dataset=photos)
    settings = SETTINGS | {"steps": "1,2", "solvers": ("ddim",), "seeds": (0,)}
    records = compare.compare(Options(runs=(tmp_path / "runs",), **settings))
    assert [(row.held_out, row.likelihood) for row in records] == [({}, {})] * len(records)
    words = (tmp_path / "runs" / "compare" / "table.md").read_text()
    assert "no images are held out" in words
    assert "\nno student is among these rows" in capsys.readouterr().out
    page = report.write(report.Options((tmp_path / "runs" / "compare",)))
    assert "no images are held out" in page.read_text()


@pytest.mark.parametrize(("seconds", "images"), [(0.01, 10_000), (0.4, 5_000), (50.0, 1_000)])
def test_a_row_is_of_as_many_images_as_a_minute_makes(monkeypatch, tmp_path, seconds, images):
    """A batch of 256 in one call takes so many seconds; the rows make 6 calls in the mean."""
    planned = [Mock(calls=calls, long=False) for calls in (1, 2, 15)] + [Mock(long=True)]
    monkeypatch.setattr(compare, "timed", lambda call, device: (None, seconds))
    store = Mock(records={})
    assert compare.affordable(Options(), planned, store) == images
    earlier = record(num_images=321)
    store.records = {earlier.key: earlier}
    assert compare.affordable(Options(), planned, store) == 321
