"""results.jsonl: what is written is read back, what is wrong is refused by name or by its row."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import record, sha256

from benchmarks.changes import ABSENT, changed
from diffusion.console import UserError
from diffusion.files import load_tensors
from eval.results import jsonl, records, together
from eval.results.records import Record, Timing
from eval.results.store import Store

SCHEMA = records.schema()["$defs"]
DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
FULL = record(
    "teacher", 3,
    others={"kid": [0.5, -1e-17]}, held_out={"kid": 0.1},
    likelihood={"variational-bound": 3.5, "variational-bound-error": 0.1, "images": 90},
    timings=[
        Timing(1, 0.5, (0.25, 0.125), 2**40, 2**41),
        Timing(4096, failed="out of memory"),
    ],
)  # fmt: skip
WRONG = [  # (where in a record, what is put there or None to remove it, the field that is named)
    (["nfe"], None, "nfe"),
    (["sampler"], None, "sampler"),
    (["timings", 0, "batch_size"], None, "timings.0.batch_size"),
    (["data", "split"], None, "data.split"),
    (["environment", "device"], None, "environment.device"),
    (["nfe"], -1, "nfe"),
    (["nfe"], 0, "nfe"),
    (["nfe"], 2.5, "nfe"),
    (["nfe"], True, "nfe"),
    (["steps"], "8", "steps"),
    (["own_plan"], 1, "own_plan"),
    (["guidance"], "2", "guidance"),
    (["note"], 3, "note"),
    (["seeds"], [], "seeds"),
    (["seeds"], [1, 1], "seeds"),
    (["seeds", 1], "1", "seeds.1"),
    (["quality"], [1.0, 2.0, 3.0], "quality"),
    (["quality"], 1.0, "quality"),
    (["quality", 0], math.nan, "quality.0"),
    (["quality", 1], math.inf, "quality.1"),
    (["others", "kid"], [0.1, 0.2, 0.3], "kid"),
    (["others", "kid", 0], "0.1", "others.kid.0"),
    (["held_out", "kid"], -math.inf, "held_out.kid"),
    (["floor"], [], "floor"),
    (["angles"], [0.0], "angles"),
    (["angles", 1], 90, "angles.1"),
    (["sha256"], "abc", "sha256"),
    (["parent"], "teacher", "parent"),
    (["extractor", "accuracy"], 98, "extractor.accuracy"),
    (["extractor", "acuracy"], 0.98, "extractor.acuracy"),
    (["likelihood", "bits"], 3.0, "likelihood.bits"),
    (["timings", 0, "seconds", 1], 0, "timings.0.seconds.1"),
    (["timings", 1, "failed"], 1, "timings.1.failed"),
    (["timings", 0, "joules"], 1, "timings.0.joules"),
    (["conditions", "date"], "yesterday", "conditions.date"),
    (["training", "hours"], 3, "training.hours"),
    (["qualty"], [1.0], "qualty"),
]


def two_lines(record: Record) -> list[dict]:
    """The head and the row that a record is written as."""
    return [json.loads(line) for line in jsonl.lines([record]).splitlines()]


def with_change(place: list, value: object) -> tuple[str, int]:
    """FULL's two lines with one field changed, and the number of the line that it is in."""
    written = two_lines(FULL)
    number = 0 if place[0] in jsonl.SHARED else 1
    written[number] = changed(written[number], place, ABSENT if value is None else value)
    return "".join(json.dumps(line) + "\n" for line in written), number + 1


def test_every_property_of_the_schema_is_documented_and_described():
    text = DOCS.read_text("utf-8")
    properties = {
        name: value for kind in SCHEMA.values() for name, value in kind["properties"].items()
    }
    assert {each.name for each in fields(Record)} < {*properties}
    assert [name for name in sorted(properties) if f"`{name}`" not in text] == []
    described = [*properties.values(), *SCHEMA.values()]
    assert [value for value in described if not {"description", "$ref"} & {*value}] == []
    assert f"format {records.FORMAT}" in text


