"""The comparison: counted calls, every file, nothing measured twice, no figure that the batch changes."""

import dataclasses
import io
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from diffusion.console import UserError
from diffusion.model import Model, load
from diffusion.schedules import respace, shifted
from eval import compare, evaluate, lines, measure, race, records, stream, table
from eval.compare import Options
from eval.features import Extractor
from eval.plans import rows
from eval.records import Record

SETTINGS = {
    "steps": "1,2,4",
    "solvers": ("ddim", "heun", "dpm-solver++"),
    "num_images": 100,
    "batch_size": 64,
    "features": "random",
    "precision": "fp32",
    "likelihood": 8,
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
    assert [(r.method, r.sampler, r.steps, r.own) for r in rows] == [
        ("teacher", "ancestral", 8, True),
        ("teacher", "ddim", 1, False),
        ("teacher", "ddim", 2, False),
        ("teacher", "ddim", 4, False),
        ("teacher", "heun", 2, False),
        ("teacher", "dpm-solver++", 2, False),
        ("teacher", "dpm-solver++", 4, False),
        ("progressive", "ddim", 4, True),
    ]
    assert records.read(folder / "results.jsonl") == rows
    assert (folder / "table.md").read_text() == table.markdown(rows)
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
    for module, name in ((measure, "count_calls"), (evaluate, "race"), (stream, "look")):
        monkeypatch.setattr(module, name, None)
    again = compare.compare(Options(runs=(teacher.parent,), out=folder, **SETTINGS))
    assert again == rows
    for name in ("results.jsonl", "table.md", "samples.safetensors"):
        assert (folder / name).read_bytes() == before[name]


def test_a_comparison_that_was_stopped_measures_only_what_is_left(
    compared, teacher, tmp_path, monkeypatch
):
    _, rows = compared
    options = Options(runs=(teacher.parent,), out=tmp_path, **SETTINGS)
    look, looked = stream.look, []

    def stopping(judge, model, plan, seed, *others):
        if len(looked) == 5:
            raise KeyboardInterrupt
        looked.append((seed, plan[0], len(plan[1]) - 1))
        return look(judge, model, plan, seed, *others)

    monkeypatch.setattr(stream, "look", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(options)
    begun = records.read(tmp_path / "partial.jsonl")
    assert sorted(len(record.quality) for record in begun) == [0] * 5 + [1]
    first = list(looked)
    looked[:] = [None] * 6  # never again five
    timed = race.race
    monkeypatch.setattr(evaluate, "race", None)  # the times are on disk
    compare.compare(options)
    assert race.race is timed
    expected = [(seed, row.sampler, row.steps) for row in rows for seed in row.seeds]
    assert first + looked[6:] == expected
    assert not (tmp_path / "partial.jsonl").exists()


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
    first = table.tables(rows)[0]
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
    told = [
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
    told += ["--precision", "fp32", "--table", form, "--out", folder, teacher.parent]
    outcome = command(compare.main, *told)
    assert outcome.code == 0
    written = {
        "markdown": lambda: table.markdown(rows),
        "csv": lambda: table.comma_separated(rows),
        "latex": lambda: table.latex(rows),
        "jsonl": lambda: table.json_lines(rows),
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
    records.write(tmp_path / "theirs.jsonl", there)
    given = (student, tmp_path / "theirs.jsonl")
    with pytest.raises(UserError, match=r"another.*--no-times"):
        compare.compare(Options(runs=given, out=tmp_path / "timed", **SETTINGS))
    settings = SETTINGS | {"times": False}
    shown = compare.compare(Options(runs=given, out=tmp_path / "both", **settings))
    assert [row.method for row in shown] == ["teacher", "teacher", "teacher", "progressive"]
    assert shown[-1].timings == []
    assert shown[-1].conditions["date"] > shown[0].conditions["date"]
    text = (tmp_path / "both" / "table.md").read_text()
    assert "images/s" not in text
    assert records.merge([records.read(tmp_path / "both" / "results.jsonl")]) == shown
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
    records.write(tmp_path / "theirs.jsonl", [dataclasses.replace(rows[0], **changed)])
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
    assert [row.method for row in records.read(tmp_path / "results.jsonl")] == ["teacher"] * 7


def test_a_comparison_without_the_long_row_has_all_others(compared, teacher, tmp_path):
    options = Options(runs=(teacher.parent,), out=tmp_path, **SETTINGS | {"long": False})
    planned = compare.planned(options, options.runs)
    found = [(row.model.sha256, row.sampler, len(row.angles) - 1) for row in planned]
    _, rows = compared
    assert found == [(r.sha256, r.sampler, r.steps) for r in rows][1:]


def test_a_models_own_sampler_is_compared_at_counts_that_are_not_its_own(teacher):
    found = list(rows(teacher, load(teacher), [4, 8], ("ancestral",)))
    assert [(row.title, row.own) for row in found] == [
        ("teacher 8", True),
        ("teacher, ancestral 4", False),
    ]


@pytest.mark.parametrize(("dim", "num_images"), [(2048, 10_000), (64, 1024)])
def test_as_many_images_are_taken_as_the_features_need(monkeypatch, teacher, dim, num_images):
    made = Extractor("fd", "0" * 64, dim, extract=None)
    monkeypatch.setattr(compare, "extractor", lambda *asked: made)
    monkeypatch.setattr(compare.Judge, "of", lambda *given: Mock())
    bench = compare.prepare(Options(), load(teacher))
    assert bench.num_images == num_images


def test_solvers_are_compared_at_every_shift_that_is_told(teacher):
    model = load(teacher)
    found = list(rows(teacher, model, [1, 2, 4], ("ddim",), long=False, shifts=(1.0, 3.0)))
    counts = [(1, 1), (1, 2), (1, 4), (3, 2), (3, 4)]  # one step is the same at every shift
    assert [row.title for row in found] == [f"teacher shift {k}, ddim {n}" for k, n in counts]
    for row, (shift, _) in zip(found, counts, strict=True):
        expected = shifted(respace(model.schedule, len(row.angles) - 1), shift)
        assert row.angles.equal(expected)
