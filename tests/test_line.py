"""A whole comparison by one command, at toy length."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import chain

import pytest
import tyro

from diffusion.console import UserError
from diffusion.files import read_json
from distill import consistency, midtraining, progressive
from eval import compare
from experiments import line
from experiments.lines import LINES, Line
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


def typed_options(command: str) -> dict[str, list[str]]:
    """Option -> the words that follow it."""
    _, *words = command.split()
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            values = options[word] = []
        else:
            values.append(word)
    return options


def images(command: str) -> int:
    """How many images a command takes gradients of."""
    options = {"--batch-size": ["256"]} | typed_options(command)
    rounds = options.get("--round-iterations") or options["--iterations"]
    shares = 1.0
    if command.startswith("distill.progressive") and "--round-iterations" not in options:
        shares = sum(progressive.ROUNDS["digits"].values())
    return round(sum(map(int, rounds)) * int(options["--batch-size"][0]) * shares)


@pytest.mark.parametrize("name", LINES)
def test_every_student_of_a_line_takes_a_fifth_of_its_teachers_images(name):
    chosen = LINES[name]
    fifth = images(chosen.teacher) / 5
    for student, commands in chosen.students.items():
        spent = sum(map(images, commands))
        assert 0.99 * fifth <= spent <= fifth, student


def values(options) -> Iterator[tuple[str, list[str]]]:
    """(option as it is typed, its value as words), of nested dataclasses too."""
    for field in fields(options):
        value, name = getattr(options, field.name), field.name.replace("_", "-")
        if is_dataclass(value):
            yield from values(value)
        elif isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}", []
        else:
            several = value if isinstance(value, tuple) else (value,)
            yield f"--{name}", [str(each) for each in several]


@pytest.mark.parametrize("name", LINES)
def test_an_option_in_a_command_of_a_line_has_the_value_that_is_typed(name, monkeypatch):
    modules = {"ddpm": ddpm, "progressive": progressive, "midtraining": midtraining}
    modules |= {"compare": compare}
    chosen = LINES[name]
    for command in [chosen.teacher, *chain(*chosen.students.values()), chosen.compare]:
        module, *words = command.split()
        monkeypatch.setattr("sys.argv", [module, *words])
        if module == "distill.consistency":
            mode, options = consistency.read_command()
            parsed = {"--mode": [mode.__name__.split(".")[-1]]} | dict(values(options))
        else:
            kind, config = modules[module.split(".")[-1]].Options, (tyro.conf.OmitArgPrefixes,)
            parsed = dict(values(tyro.cli(kind, config=config, args=words)))
        for option, typed in typed_options(command).items():
            numbers = [str(type_of(word)(word)) for word in typed]
            assert parsed[option] in (typed, numbers), (command, option)


def type_of(word: str) -> type:
    return float if word.replace("e-", "").replace(".", "").isdigit() else str


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
    minutes = read_json(compare / "commands.json")
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
    ("changes", "match"),
    [
        ({"line": "none"}, "no line"),
        ({"jobs": 0}, "--jobs"),
        ({"students": ("cd", "dc")}, "--students must be of cd, .* got dc"),
    ],
)
def test_a_line_that_is_not_there_is_refused(changes, match, tmp_path):
    with pytest.raises(UserError, match=match):
        line.run_line(line.Options(**{"line": "digits", "out": tmp_path} | changes))


def test_a_signal_to_a_line_goes_on_to_its_commands_and_the_line_waits_for_them(tmp_path):
    """The training saves and says so; nothing runs on."""
    command = [
        sys.executable,
        "-c",
        "from experiments import line; from diffusion.console import run",
    ]
    toy = "Line('teachers.ddpm --iterations 1000000 --width 8', {}, 'eval.compare')"
    command[-1] += (
        f"; from experiments.lines import Line; line.LINES['toy'] = {toy}; run(line.main)"
    )
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