def test_the_schema_of_a_line_can_be_printed():
    command = [sys.executable, "-m", "eval.results.records"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == records.schema()


@given(
    score=st.floats(-1e30, 1e30),
    seconds=st.lists(st.floats(1e-9, 1e6), max_size=3),
    run=st.text(min_size=1),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3, unique=True),
    parent=st.none() | st.just(sha256("a parent")),
)
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, score, seconds, run, seeds, parent):
    path = tmp_path_factory.mktemp("records") / "results.jsonl"
    timings = [Timing(1, seconds=tuple(seconds)), *FULL.timings]
    made = replace(
        FULL, quality=[score] * len(seeds), seeds=seeds, run=run, parent=parent, timings=timings,
        others={run: [score]},
    )  # fmt: skip
    jsonl.write(path, [made, FULL])
    assert jsonl.read(path) == [made, FULL]
    assert [x.key for x in jsonl.read(path)] == [made.key, FULL.key]


def test_where_there_is_no_file_there_are_no_records(tmp_path):
    assert jsonl.read(tmp_path / "results.jsonl") == []


def test_a_row_that_is_begun_is_read_back_too(tmp_path):
    begun = replace(FULL, quality=[], others={}, training={}, timings=[], conditions={})
    jsonl.write(tmp_path / "partial.jsonl", [begun])
    assert jsonl.read(tmp_path / "partial.jsonl") == [begun]


@pytest.mark.parametrize(("place", "value", "named"), WRONG, ids=lambda x: str(x))
def test_a_line_that_is_wrong_is_refused_with_its_number_and_the_field(
    tmp_path, place, value, named
):
    path = tmp_path / "results.jsonl"
    text, number = with_change(place, value)
    path.write_text(text)
    with pytest.raises(UserError) as error:
        jsonl.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line {number}: {named}: ")
    assert "\n" not in message
    assert len(message) < 200 + len(str(path))
    if value is not None:
        assert "expected" in message or "no such field" in message


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "3", '"text"', "null", '{"format": 2', "\xff", "{}"]
)
def test_a_line_that_is_no_record_at_all_is_a_users_mistake(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_bytes(text.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=re.escape(f"{path}, line 1: ")):
        jsonl.read(path)


@pytest.mark.parametrize(
    ("version", "words"), [(1, "format 1, expected 4: measure again"), (5, "format 5")]
)
def test_another_version_of_the_format_says_so(tmp_path, version, words):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"format": version, "batch_seconds": [1.0]}) + "\n")
    with pytest.raises(UserError, match=words):
        jsonl.read(path)


@pytest.mark.parametrize("figure", ["1e999", "-1e999", "NaN", "Infinity"])
def test_a_figure_that_overflows_is_refused(tmp_path, figure):
    path = tmp_path / "results.jsonl"
    path.write_text(jsonl.lines([replace(FULL, floor=[123456.5])]).replace("123456.5", figure))
    with pytest.raises(UserError, match=r"floor\.0: expected .* finite .*, got -?(NaN|Infinity)"):
        jsonl.read(path)


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_never_written(tmp_path, figure):
    path = tmp_path / "results.jsonl"
    jsonl.write(path, [FULL])
    with pytest.raises(UserError, match=r"teacher.* 3 steps: others\.kid\.1: "):
        jsonl.write(path, [FULL, replace(FULL, others={"kid": [0.1, figure]})])
    assert jsonl.read(path) == [FULL]


def test_a_record_that_is_refused_leaves_no_file_that_was_not_there(tmp_path):
    for quality in ([math.nan], [math.nan, 1.0]):  # begun, and measured to the end
        with pytest.raises(UserError, match="quality"):
            Store.open(tmp_path).put(record(quality=quality), images={"a": torch.zeros(1)})
    assert [*tmp_path.iterdir()] == []


# --- the file


def test_what_rows_share_is_said_once_and_what_is_empty_not_at_all(tmp_path):
    few = replace(FULL, num_images=50, floor=[9.0])
    text = jsonl.lines([few, FULL, replace(FULL, sampler="heun"), few])
    kinds = ["head" if "format" in json.loads(line) else "row" for line in text.splitlines()]
    assert kinds == ["head", "row", "head", "row", "row", "head", "row"]
    assert "parent" not in text
    assert "null" not in text
    (tmp_path / "results.jsonl").write_text(text)
    assert jsonl.read(tmp_path / "results.jsonl")[1:3] == [FULL, replace(FULL, sampler="heun")]


def test_a_row_without_a_head_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(two_lines(FULL)[1]))
    with pytest.raises(UserError, match="line 1: expected a head line"):
        jsonl.read(tmp_path / "results.jsonl")


