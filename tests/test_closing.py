"""The last lines say which student to take, with a command that works, and how to open the page."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import record

from eval.show import closing
from eval.show.lines import lines
from students import generate

TEACHER = record("teacher", 1000, 4.0, 8.0)
FOUR = record("progressive", 4, 4.4, 0.04, parent=TEACHER.sha256, run="runs/p/model.safetensors")


def solver(nfe: int, score: float):
    return record("teacher", nfe, score, own_plan=False, sampler="unipc", sha256=TEACHER.sha256)


def test_the_student_to_take_comes_with_what_it_costs_and_its_command():
    text = closing.take(lines([TEACHER, solver(4, 9.0), FOUR]))
    assert text.startswith(
        "take progressive at 4 calls, 1.10 times its teacher's distance, 200 times as fast: "
    )
    assert text.endswith(" -m students.generate runs/p --steps 4 --num 64 --out grid.png")
    assert "but" not in text


@pytest.mark.parametrize(
    ("free", "taken"),
    [
        (solver(4, 4.4), True),  # as good at as many calls
        (solver(2, 3.0), True),  # better at fewer
        (solver(4, 4.5), False),
        (solver(5, 3.0), False),  # at more calls
    ],
)
def test_a_solver_that_is_as_good_at_no_more_calls_is_taken_in_a_students_place(free, taken):
    text = closing.take(lines([TEACHER, free, FOUR]))
    words = f"take teacher, unipc at {free.nfe} calls, which needs no training"
    assert text.startswith(words if taken else "take progressive at 4 calls")


def test_the_command_of_a_solvers_row_asks_for_its_network_calls():
    heun = record("teacher", 7, 4.0, own_plan=False, sampler="heun", steps=4, run="runs/t")
    (line,) = lines([heun])
    assert "runs/t --sampler heun --steps 7 --num 64" in closing.generate(line)


def test_a_student_far_from_its_teacher_is_taken_with_a_warning():
    far = replace(FOUR, quality=[20.0, 20.0])
    assert "no row is within 2 times: train longer" in closing.take(lines([TEACHER, far]))
    assert "train longer" not in closing.take(lines([TEACHER, FOUR]))


def test_without_a_student_the_line_says_how_to_make_one():
    assert "distill.progressive" in closing.take(lines([TEACHER, solver(4, 3.0)]))


def test_a_student_without_a_teacher_to_compare_with_is_still_taken():
    text = closing.take(lines([FOUR]))
    assert text.startswith("take progressive at 4 calls: ")


def test_the_command_samples_the_student_by_its_own_plan(student, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = record("progressive", 4, run=str(student / "model.safetensors"), parent=TEACHER.sha256)
    (line,) = lines([own])
    _, flag, module, *arguments = shlex.split(closing.generate(line))
    assert (flag, module) == ("-m", "students.generate")
    assert command(generate.main, *arguments).code == 0
    assert (tmp_path / "grid.png").stat().st_size > 500


def test_the_weight_of_a_guided_row_is_in_the_command():
    (line,) = lines([replace(FOUR, guidance=1.5)])
    assert "--steps 4 --guidance 1.5 --num 64" in closing.generate(line)


def test_angles_that_were_searched_are_in_the_command():
    searched = record(
        "consistency",
        2,
        note="searched",
        angles=[0.0, 1.1, 1.56],
        parent=TEACHER.sha256,
        run="runs/c",
    )
    (line,) = lines([searched])
    assert "runs/c --angles 1.56 1.1 --num 64" in closing.generate(line)


@pytest.mark.parametrize(
    ("platform", "known", "start"),
    [
        ("linux", True, "xdg-open "),
        ("darwin", True, "open "),
        ("win32", False, 'start "" '),
        ("linux", False, "python -m webbrowser file:///"),
    ],
)
def test_the_page_is_opened_by_the_systems_own_command(monkeypatch, platform, known, start):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(closing, "python", lambda: "python")
    monkeypatch.setattr(closing.shutil, "which", lambda name: f"/bin/{name}" if known else None)
    text = closing.opener(Path("a folder/report.html"))
    assert text.startswith(start)
    assert "a folder" in text or "a%20folder" in text


def test_python_is_named_as_the_shell_here_would_find_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(closing.shutil, "which", lambda name: "/usr/bin/python")
    assert closing.python() == ".venv/bin/python"
    monkeypatch.setattr(closing.shutil, "which", lambda name: sys.executable)
    assert closing.python() == "python"
    monkeypatch.setattr(sys, "executable", "/opt/python")
    assert closing.python() == "python"
