"""results.jsonl: what is written is read back, what is wrong is refused by name, rows that differ by row."""

import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from made_up import record, sha256

from diffusion.console import UserError
from eval.measure.timing import Timing
from eval.results import records, schema
from eval.results.records import Record

SCHEMA = json.loads(schema.SCHEMA.read_text("utf-8"))
DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
FULL = record(
    "teacher", 3,
    others={"kid": [0.5, -1e-17]}, held_out={"kid": 0.1},
    likelihood={"variational-bound": 3.5, "variational-bound-error": 0.1, "images": 90},
    timings=[
        Timing(1, 0.5, (0.25, 0.125), 2**40, 2**41, 0.75, None),
        Timing(4096, failed="out of memory"),
    ],
)  # fmt: skip
WRONG = [  # (where in a record, what is put there or None to remove it, the field that is named)
    (["nfe"], None, "nfe"),
    (["timings"], None, "timings"),
    (["timings", 0, "first"], None, "timings.0.first"),
    (["data", "split"], None, "data.split"),
    (["environment", "device"], None, "environment.device"),
    (["nfe"], -1, "nfe"),
    (["nfe"], 0, "nfe"),
    (["nfe"], 2.5, "nfe"),
    (["nfe"], True, "nfe"),
    (["steps"], "8", "steps"),
    (["own"], 1, "own"),
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
    (["timings", 0, "median"], 1, "timings.0.median"),
    (["conditions", "date"], "yesterday", "conditions.date"),
    (["training", "hours"], 3, "training.hours"),
    (["qualty"], [1.0], "qualty"),
]


def changed(place: list, value: object) -> str:
    line = json.loads(json.dumps(asdict(FULL)))
    *path, last = place
    inside = line
    for key in path:
        inside = inside[key]
    if value is None:
        del inside[last]
    else:
        inside[last] = value
    return json.dumps(line)


def properties(node: object) -> set[str]:
    """Every name that the schema gives a property, at any depth."""
    if isinstance(node, list):
        return set().union(*map(properties, node))
    if not isinstance(node, dict):
        return set()
    own = node.get("properties", {})
    return {*own} | set().union(*map(properties, node.values()))


def test_the_schema_has_the_fields_of_a_record_and_of_a_timing():
    Draft202012Validator.check_schema(SCHEMA)
    names = {each.name for each in fields(Record)}
    assert {*SCHEMA["properties"]} == {*SCHEMA["required"]} == names
    timing = SCHEMA["$defs"]["timing"]
    assert {*timing["properties"]} == {*timing["required"]} == {x.name for x in fields(Timing)}
    assert SCHEMA["properties"]["format"]["const"] == records.FORMAT


def test_every_property_of_the_schema_is_documented_and_described():
    text = DOCS.read_text("utf-8")
    assert [name for name in sorted(properties(SCHEMA)) if f"`{name}`" not in text] == []
    assert f"format {records.FORMAT}" in text
    described = [*SCHEMA["properties"].values(), *SCHEMA["$defs"]["timing"]["properties"].values()]
    assert [each for each in described if "description" not in each] == []


def test_every_rule_of_the_schema_has_words_for_who_breaks_it():
    def rules(node: object) -> set[str]:
        if isinstance(node, list):
            return set().union(*map(rules, node))
        if not isinstance(node, dict):
            return set()
        inside = [*node.get("properties", {}).values(), *node.get("$defs", {}).values()]
        inside += [node[key] for key in ("items", "additionalProperties") if key in node]
        return {*node} | set().union(*map(rules, inside))

    silent = {"$schema", "$defs", "$ref", "title", "description", "properties", "items"}
    assert rules(SCHEMA) - silent == {*schema.RULES, "required", "additionalProperties"}


@given(
    score=st.floats(allow_nan=False, allow_infinity=False),
    seconds=st.lists(st.floats(1e-9, 1e6), max_size=3),
    run=st.text(min_size=1),
    seeds=st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=3, unique=True),
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
    records.write(path, [made, FULL])
    assert records.read(path) == [made, FULL]
    assert [x.key for x in records.read(path)] == [made.key, FULL.key]


def test_where_there_is_no_file_there_are_no_records(tmp_path):
    assert records.read(tmp_path / "results.jsonl") == []


def test_a_row_that_is_begun_is_read_back_too(tmp_path):
    begun = replace(FULL, quality=[], others={}, timings=[], conditions={})
    records.write(tmp_path / "partial.jsonl", [begun])
    assert records.read(tmp_path / "partial.jsonl") == [begun]


@pytest.mark.parametrize(("place", "value", "named"), WRONG, ids=lambda x: str(x))
def test_a_line_that_is_wrong_is_refused_with_its_number_and_the_field(
    tmp_path, place, value, named
):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(asdict(FULL)) + "\n" + changed(place, value) + "\n")
    with pytest.raises(UserError) as error:
        records.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 2: {named}: ")
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
        records.read(path)


@pytest.mark.parametrize(
    ("version", "words"), [(1, "format 1, expected 2: measure again"), (3, "format 3")]
)
def test_another_version_of_the_format_says_so(tmp_path, version, words):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"format": version, "batch_seconds": [1.0]}) + "\n")
    with pytest.raises(UserError, match=words):
        records.read(path)


