"""Many images: in shards, by any number of processes, stopped and gone on with, always the same."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.model import load
from diffusion.plan import Plan
from students import generate, shards
from students.provenance import provenance

ROOT = Path(__file__).parents[1]
FLAGS = ["--precision", "fp32", "--seed", "3", "--batch-size", "4"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def made(command, student, tmp_path):
    """(name, number, *flags) -> what was made there, and the outcome."""

    def make(name: str, num: int, *flags: str):
        outcome = command(
            generate.main, student, "--num", num, *FLAGS, "--out", tmp_path / name, *flags
        )
        return tmp_path / name, outcome

    return make


@pytest.fixture
def stopped(monkeypatch):
    """From now on the batch of that number raises."""

    def stop(after: int, error=KeyboardInterrupt) -> None:
        make, calls = generate.Generator.__call__, []

        def batches(self, numbers):
            for batch in make(self, numbers):
                calls.append(0)
                if len(calls) == after:
                    raise error
                yield batch

        monkeypatch.setattr(generate.Generator, "__call__", batches)

    return stop


@pytest.mark.parametrize("form", shards.FORMATS)
def test_a_stopped_call_keeps_its_whole_shards_and_the_same_call_ends_with_the_same_bits(
    made, stopped, monkeypatch, form
):
    flags = ["--format", form, "--shard", "6"]
    whole, _ = made("whole", 20, *flags)
    with monkeypatch.context():
        stopped(6)  # of two batches each: in the third shard
        part, outcome = made("part", 20, *flags)
    assert outcome.code == 130
    assert "the same command goes on" in outcome.out
    times = {path.name: path.stat().st_mtime_ns for path in (part / shards.PART).iterdir()}
    assert len(times) == 3  # two shards and what they are of
    monkeypatch.undo()
    part, outcome = made("part", 20, *flags)
    assert (outcome.code, "2 of 4 shards are whole already" in outcome.out) == (0, True)
    assert "generate  8/8" in outcome.out
    assert contents(part) == contents(whole)


@pytest.mark.parametrize("form", shards.FORMATS)
def test_a_call_stopped_while_its_shards_take_their_places_loses_none(made, monkeypatch, form):
    flags = ["--format", form, "--shard", "4"]
    whole, _ = made("whole", 10, *flags)
    part, _ = made("part", 11, *flags, "--seed", "9")  # of an earlier call, and one more
    replace, moves = os.replace, len(contents(whole)) - 1  # one is the mark
    for stop in range(moves + 1):
        moved = []

        def stopping(source, to, stop=stop, moved=moved):
            moves_one = Path(to).parent == part and Path(source).name == Path(to).name
            if len(moved) == stop and (moves_one or stop == moves):
                raise KeyboardInterrupt  # at a move, or at the mark that is written after all
            moved += [to] * moves_one
            replace(source, to)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping)
            assert made("part", 10, *flags)[1].code == 130
        assert made("part", 10, *flags)[1].code == 0
        assert contents(part) == contents(whole)
        made("part", 11, *flags, "--seed", "9")


def test_a_call_for_other_images_takes_none_of_a_stopped_ones(made, stopped, monkeypatch):
    flags = ["--format", "npz", "--shard", "4"]
    with monkeypatch.context():
        stopped(3)
        made("part", 12, *flags)
    monkeypatch.undo()
    part, outcome = made("part", 12, *flags, "--seed", "9")
    assert (outcome.code, "already" in outcome.out) == (0, False)
    other, _ = made("other", 12, *flags, "--seed", "9")
    assert contents(part) == contents(other)


def test_every_form_holds_the_same_images_in_the_same_order(made):
    pictures, _ = made("pictures", 10)
    tars, _ = made("tars", 10, "--format", "webdataset", "--shard", "4")
    arrays, _ = made("arrays", 10, "--format", "npz", "--shard", "4")
    single, _ = made("single.npz", 10)
    names = [f"{i:06d}.png" for i in range(10)]
    expected = np.stack([np.asarray(Image.open(pictures / name)) for name in names])
    parts = [np.load(arrays / f"images-{i:06d}.npz") for i in range(3)]
    assert (np.concatenate([part["images"] for part in parts])[..., 0] == expected).all()
    assert [*np.concatenate([part["number"] for part in parts])] == [*range(10)]
    assert (np.load(single)["images"][..., 0] == expected).all()
    found = {}
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                found[member.name] = archive.extractfile(member).read()
    assert {name: found[name] for name in names} == {
        name: (pictures / name).read_bytes() for name in names
    }
    assert json.loads(found["000007.json"])["Number"] == "7"


SCRIPT = """
import runpy, sys
for out, *flags in (["folder", "--format", "npz", "--shard", "3"], ["grid.png"], ["one.npz"]):
    sys.argv[1:] = [STUDENT, "--num", "10", "--precision", "fp32", "--batch-size", "3"]
    sys.argv += [*flags, "--out", HOME + "/" + out]
    runpy.run_module("students.generate", run_name="__main__", alter_sys=True)