def format_2(record: Record, **changes) -> str:
    """A line as it was written before format 3."""
    values = json.loads(json.dumps(asdict(record)))
    values |= {"format": 2, "own": values.pop("own_plan")}
    values = {k: v for k, v in values.items() if k not in ("guidance", "note")}
    timings = [each | {"joules": None} for each in values["timings"]]
    return json.dumps(values | {"timings": timings} | changes) + "\n"


def test_format_2_is_read_as_what_it_said(tmp_path):
    path = tmp_path / "results.jsonl"
    student = record("student", 1, parent=FULL.sha256, own_plan=True)
    path.write_text(format_2(FULL) + format_2(student))
    assert jsonl.read(path) == [FULL, student]
    path.write_text(format_2(FULL, method="teacher shift 2.5"))
    (shifted,) = jsonl.read(path)
    assert (shifted.method, shifted.note) == ("teacher", "shift 2.5")
    assert shifted.title == "teacher shift 2.5"


@pytest.mark.parametrize(
    ("changes", "named"), [({"own": 1}, "own_plan"), ({"timings": 3}, "timings"), ({"x": 1}, "x")]
)
def test_a_line_of_format_2_that_is_wrong_is_refused_too(tmp_path, changes, named):
    path = tmp_path / "results.jsonl"
    path.write_text(format_2(FULL) + format_2(FULL, **changes))
    with pytest.raises(UserError, match=rf"line 2: {named}: "):
        jsonl.read(path)


# --- what makes a measurement the same


def test_rows_that_differ_in_their_guidance_alone_are_two_measurements():
    weak, strong = replace(FULL, guidance=1.5), replace(FULL, guidance=2.0)
    assert len({FULL.key, weak.key, strong.key}) == len({FULL.tag, weak.tag, strong.tag}) == 3
    assert together.merge([[FULL, weak], [strong, weak]]) == [FULL, weak, strong]
    named = together.titles([weak, strong])
    assert named == ["teacher [guidance 1.5]", "teacher [guidance 2]"]


def test_a_weight_of_1_is_no_guidance_and_no_other_measurement():
    assert replace(FULL, guidance=1.0).key == FULL.key


def test_sample_images_of_earlier_comparisons_keep_their_names():
    folder = Path(__file__).parents[1] / "results" / "fashion-mnist"
    images, _ = load_tensors(folder / "samples.safetensors")
    tags = {each.tag for each in jsonl.read(folder / "results.jsonl")}
    assert {*images} - {"real"} <= tags


# --- what may share a table


def test_rows_alike_may_share_a_table():
    alike = [FULL, record("student", 1, parent=FULL.sha256), record()]
    together.require_comparable(alike)  # raises nothing
    assert all(together.setting(each) == together.setting(FULL) for each in alike)


