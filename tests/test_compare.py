"""The comparison: counted calls, every file, nothing measured twice, no figure that the batch changes."""

import dataclasses
import io
from pathlib import Path

import pytest
from PIL import Image

from eval import compare, measure, records, table
from eval.compare import Options
from eval.records import Record

SETTINGS = {
    "steps": "1,2,4",
    "num_images": 100,
    "batch_size": 64,
    "features": "random",
    "precision": "fp32",
}
CALLS = {  # of each sampler in so many steps
    "ancestral": lambda steps: steps,
    "ddim": lambda steps: steps,
    "heun": lambda steps: 2 * steps - 1,
    "dpm-solver++": lambda steps: steps,
}


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(measure.repeat, "__defaults__", (0.0,))


@pytest.fixture(scope="module")
def compared(tmp_path_factory, teacher, student) -> tuple[Path, list[Record]]:
    """A comparison's folder and its rows, of a teacher and its student."""
    folder = tmp_path_factory.mktemp("compare")
    options = Options(runs=(teacher.parent,), out=folder, **SETTINGS)
    return folder, compare.compare(options)


def test_a_comparison_leaves_its_records_its_table_and_three_pictures(compared):
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
    for name in ("quality_nfe.png", "quality_ms.png", "samples.png"):
        assert Image.open(io.BytesIO((folder / name).read_bytes())).size > (300, 100)


def test_the_calls_counted_are_those_that_the_sampler_claims(compared):
    _, rows = compared
    assert [row.nfe for row in rows] == [CALLS[row.sampler](row.steps) for row in rows]


def test_a_student_is_compared_with_its_own_teacher(compared):
    _, rows = compared
    assert table.teacher_of(rows) == rows[0]
    assert rows[-1].parent == rows[0].sha256


def test_a_second_comparison_measures_nothing_anew(compared, teacher, monkeypatch):
    folder, rows = compared
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("count_calls", "single_seconds", "batches"):
        monkeypatch.setattr(measure, name, None)
    again = compare.compare(Options(runs=(teacher.parent,), out=folder, **SETTINGS))
    assert again == rows
    for name in ("results.jsonl", "table.md", "samples.safetensors"):
        assert (folder / name).read_bytes() == before[name]


def test_a_comparison_that_was_stopped_measures_only_what_is_left(
    compared, teacher, tmp_path, monkeypatch
):
    _, rows = compared
    options = Options(runs=(teacher.parent,), out=tmp_path, **SETTINGS)
    evaluate, measured = compare.evaluate, []

    def stopping(bench, path, model, row, template):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(template.key)
        return evaluate(bench, path, model, row, template)

    monkeypatch.setattr(compare, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(options)
    first = list(measured)
    measured[:] = [None] * 4  # never again three
    compare.compare(options)
    assert first + measured[4:] == [row.key for row in rows]


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
    cells = {*table.COLUMNS, *(cell for row in table.cells(rows) for cell in row)}
    assert {cell for cell in cells if cell not in printed} == set()
