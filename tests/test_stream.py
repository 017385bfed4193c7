"""What is seen of images by the batch does not depend on the batches, the processes or a kill."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from diffusion import model as models
from diffusion.console import UserError
from diffusion.noise import Noise
from eval import compare
from eval.compare import Options
from eval.measure import features, stream
from eval.measure.judge import Judge
from eval.measure.quality import Measured
from eval.measure.real import Real
from eval.measure.seen import Seen
from eval.results import jsonl
from eval.results.records import Record
from tests.test_processes import ENVIRONMENT, LAUNCH_TWO

CPU = torch.device("cpu")
NUMBER = 300


@pytest.fixture(scope="module")
def judge(digits) -> Judge:
    real = Real.sample(digits)
    own = features.extractor("random", real, CPU)
    return Judge.of(real, own, own, CPU)


@pytest.fixture(scope="module")
def model(student) -> models.Model:
    return models.load(student)


def looked(judge, model, part: Path, batch_size: int, plan=None) -> Seen:
    plan = plan or model.plan()
    *_, (count, seen) = stream.look(judge, model, plan, 3, NUMBER, batch_size, part)
    assert count == NUMBER
    return seen


@pytest.fixture(scope="module")
def whole(judge, model, tmp_path_factory) -> Seen:
    return looked(judge, model, tmp_path_factory.mktemp("whole") / "part", 64)


def require_same(a: Seen, b: Seen) -> None:
    assert a.odd.tolist() == b.odd.tolist()
    mine, other = a.moments["own"], b.moments["own"]
    assert mine.count == other.count == NUMBER
    scale = float(other.covariance.diagonal().max().sqrt())
    close = {"rtol": 0, "atol": 1e-4 * scale}
    torch.testing.assert_close(mine.mean, other.mean, **close)
    close["atol"] *= scale
    torch.testing.assert_close(mine.covariance, other.covariance, **close)
    torch.testing.assert_close(a.rows("cross"), b.rows("cross"), rtol=0, atol=1e-2)
    torch.testing.assert_close(a.rows("features"), b.rows("features"), rtol=0, atol=1e-2)
    assert a.rows("pixels").int().sub(b.rows("pixels").int()).abs().max() <= 1


@pytest.mark.parametrize("batch_size", [7, 512])
def test_what_is_seen_does_not_depend_on_the_batch_size(judge, model, whole, tmp_path, batch_size):
    seen = looked(judge, model, tmp_path / "part", batch_size)
    require_same(seen, whole)
    assert Measured(judge, seen).distance == pytest.approx(
        Measured(judge, whole).distance, rel=1e-4
    )
    others, expected = Measured(judge, seen).others, Measured(judge, whole).others
    assert others == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("batch_size", [7, 64, 512])
def test_noise_is_bit_for_bit_and_images_within_a_grey_level_whatever_the_batch(model, batch_size):
    numbers = torch.arange(NUMBER)
    noise = next(Noise(3, numbers, model.spec.shape))
    images = model.sample(model.plan(), 3, numbers)
    parts = numbers.split(batch_size)
    assert torch.cat([next(Noise(3, part, model.spec.shape)) for part in parts]).equal(noise)
    again = torch.cat([model.sample(model.plan(), 3, part) for part in parts])
    assert again.int().sub(images.int()).abs().max() <= 1
    assert images.float().std() > 10


def test_what_was_seen_before_a_kill_is_not_sampled_again(
    judge, model, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(stream, "SAVE_EVERY", 0.0)
    sampled = []
    x0 = models.Model.x0

    def counting(self, plan, seed, indices, label=None):
        if len(sampled) == 3:
            raise KeyboardInterrupt
        sampled.append(indices)
        return x0(self, plan, seed, indices, label)

    monkeypatch.setattr(models.Model, "x0", counting)
    with pytest.raises(KeyboardInterrupt):
        looked(judge, model, tmp_path / "part", 64)
    sampled.append(None)  # never again three
    seen = looked(judge, model, tmp_path / "part", 64)
    numbers = torch.cat([indices for indices in sampled if indices is not None])
    assert numbers.sort().values.equal(torch.arange(NUMBER))
    require_same(seen, whole)
    stream.forget(tmp_path / "part")
    assert list(tmp_path.iterdir()) == []


def test_of_kept_files_that_share_a_batch_only_the_larger_counts(
    judge, model, tmp_path, monkeypatch
):
    # after a start by two processes and a kill, the first process's file holds the second's too
    monkeypatch.setattr(stream, "SAVE_EVERY", 0.0)
    looked(judge, model, tmp_path / "part", 64)
    shutil.copy(tmp_path / "part-0.safetensors", tmp_path / "part-1.safetensors")
    (kept,) = stream._kept(tmp_path / "part", CPU)
    assert kept.moments["own"].count == NUMBER


class Broken:
    """Stands in for a denoiser: x0 is whatever is asked for."""

    def __init__(self, x0):
        self.x0 = x0

    def __call__(self, x_t, t, label=None):
        return self.x0(x_t)


@pytest.mark.parametrize(
    ("x0", "words"),
    [
        (lambda x: torch.where(x > 3.2, torch.nan, x), "NaN"),
        (lambda x: x / 0, "infinity"),
        (lambda x: torch.zeros_like(x), "the same"),
        (lambda x: x[:, :, :1, :1].expand_as(x), "one flat colour"),
        (lambda x: 20 * x, "diverged"),
    ],
)  # fmt: skip
def test_images_that_are_none_are_refused_with_the_reason(
    judge, model, tmp_path, monkeypatch, x0, words
):
    monkeypatch.setattr(models, "sample", lambda denoise, noise, *_: x0(next(noise)))
    with pytest.raises(UserError, match=words):
        looked(judge, model, tmp_path / "part", 64)


def test_a_batch_that_does_not_fit_says_what_to_lower(judge, model, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "sample", full)
    with pytest.raises(UserError, match="--batch-size"):
        looked(judge, model, tmp_path / "part", 64)


SCRIPT = """
import os, sys, time
open("pid" + os.environ["RANK"], "w").write(str(os.getpid()))
from eval import compare
from eval.measure import judge, stream
stream.SAVE_EVERY, pause, see = 0.0, float(sys.argv.pop(1)), judge.Judge.see
judge.Judge.see = lambda *arguments: time.sleep(pause) or see(*arguments)
compare.main()
"""
ARGUMENTS = "--no-times --precision fp32 --features random --seeds 0 1 --steps 4 --num-images 300"


def compare_alone(out: Path, student: Path) -> list[Record]:
    settings = {"times": False, "precision": "fp32", "features": "random", "steps": "4"}
    settings |= {"seeds": (0, 1)}
    return compare.compare(Options((student,), num_images=300, batch_size=7, out=out, **settings))


@pytest.fixture(scope="module")
def alone(student, tmp_path_factory) -> list[Record]:
    return compare_alone(tmp_path_factory.mktemp("alone"), student)


def require_same_figures(folder: Path, alone: list[Record]) -> None:
    (one,), (record,) = alone, jsonl.read(folder / "results.jsonl")
    assert record.quality == pytest.approx(one.quality, rel=1e-4)
    assert record.further == pytest.approx(one.further, rel=1e-3, abs=1e-5)
    assert not (folder / "partial.jsonl").exists()
    assert list((folder / "partial").glob("*")) == []


def test_two_processes_share_the_images_and_a_killed_pair_is_resumed_by_one(
    student, alone, tmp_path
):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    tail = [*ARGUMENTS.split(), "--batch-size", "7", "--out", str(out), str(student)]
    options = {"env": ENVIRONMENT, "cwd": tmp_path}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = subprocess.Popen([*LAUNCH_TWO, str(script), "0.1", *tail], **options)
    try:
        while len({path.name[-13:] for path in (out / "partial").glob("*-[01].safetensors")}) < 2:
            assert both.poll() is None, both.communicate()[1]
            time.sleep(0.01)
    finally:
        for pid in (*map(int, (p.read_text() for p in tmp_path.glob("pid?"))), both.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        both.communicate()
    assert len(jsonl.read(out / "results.jsonl")) == 0
    compare_alone(out, student)
    require_same_figures(out, alone)
    shutil.rmtree(out)
    done = subprocess.run([*LAUNCH_TWO, str(script), "0", *tail], timeout=120, **{
        key: value for key, value in options.items() if key not in ("stdout", "stderr")
    }, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    require_same_figures(out, alone)
