"""A command writes into folders and files that the suite made, and into no others."""

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import data, files, folders
from diffusion.console import UserError
from diffusion.folders import MARK, check_claim, check_home, claim, is_ours
from diffusion.model import Model
from distill import consistency, guidance, midtraining, progressive
from eval import compare, human
from experiments import line
from students import generate, soup
from teachers import ddpm
from tests.made_up import record

SMALL = "--width 8 --multipliers 1 --blocks 1 --attention --iterations 2 --batch-size 8"
BRIEF = "--iterations 2 --batch-size 8 --warmup 1 --precision fp32"
# A command that writes into the folder --out, and its other arguments.
COMMANDS = {
    ddpm: f"{SMALL} --precision fp32",
    progressive: f"--teacher TEACHER --start-steps 4 --rounds 2 {BRIEF}",
    consistency: f"--teacher TEACHER --num-angles 4 {BRIEF}",
    midtraining: f"--teacher TEACHER {BRIEF}",
    guidance: f"--teacher TEACHER {BRIEF}",
    soup: "STUDENT TEACHER",
    generate: "STUDENT --num 2",
    compare: "STUDENT --num-images 80 --features random --precision fp32",
    line: "digits",
}
# Files that a user may have in a folder before it is named with --out.
THEIRS = {
    "a state": ["state/diary.txt"],
    "a state of the same name": ["state/state.safetensors", "state/settings.json"],
    "pictures and logs": ["samples.png", "log.jsonl"],
    "weights": ["model.safetensors"],
    "results": ["results.jsonl", "table.md"],
    "numbered pictures": ["000000.png", "000001.png"],
    "runs of theirs": ["teacher/notes.txt", "0002/notes.txt"],
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my own {name}")
    return folder


@pytest.fixture
def arguments(teacher, student):
    """(command) -> its arguments but for --out."""

    def of(module) -> list[str]:
        words = COMMANDS[module].replace("TEACHER", str(teacher)).replace("STUDENT", str(student))
        return words.split()

    return of


def refuse(*arguments, **options):
    raise AssertionError("data are loaded before the folder was looked at")


@pytest.mark.parametrize("out", ["theirs", "."])
@pytest.mark.parametrize("names", THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_a_folder_of_somebody_elses_is_refused_before_any_work_and_left_as_it_is(
    module, names, out, arguments, command, tmp_path, monkeypatch
):
    theirs = fill(tmp_path / "theirs", names)
    monkeypatch.chdir(theirs if out == "." else tmp_path)
    monkeypatch.setattr(data, "load", refuse)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # experiments.line would keep its own
    before = contents(tmp_path)
    outcome = command(module.main, *arguments(module), "--out", out)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert "no command of fewstep made" in outcome.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("form", [["--out", ""], ["--out="]])
@pytest.mark.parametrize("module", [*COMMANDS, human], ids=lambda module: module.__name__)
def test_an_empty_out_is_refused_as_such_even_in_an_empty_folder(
    module, form, arguments, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    usual = ["make", "a", "b"] if module is human else arguments(module)
    outcome = command(module.main, *usual, *form)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--out is empty" in outcome.err
    assert contents(tmp_path) == {}


def test_a_run_takes_an_empty_folder_and_marks_it(command, arguments, tmp_path):
    (tmp_path / "run").mkdir()
    assert command(ddpm.main, *arguments(ddpm), "--out", tmp_path / "run").code == 0
    assert {*contents(tmp_path / "run")} == {MARK, "log.jsonl", "model.safetensors", "samples.png"}
    assert is_ours(tmp_path / "run")


def test_the_end_of_a_run_deletes_of_its_state_what_it_wrote_alone(tmp_path, train_tiny):
    run = tmp_path / "run"
    claim(run)
    fill(run, ["state/diary.txt"])
    (run / "state" / ".state.safetensors.123.part").write_text("of a killed run")
    train_tiny(run)
    assert [path.name for path in (run / "state").iterdir()] == ["diary.txt"]
    assert (run / "state" / "diary.txt").read_text() == "my own state/diary.txt"


@pytest.mark.parametrize(
    ("module", "kind"), [(ddpm, "comparison"), (compare, "run"), (generate, "run")]
)
def test_a_folder_of_ours_that_was_made_for_something_else_is_refused(
    module, kind, arguments, command, tmp_path
):
    claim(tmp_path / "out", kind)
    before = contents(tmp_path)
    outcome = command(module.main, *arguments(module), "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert folders.KINDS[kind] in outcome.err
    assert contents(tmp_path) == before


def test_a_folder_that_another_command_makes_meanwhile_is_not_taken_for_somebody_elses(
    tmp_path, monkeypatch
):
    entries = folders._entries

    def listed_late(folder: Path):
        if not (folder / MARK).exists():
            folders.write_mark(folder, "run")
            (folder / "log.jsonl").touch()
        return entries(folder)

    monkeypatch.setattr(folders, "_entries", listed_late)
    check_claim(tmp_path)


def test_chains_and_lines_are_made_beside_runs_though_not_among_other_files(tmp_path):
    home = tmp_path / "runs" / "digits"
    check_home(home)
    claim(home / "teacher")
    claim(home / "progressive" / "0004")
    (home / "notes.txt").write_text("what I tried")
    check_home(home)
    check_home(home / "progressive")
    check_home(tmp_path / "runs" / "digits" / "teacher")
    fill(tmp_path / "photos", ["a.jpg"])
    for other in (tmp_path, tmp_path / "photos"):
        with pytest.raises(UserError, match="no command of fewstep made"):
            check_home(other)


# Folders of versions without marks


def save_model(path: Path) -> None:
    """With a card of format 1, as there was before marks."""
    images = {"name": "digits", "channels": 1, "size": 8, "num_classes": 10}
    card = {"method": "teacher", "sampler": "ddim", "plans": {"1": [0.0, 1.5]}, "solvers": ["ddim"]}
    card |= {"net": {}, "data": images | {"mean": 77.0, "std": 90.0}, "format": 1}
    files.save_tensors(path, {"w": torch.ones(2)}, {"card": json.dumps(card)})


def save_state(path: Path) -> None:
    text = json.dumps({"iteration": 3, "iterations": 9})
    files.save_tensors(path, {"w": torch.ones(2)}, {"line": text})


def save_results(path: Path) -> None:
    files.write_atomic(path, json.dumps(asdict(record())) + "\n")


def header(text: str) -> bytes:
    """A safetensors file's first bytes."""
    return len(text).to_bytes(8, "little") + text.encode()


OLD = {
    "model.safetensors": ("run", save_model),
    "state/state.safetensors": ("run", save_state),
    "results.jsonl": ("comparison", save_results),
    "partial.jsonl": ("comparison", save_results),
}


@pytest.mark.parametrize("name", OLD)
def test_an_older_folder_is_ours_by_what_its_files_say(name, tmp_path):
    kind, save = OLD[name]
    save(tmp_path / name)
    assert is_ours(tmp_path)
    check_claim(tmp_path, kind)
    with pytest.raises(UserError, match=folders.KINDS[kind]):
        check_claim(tmp_path, "pictures")


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 some other format",
        b"{}\n",
        b'{"step": 1, "loss": 0.3}\n{"step": 2}\n',
        b"\xff" * 5000,
        header("{}"),
        header("null"),
        header('{"__metadata__": {"card": "ace of spades"}}'),
        header('{"__metadata__": {"card": "{}", "line": "{}"}}'),
    ],
)
def test_a_file_of_somebody_elses_by_the_same_name_makes_no_folder_ours(name, content, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    assert not is_ours(tmp_path)
    with pytest.raises(UserError):
        check_claim(tmp_path)


def test_weights_of_somebody_elses_are_known_by_their_header_alone(tmp_path):
    """A header is read, whatever follows; a FIFO is not waited for."""
    files.save_tensors(tmp_path / "small.safetensors", {"w": torch.ones(2)}, {"format": "pt"})
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((tmp_path / "small.safetensors").read_bytes())
        file.truncate(1 << 40)  # a terabyte, sparse
    assert not is_ours(tmp_path)
    (tmp_path / "results.jsonl").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "results.jsonl")
    assert not is_ours(tmp_path)


def test_a_folder_without_anything_of_ours_is_known_in_tens_of_microseconds(tmp_path):
    for i in range(1000):
        (tmp_path / f"{i}.jpg").touch()
    claim(tmp_path / "ours")
    for folder, ours in ((tmp_path, False), (tmp_path / "ours", True)):
        begun = time.process_time()
        assert all(is_ours(folder) == ours for _ in range(1000))
        assert time.process_time() - begun < 1  # of 1000: 0.02 s alone


def test_an_older_run_goes_on_and_is_marked(tmp_path, train_tiny):
    run = train_tiny(tmp_path / "run")
    (run / MARK).unlink()
    train_tiny(run)  # finished before: it is not trained again
    claim(run)
    assert json.loads((run / MARK).read_text())["kind"] == "run"


# Pictures


@pytest.fixture
def pictures(command, student):
    """(folder, number of images, *more) -> the outcome."""

    def make(out: Path, num: int, *more: str):
        return command(generate.main, student, "--num", num, "--out", out, *more)

    return make


def test_pictures_of_an_earlier_call_are_replaced_with_a_word(pictures, tmp_path):
    first = pictures(tmp_path / "four", 4)
    assert (first.code, "replaced" in first.out) == (0, False)
    assert {*contents(tmp_path / "four")} == {MARK, *(f"{i:06d}.png" for i in range(4))}
    assert pictures(tmp_path / "two", 2, "--seed", "1").code == 0
    again = pictures(tmp_path / "four", 2, "--seed", "1")
    assert (again.code, again.err) == (0, "")
    assert "the 4 files of an earlier call are replaced" in again.out
    assert contents(tmp_path / "four") == contents(tmp_path / "two")


@pytest.mark.parametrize("name", ["000004.png", "notes.txt", "model.safetensors", "album/a.jpg"])
def test_pictures_are_not_made_among_what_generate_did_not_make(pictures, tmp_path, name):
    pictures(tmp_path, 4)
    fill(tmp_path, [name])
    before = contents(tmp_path)
    outcome = pictures(tmp_path, 2)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert name.split("/")[0] in outcome.err
    assert contents(tmp_path) == before


def failing(monkeypatch, after: int) -> None:
    """Images that are not finite from the batch of that number on."""
    x0, calls = Model.x0, []

    def made(self, *others):
        calls.append(0)
        return x0(self, *others) * (torch.nan if len(calls) > after else 1)

    monkeypatch.setattr(Model, "x0", made)


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "earlier pictures"])
def test_pictures_that_fail_half_way_leave_everything_as_it_was(
    pictures, tmp_path, monkeypatch, before
):
    out = tmp_path / "out"
    if before == "an empty folder":
        out.mkdir()
    elif before == "earlier pictures":
        pictures(out, 4)
    kept = contents(tmp_path)
    failing(monkeypatch, after=1)
    outcome = pictures(out, 6, "--batch-size", "2")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "not finite" in outcome.err
    assert contents(tmp_path) == kept
    assert [*tmp_path.rglob(".part")] == []
    assert out.exists() == (before != "nothing")