@pytest.mark.parametrize("figure", ["1e999", "-1e999", "NaN", "Infinity"])
def test_a_figure_that_overflows_is_refused(tmp_path, figure):
    path = tmp_path / "results.jsonl"
    line = json.dumps(asdict(replace(FULL, floor=[123456.5]))).replace("123456.5", figure)
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"floor\.0: expected number, got -?(NaN|Infinity)"):
        records.read(path)


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_never_written(tmp_path, figure):
    path = tmp_path / "results.jsonl"
    records.write(path, [FULL])
    with pytest.raises(UserError, match=r"teacher.* 3 steps: others\.kid\.1: "):
        records.write(path, [FULL, replace(FULL, others={"kid": [0.1, figure]})])
    assert records.read(path) == [FULL]


# --- what may share a table


def test_rows_alike_may_share_a_table():
    records.require_comparable([FULL, record("student", 1, parent=FULL.sha256), record()])


OTHERS = [  # what differs, what the message names, whether it matters without times
    ({"num_images": 200}, "num images 200", True),
    ({"seeds": [0, 2]}, "seeds 0 2", True),
    ({"metric": "fid", "extractor": {"sha256": "f" * 64}}, "metric fid ffffffff", True),
    ({"extractor": {"sha256": "f" * 64}}, "fd-cnn-digits-0123abcd ffffffff", True),
    ({"data": {"name": "digits", "split": "test", "images": 1438}}, "digits test", True),
    ({"data": {"name": "/home/me/digits", "split": "train", "images": 10}}, "10 of digits train", True),
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
        records.require_comparable(rows)
    message = str(error.value)
    assert f"{words} in student 1: " in message
    assert "in teacher 16, teacher 8, teacher 4 and 2 more; " in message
    assert "\n" not in message
    assert ("--no-times" in message) != always
    if always:
        with pytest.raises(UserError, match="cannot share a table"):
            records.require_comparable(rows, times=False)
    else:
        records.require_comparable(rows, times=False)


def test_many_kinds_of_rows_still_make_one_short_line():
    rows = [record("student", 1, num_images=n, sha256=sha256(str(n))) for n in range(1, 200)]
    with pytest.raises(UserError) as error:
        records.require_comparable(rows)
    assert len(str(error.value)) < 300
    assert "and 196 more" in str(error.value)


def test_a_folder_of_images_may_lie_elsewhere_on_another_machine():
    here = {"name": "/home/a/photos", "split": "train", "images": 90, "sha256": sha256("photos")}
    rows = [record(data=here), record("student", data=here | {"name": "/mnt/photos"})]
    records.require_comparable(rows)
    other = record("student", data=here | {"sha256": sha256("other photos")})
    with pytest.raises(UserError, match="real images"):
        records.require_comparable([rows[0], other])


def test_a_teachers_long_plan_alone_may_have_fewer_images_than_the_rest():
    rest = [record("student", n, parent=sha256("teacher")) for n in (1, 2)]
    few = record("teacher", 1000, num_images=50)
    records.require_comparable([few, *rest])
    records.require_comparable([record("teacher", 1000), few, *rest])
    short = record("teacher", records.LONG, num_images=50)
    solver = record("teacher", 1000, own=False, num_images=50)
    student = record("student", 1000, parent=sha256("teacher"), num_images=50)
    for other in (short, solver, student, replace(few, num_images=200), replace(few, seeds=[7])):
        with pytest.raises(UserError, match=r"num images|seeds 7"):
            records.require_comparable([other, *rest])


def test_titles_tell_apart_what_would_be_mixed_up_and_nothing_else():
    def progressive(folder: str, steps: int, **changes) -> Record:
        run = f"{folder}/progressive/{steps:04d}/model.safetensors"
        weights = sha256(f"{folder} {steps}")
        return record("progressive", steps, run=run, sha256=weights, parent=FULL.sha256, **changes)

    one = [progressive("runs/digits", n) for n in (4, 2, 1)]
    assert records.titles([FULL, *one]) == ["teacher", *["progressive"] * 3]
    two = [progressive("runs/long", n) for n in (2, 1)]
    found = records.titles([FULL, *one, *two])
    assert found == ["teacher", *["progressive [digits]"] * 3, *["progressive [long]"] * 2]
    machine = {"device": "another", "precision": "fp32", "torch": "2.6", "threads": 1}
    moved = [replace(row, environment=machine) for row in one]
    assert {*records.titles([*one, *moved])} == {"progressive [a device]", "progressive [another]"}
    again = replace(one[0], sha256=sha256("again"))
    assert len({*records.titles([one[0], again])}) == 2


def test_merging_keeps_each_measurement_once_and_of_equals_the_latest():
    def at(date: str | None, score: float, row: Record = FULL) -> Record:
        return replace(row, quality=[score] * 2, conditions={"date": date} if date else {})

    other = replace(FULL, batch_size=7)
    old, new = at("2025-01-02T00:00:00+00:00", 1.0), at("2025-10-01T00:00:00+00:00", 2.0)
    assert records.merge([[old, other], [new]]) == [new, other]
    assert records.merge([[new, other], [old]]) == [new, other]
    assert records.merge([[at(None, 3.0)], [old]]) == [old]
    assert records.merge([[old], [at(None, 3.0)]]) == [old]
    assert records.merge([]) == []
    copied = replace(new, run="elsewhere")
    assert records.merge([[new], [copied]]) == [new]


def test_what_is_merged_in_another_order_is_the_same_set():
    rows = [replace(FULL, num_images=n) for n in (100, 200, 300)]
    ways = [records.merge([rows[:2], rows[1:]]), records.merge([rows[1:], rows[:2]])]
    assert ways[0] == rows
    assert {x.key for x in ways[0]} == {x.key for x in ways[1]}