OTHERS = [  # what differs, what the message names, whether it matters without times
    ({"num_images": 200}, "num images 200", True),
    ({"seeds": [0, 2]}, "seeds 0 2", True),
    ({"metric": "fid", "extractor": {"sha256": "f" * 64}}, "metric fid ffffffff", True),
    ({"extractor": {"sha256": "f" * 64}}, "fd-cnn-digits-0123abcd ffffffff", True),
    ({"data": {"name": "digits", "split": "test", "images": 1438}}, "digits test", True),
    (
        {"data": {"name": "/home/me/digits", "split": "train", "images": 10}},
        "10 of digits train",
        True,
    ),
    ({"batch_size": 7}, "batch size 7", False),
    ({"environment": {"device": "another", "precision": "fp32", "torch": "2.6", "threads": 1}},
     "device another", False),
    ({"environment": {"device": "a device", "precision": "fp32", "torch": "2.7", "threads": 1}},
     "torch 2.7", False),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words", "always"), OTHERS)
def test_rows_that_differ_are_named_with_what_they_differ_in(change, words, always):
    rows = [record("teacher", n) for n in (16, 8, 4, 2, 1)] + [record("student", 1, **change)]
    with pytest.raises(UserError) as error:
        together.require_comparable(rows)
    message = str(error.value)
    assert f"{words} in student 1: " in message
    assert "in teacher 16, teacher 8, teacher 4 and 2 more; " in message
    assert "\n" not in message
    assert ("--no-times" in message) != always
    if always:
        with pytest.raises(UserError, match="cannot share a table"):
            together.require_comparable(rows, times=False)
    else:
        together.require_comparable(rows, times=False)


def test_many_kinds_of_rows_still_make_one_short_line():
    rows = [record("student", 1, num_images=n, sha256=sha256(str(n))) for n in range(1, 200)]
    with pytest.raises(UserError) as error:
        together.require_comparable(rows)
    assert len(str(error.value)) < 300
    assert "and 196 more" in str(error.value)


def test_a_folder_of_images_may_lie_elsewhere_on_another_machine():
    here = {"name": "/home/a/photos", "split": "train", "images": 90, "sha256": sha256("photos")}
    rows = [record(data=here), record("student", data=here | {"name": "/mnt/photos"})]
    together.require_comparable(rows)
    other = record("student", data=here | {"sha256": sha256("other photos")})
    with pytest.raises(UserError, match="real images"):
        together.require_comparable([rows[0], other])


def test_a_teachers_long_plan_alone_may_have_fewer_images_than_the_rest():
    rest = [record("student", n, parent=sha256("teacher")) for n in (1, 2)]
    few = record("teacher", 1000, num_images=50)
    together.require_comparable([few, *rest])
    together.require_comparable([record("teacher", 1000), few, *rest])
    short = record("teacher", records.LONG, num_images=50)
    solver = record("teacher", 1000, own_plan=False, num_images=50)
    student = record("student", 1000, parent=sha256("teacher"), num_images=50)
    for other in (short, solver, student, replace(few, num_images=200), replace(few, seeds=[7])):
        with pytest.raises(UserError, match=r"num images|seeds 7"):
            together.require_comparable([other, *rest])


def test_titles_tell_apart_what_would_be_mixed_up_and_nothing_else():
    def progressive(folder: str, steps: int, **changes) -> Record:
        run = f"{folder}/progressive/{steps:04d}/model.safetensors"
        weights = sha256(f"{folder} {steps}")
        return record("progressive", steps, run=run, sha256=weights, parent=FULL.sha256, **changes)

    one = [progressive("runs/digits", n) for n in (4, 2, 1)]
    assert together.titles([FULL, *one]) == ["teacher", *["progressive"] * 3]
    two = [progressive("runs/long", n) for n in (2, 1)]
    titles = together.titles([FULL, *one, *two])
    assert titles == ["teacher", *["progressive [digits]"] * 3, *["progressive [long]"] * 2]
    machine = {"device": "another", "precision": "fp32", "torch": "2.6", "threads": 1}
    moved = [replace(row, environment=machine) for row in one]
    assert {*together.titles([*one, *moved])} == {"progressive [a device]", "progressive [another]"}
    again = replace(one[0], sha256=sha256("again"))
    assert len({*together.titles([one[0], again])}) == 2


def test_merging_keeps_each_measurement_once_and_of_equals_the_latest():
    def at(date: str | None, score: float, row: Record = FULL) -> Record:
        return replace(row, quality=[score] * 2, conditions={"date": date} if date else {})

    other = replace(FULL, batch_size=7)
    old, new = at("2025-01-02T00:00:00+00:00", 1.0), at("2025-10-01T00:00:00+00:00", 2.0)
    assert together.merge([[old, other], [new]]) == [new, other]
    assert together.merge([[new, other], [old]]) == [new, other]
    assert together.merge([[at(None, 3.0)], [old]]) == [old]
    assert together.merge([[old], [at(None, 3.0)]]) == [old]
    assert together.merge([]) == []
    copied = replace(new, run="elsewhere")
    assert together.merge([[new], [copied]]) == [new]


def test_what_is_merged_in_another_order_is_the_same_set():
    rows = [replace(FULL, num_images=n) for n in (100, 200, 300)]
    ways = [together.merge([rows[:2], rows[1:]]), together.merge([rows[1:], rows[:2]])]
    assert ways[0] == rows
    assert {x.key for x in ways[0]} == {x.key for x in ways[1]}


@pytest.mark.parametrize(
    ("room", "closed"), [("results", ("measure", "show")), ("measure", ("show",))]
)
def test_the_rooms_of_the_harness_import_one_way(room, closed):
    files = (Path(records.__file__).parents[1] / room).glob("*.py")
    doors = re.compile(rf"^\s*(from|import) eval\.({'|'.join(closed)})\b", re.MULTILINE)
    assert [file.name for file in files if doors.search(file.read_text("utf-8"))] == []
