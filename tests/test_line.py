"""A whole comparison by one command, at toy length."""

import json
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest
import tyro

from benchmarks import line
from benchmarks.lines import LINES, Line
from diffusion.console import UserError
from distill import consistency, midtraining, progressive
from eval import compare
from teachers import ddpm

QUICK = "--iterations 2 --batch-size 8 --warmup 1"


def test_a_student_of_several_commands_starts_each_from_the_one_before(tmp_path):
    toy = Line("teachers.ddpm", {"both": ("distill.a --x 1", "distill.b")}, "eval.compare", seeds=2)
    chains = line.students(toy, tmp_path, tmp_path / "teacher")
    assert len(chains) == 2
    for seed, (first, second) in enumerate(chains):
        assert first[2:5] == ["distill.a", "--x", "1"]
        assert "--start" not in first
        assert second[second.index("--start") + 1] == first[first.index("--out") + 1]
        assert second[second.index("--out") + 1] == str(tmp_path / f"both-{seed}")
        assert second[second.index("--seed") + 1] == str(seed)


def images(command: str) -> int:
    """That a command takes gradients of."""
    module, *words = command.split()
    told = {"--batch-size": ["256"]}
    for word in words:
        if word.startswith("--"):
            flag = told[word] = []
        else:
            flag.append(word)
    rounds = told.get("--round-iterations") or told["--iterations"]
    shares = 1.0
    if module == "distill.progressive" and "--round-iterations" not in told:
        shares = sum(progressive.ROUNDS["digits"].values())
    return round(sum(map(int, rounds)) * int(told["--batch-size"][0]) * shares)


@pytest.mark.parametrize("name", LINES)
def test_every_student_of_a_line_takes_a_fifth_of_its_teachers_images(name):
    found = LINES[name]
    fifth = images(found.teacher) / 5
    for student, commands in found.students.items():
        spent = sum(map(images, commands))
        assert 0.99 * fifth <= spent <= fifth, student


@pytest.mark.parametrize("name", LINES)
def test_the_commands_of_a_line_are_understood(name, tmp_path, monkeypatch):
    modules = {"ddpm": ddpm, "progressive": progressive, "midtraining": midtraining}
    modules |= {"compare": compare}
    found = LINES[name]
    for command in [found.teacher, *chain(*found.students.values()), found.compare]:
        module, *flags = command.split()
        monkeypatch.setattr("sys.argv", [module, *flags])
        if module == "distill.consistency":
            consistency.read_command()
        else:
            options = modules[module.split(".")[-1]].Options
            tyro.cli(options, config=(tyro.conf.OmitArgPrefixes,), args=flags)


def test_a_line_goes_from_data_to_report_and_resumes(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # on a GPU where there is one
    toy = Line(
        teacher=f"teachers.ddpm {QUICK} --width 8 --multipliers 1",
        students={
            "cd": (f"distill.consistency {QUICK} --frechet 1",),
            "scm": (f"distill.midtraining {QUICK}", f"distill.consistency --mode scm {QUICK}"),
            "progressive": (f"distill.progressive --start-steps 4 --rounds 2 {QUICK}",),
        },
        compare="eval.compare --no-times --num-images 100 --steps 1,2 --features random",
    )
    monkeypatch.setitem(line.LINES, "toy", toy)
    options = line.Options("toy", out=tmp_path)
    line.run_line(options)
    compare, student = tmp_path / "compare", tmp_path / "cd-0" / "model.safetensors"
    before = student.stat().st_mtime_ns, len((compare / "results.jsonl").read_bytes())
    line.run_line(options)
    assert before == (student.stat().st_mtime_ns, len((compare / "results.jsonl").read_bytes()))
    for name in ("results.jsonl", "methods.md", "report.html"):
        assert (compare / name).exists()
    minutes = json.loads((compare / "commands.json").read_text())
    assert [command.split()[2].split(".")[-1] for command in minutes] == [
        "ddpm", "consistency", "midtraining", "consistency", "progressive",
        "compare", "methods", "report",
    ]  # fmt: skip


def test_of_a_line_only_the_students_that_are_named_are_trained(tmp_path, monkeypatch):
    typed = []
    monkeypatch.setattr(line, "call", lambda command, *others: typed.append(command))
    line.run_line(line.Options("digits", out=tmp_path, students=("progressive",), seeds=1))
    assert [command[2].split(".")[-1] for command in typed] == [
        "ddpm", "progressive", "compare", "methods", "report"
    ]  # fmt: skip


def test_a_command_that_fails_stops_the_line_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(line.LINES, "toy", Line("teachers.ddpm --iterations 0", {}, "eval.compare"))
    with pytest.raises(UserError, match=r"exit code 2 of: python -m teachers\.ddpm"):
        line.run_line(line.Options("toy", out=tmp_path))


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"line": "none"}, "no line"),
        ({"jobs": 0}, "--jobs"),
        ({"students": ("cd", "dc")}, "--students must be of cd, .* got dc"),
    ],
)
def test_a_line_that_is_not_there_is_refused(told, match, tmp_path):
    with pytest.raises(UserError, match=match):
        line.run_line(line.Options(**{"line": "digits", "out": tmp_path} | told))


def test_a_signal_to_a_line_goes_on_to_its_commands_and_the_line_waits_for_them(tmp_path):
    """The training saves and says so; nothing runs on."""
    command = [
        sys.executable,
        "-c",
        "from benchmarks import line; from diffusion.console import run",
    ]
    toy = "Line('teachers.ddpm --iterations 1000000 --width 8', {}, 'eval.compare')"
    command[-1] += f"; from benchmarks.lines import Line; line.LINES['toy'] = {toy}; run(line.main)"
    out = tmp_path / "toy"
    process = subprocess.Popen(
        [*command, "toy", "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (out / "teacher" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command resumes" in said
    assert (out / "teacher" / "state").exists() or list((out / "teacher").glob("state*"))