@pytest.mark.parametrize("name", ["grid.png", "images.npz"])
def test_images_that_are_not_finite_are_no_picture(pictures, tmp_path, monkeypatch, name):
    failing(monkeypatch, after=0)
    outcome = pictures(tmp_path / name, 4)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert contents(tmp_path) == {}


def test_pictures_of_a_killed_call_are_cleared_away(pictures, tmp_path):
    pictures(tmp_path / "out", 2)
    fill(tmp_path / "out", [".part/000000.png", ".part/000007.png"])
    assert pictures(tmp_path / "out", 1).code == 0
    assert {*contents(tmp_path / "out")} == {MARK, "000000.png"}


# Single files


@pytest.mark.parametrize("name", ["grid.png", "images.npz"])
def test_a_file_of_ours_is_replaced_and_another_is_not(pictures, tmp_path, name):
    assert pictures(tmp_path / name, 2).code == 0
    first = (tmp_path / name).read_bytes()
    assert pictures(tmp_path / name, 3).code == 0
    assert (tmp_path / name).read_bytes() != first
    Image.new("L", (8, 8)).save(tmp_path / "grid.png")
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
    theirs = (tmp_path / name).read_bytes()
    outcome = pictures(tmp_path / name, 2)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert name in outcome.err
    assert (tmp_path / name).read_bytes() == theirs


def test_an_npz_of_ours_is_read_like_any_other(pictures, tmp_path):
    pictures(tmp_path / "images.npz", 3)
    assert np.load(tmp_path / "images.npz")["images"].shape == (3, 8, 8, 1)


def test_a_page_for_judges_replaces_no_file_but_its_like(command, pictures, tmp_path):
    pictures(tmp_path / "images.npz", 4)
    page = tmp_path / "page.html"
    two = [tmp_path / "images.npz"] * 2
    arguments = ["make", *two, "--pairs", 2, "--out", page]
    assert [command(human.main, *arguments).code for _ in range(2)] == [0, 0]
    page.write_text("<title>My own page</title>")
    outcome = command(human.main, *arguments)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert page.read_text() == "<title>My own page</title>"
    outcome = command(human.main, *arguments[:-1], tmp_path)
    assert (outcome.code, "is a folder" in outcome.err) == (2, True)
