"""What tests share: a cache of their own, one thread, and the smallest runs that are real."""

import os
import shutil
import sys
import tempfile

os.environ["FEWSTEP_CACHE"] = tempfile.mkdtemp(prefix="fewstep-tests-")  # read when imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits repeat on a CPU; test_line's line has the GPU

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch

from diffusion import codec, console, data, networks, training
from diffusion.checkpoint import Card
from diffusion.config import FitConfig
from diffusion.data import Dataset
from diffusion.denoiser import DenoiserConfig
from diffusion.machine import this_device
from diffusion.model import build
from diffusion.networks import UNetConfig
from diffusion.plan import plan
from diffusion.runs import train_model
from diffusion.schedules import cosine
from diffusion.training import one_network
from teachers.ddpm import Denoising

hypothesis.settings.register_profile("short", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile("short")


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["FEWSTEP_CACHE"], ignore_errors=True)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., Outcome]:
    """Call a command's main as its process would: (main, *arguments) -> exit code and output."""

    def call(main: Callable[[], None], *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            console.run(main)
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def stop_at_save(monkeypatch) -> Callable[..., None]:
    """Call a training and stop it at its first save of its state, or a later one."""

    def stop(call: Callable[[], object], number: int = 1) -> None:
        saves, save = [], training.save

        def save_and_stop(*arguments) -> None:
            save(*arguments)
            saves.append(1)
            if len(saves) == number:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(training, "save", save_and_stop)
            with pytest.raises(KeyboardInterrupt):
                call()

    return stop


@pytest.fixture(scope="session")
def tiny() -> UNetConfig:
    return UNetConfig(width=8, multipliers=(1,), blocks=1, attention=())


@pytest.fixture(scope="session")
def quick() -> FitConfig:
    return FitConfig(
        iterations=30, batch_size=32, learning_rate=5e-3, warmup=5, precision="fp32", log_every=5
    )


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return data.load("digits")


@pytest.fixture(scope="session")
def train_tiny(tiny, quick, digits) -> Callable[..., Path]:
    """(run, config, schedule, dataset) -> the run, of a teacher whose few angles sample fast."""

    def train(run: Path, config=quick, angles=None, dataset=digits) -> Path:
        angles = cosine(8) if angles is None else angles
        card = Card(
            method="teacher",
            plans=(plan("ancestral", angles),),
            abilities=("denoise",),
            net=networks.to_json(tiny),
            denoiser=DenoiserConfig().to_json(),
            condition={},
            codec=codec.to_json(dataset.codec),
            data=asdict(dataset.spec),
        )
        torch.manual_seed(config.seed)
        denoiser = build(tiny, DenoiserConfig(), {}, config.precision)
        method = one_network(denoiser, Denoising(angles.to(this_device())))
        train_model(run, method, dataset, config, card)
        return run

    return train


@pytest.fixture(scope="session")
def shared_runs(tmp_path_factory) -> Path:
    """The folder of the two runs below."""
    return tmp_path_factory.mktemp("runs") / "digits"


@pytest.fixture(scope="module", autouse=True)
def shared_runs_stay_as_they_are(shared_runs) -> Iterator[None]:
    """Fail the file of tests that adds a run, which only a later file would notice."""
    yield
    assert {each.name for each in shared_runs.glob("*")} <= {"teacher", "progressive"}


@pytest.fixture(scope="session")
def teacher(shared_runs, train_tiny) -> Path:
    """A finished teacher of 8 steps. Not to be written to."""
    return train_tiny(shared_runs / "teacher")


@pytest.fixture(scope="session")
def student(teacher, quick) -> Path:
    """Its student of 4 steps, in the same folder. Not to be written to."""
    from distill import progressive

    progressive.distill(progressive.Options(teacher=teacher, start_steps=8, end_steps=4, fit=quick))
    return teacher.parent / "progressive" / "0004"