"""


def test_two_processes_make_what_one_makes(student, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for home, launcher in (("one", [sys.executable]), ("two", launch)):
        script = tmp_path / f"{home}.py"
        script.write_text(f"STUDENT, HOME = {str(student)!r}, {str(tmp_path / home)!r}\n{SCRIPT}")
        done = subprocess.run(
            [*launcher, script], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("10 images by ddim") == 3  # of two processes one speaks
    assert len(contents(tmp_path / "one" / "folder")) == 5
    for where in (".", "folder"):
        assert contents(tmp_path / "one" / where) == contents(tmp_path / "two" / where)


def test_a_file_says_how_it_was_made_and_that_is_enough_to_make_it_again(made, student):
    folder, _ = made("pictures", 6, "--seed", "8", "--sampler", "ddim")
    texts = Image.open(folder / "000004.png").text
    model = load(student)
    assert texts == {
        "Software": texts["Software"],
        "Model": "progressive",
        "Model sha256": model.sha256,
        "Seed": "8",
        "Sampler": "ddim",
        "Steps": "4",
        "Number": "4",
    }
    assert texts["Software"].startswith("made by fewstep")
    again, _ = made(
        "again", int(texts["Number"]) + 1, "--seed", texts["Seed"], "--steps", texts["Steps"]
    )
    assert (again / "000004.png").read_bytes() == (folder / "000004.png").read_bytes()
    grid, _ = made("grid.png", 6, "--seed", "8")
    assert Image.open(grid).text["Seed"] == "8"


def test_without_metadata_files_hold_pixels_alone(made):
    for name, flags in {"p": [], "w": ["--format", "webdataset"], "g.png": [], "n.npz": []}.items():
        out, _ = made(name, 3, "--no-metadata", *flags)
        said = [path.read_bytes() for path in out.glob("[0-9i]*")] if out.is_dir() else []
        for content in said or [out.read_bytes()]:
            assert b"fewstep" not in content
            assert b"tEXt" not in content
            assert b"json" not in content
    assert [*np.load(out)] == ["images", "number"]


def test_facts_that_are_not_known_are_left_out():
    texts = provenance("ab", "teacher", Plan("ddim", (0.0, 1.0)), 1, label=None, prompt="x")
    assert [*texts] == ["Software", "Model", "Model sha256", "Seed", "Sampler", "Steps", "Prompt"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "a.npz", "--format", "npz"], "is a folder's"),
        (["--out", "folder", "--shard", "0"], "--shard must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(command, student, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = command(generate.main, student, "--num", "2", *flags)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert words in outcome.err
    assert [*tmp_path.iterdir()] == []


def test_a_job_s_identity_is_of_all_that_an_image_depends_on():
    jobs = [
        shards.Job(10, 4, "npz", {"seed": 1}),
        shards.Job(11, 4, "npz", {"seed": 1}),
        shards.Job(10, 5, "npz", {"seed": 1}),
        shards.Job(10, 4, "png", {"seed": 1}),
        shards.Job(10, 4, "npz", {"seed": 2}),
    ]
    assert len({job.identity for job in jobs}) == len(jobs)
    assert [len(part) for part in jobs[0].shards] == [4, 4, 2]
