"""Methods pooled over training seeds, and whether other distances rank them alike."""

import json
from dataclasses import replace
from statistics import mean

import pytest

from diffusion.console import UserError
from eval.measure.intervals import Estimate, of_trainings
from eval.methods import Options, Pool, in_words, pools, rankings, summarise
from eval.results import jsonl
from tests.made_up import record, sha256

TEACHER = record(nfe=1000, score=2.0)
MILD = {"recipe": "3456cdef", "images": 276_544}
RANDOM = "fd-random-digits-0123abcd"


def students(method: str, scores: list[float], nfe: int = 2, **changes) -> list:
    return [
        record(
            method, nfe, score, parent=TEACHER.sha256, sha256=sha256(f"{method} {seed}"),
            **{"run": f"runs/{method}-{seed}/model.safetensors", "training": MILD} | changes,
        )
        for seed, score in enumerate(scores)
    ]  # fmt: skip


def test_students_that_differ_in_their_seed_alone_are_one_figure():
    _, pool = pools([TEACHER, *students("cd", [3.0, 4.0, 8.0])])
    assert pool.figures[TEACHER.metric] == pytest.approx([3, 4, 8])
    assert pool.mean(TEACHER.metric) == pytest.approx(5)
    assert pool.ratio == pytest.approx(mean([3, 4, 8]) / 2)


@pytest.mark.parametrize(
    "other",
    [
        {"training": MILD | {"recipe": "0123abcd"}},
        {"training": MILD | {"total_images": 300_000}},
        {"training": {"images": 276_544}},
        {"nfe": 3},
        {"parent": None},
    ],
)
def test_students_of_other_settings_budgets_calls_or_teachers_are_not_pooled(other):
    place = {"run": "runs/other", "sha256": sha256("other"), "parent": TEACHER.sha256}
    changed = record("cd", **{"nfe": 2, "score": 7.0, "training": MILD} | place | other)
    pooled = pools([TEACHER, *students("cd", [3.0, 4.0]), changed])
    assert [len(pool.figures[TEACHER.metric]) for pool in pooled] == [1, 2, 1]


def test_a_checkpoint_by_two_plans_is_not_two_trainings():
    twice = [*students("cd", [3.0, 4.0]), *students("cd", [5.0, 6.0], angles=[0.0, 0.5, 1.5])]
    figures = [pool.figures[TEACHER.metric] for pool in pools([TEACHER, *twice])]
    assert figures[1:] == [pytest.approx([3, 4]), pytest.approx([5, 6])]


def test_methods_of_one_name_are_told_apart_by_their_folders():
    other = {"training": MILD | {"recipe": "0123abcd"}, "run": "runs/hot/model.safetensors"}
    mine = students("cd", [3.0], run="runs/mild/model.safetensors")
    pooled = pools([TEACHER, *mine, record("cd", 2, parent=TEACHER.sha256, **other)])
    assert [pool.method for pool in pooled[1:]] == ["cd [mild]", "cd [hot]"]


def test_rows_measured_otherwise_than_the_last_are_left_out_by_name(tmp_path, capsys):
    old = record(
        "old",
        2,
        parent=TEACHER.sha256,
        num_images=50,
        conditions={"date": "2024-01-02T03:04:05+00:00"},
    )
    jsonl.write(tmp_path / "results.jsonl", [old, TEACHER, *students("cd", [3.0])])
    pooled = summarise(Options(results=(tmp_path / "results.jsonl",)))
    assert [pool.method for pool in pooled] == ["teacher", "cd"]
    assert "left out: 1 row with num images 50" in capsys.readouterr().out


def ranked(first: dict[str, list[float]], other: dict[str, list[float]]):
    pooled = []
    for name in first:
        figures = {"fd": first[name], RANDOM: other[name]}
        estimates = {
            distance: of_trainings([Estimate(value, 0.1, []) for value in values])
            for distance, values in figures.items()
        }
        pooled.append(Pool(name, 2, True, True, 10, figures, None, estimates=estimates))
    return rankings(pooled)


def test_another_distance_of_the_same_order_swaps_nothing():
    (ranking,) = ranked({"a": [1, 2], "b": [5, 6]}, {"a": [10, 11], "b": [30, 40]})
    assert (ranking.tau, ranking.swapped) == (1, [])


def test_pairs_that_another_distance_orders_otherwise_beyond_their_intervals_are_named():
    (ranking,) = ranked({"a": [1, 1.1], "b": [5, 5.1]}, {"a": [30, 30.1], "b": [10, 10.1]})
    assert (ranking.tau, ranking.swapped) == (-1, [("a", "b")])
    (words,) = in_words([ranking])
    assert f"{RANDOM} orders" in words
    assert "b before a at 2" in words


def test_pairs_within_their_intervals_are_not_called_swapped():
    (ranking,) = ranked({"a": [1, 2], "b": [5, 6]}, {"a": [10, 30], "b": [9, 28]})
    assert (ranking.tau, ranking.swapped) == (-1, [])


def test_single_trainings_are_parted_by_the_intervals_of_their_images():
    (ranking,) = ranked({"a": [1], "b": [5]}, {"a": [30], "b": [10]})
    assert (ranking.tau, ranking.swapped) == (-1, [("a", "b")])
    (ranking,) = ranked({"a": [1], "b": [5]}, {"a": [10.1], "b": [10]})
    assert (ranking.tau, ranking.swapped) == (-1, [])


def test_the_command_leaves_a_table_figures_and_a_plot(tmp_path, capsys):
    rows = [TEACHER, *students("cd", [3.0, 5.0]), *students("cd", [2.0, 4.0], nfe=4)]
    jsonl.write(tmp_path / "results.jsonl", rows)
    summarise(Options(results=(tmp_path / "results.jsonl",), table="markdown"))
    text = (tmp_path / "methods.md").read_text()
    assert "| cd | 276,544 | 4, 2.00× | 3, 1.50× | - |" in text
    assert text in capsys.readouterr().out
    figures = json.loads((tmp_path / "methods.json").read_text())
    assert [pool["nfe"] for pool in figures["pools"]] == [1000, 2, 4]
    assert (tmp_path / "methods.png").stat().st_size > 1000


def test_what_stands_in_brackets_is_printed_as_it_is(tmp_path, capsys):
    other = {"training": MILD | {"recipe": "0123abcd"}, "run": "runs/hot/model.safetensors"}
    mine = students("cd", [3.0], run="runs/mild/model.safetensors")
    rows = [TEACHER, *mine, record("cd", 2, parent=TEACHER.sha256, **other)]
    rows = [replace(row, others={RANDOM: [row.score, row.score]}) for row in rows]
    jsonl.write(tmp_path / "results.jsonl", rows)
    summarise(Options(results=(tmp_path / "results.jsonl",)))
    printed = capsys.readouterr().out
    assert "cd [mild]" in printed
    assert "cd [hot]" in printed


def test_a_missing_file_of_results_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        summarise(Options(results=(tmp_path / "none.jsonl",)))
