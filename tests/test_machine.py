"""What the machine is asked once: precision, compiler, cores, and how threads wait."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion import files, machine
from diffusion.runs import settings_before
from teachers import ddpm

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shares(monkeypatch):
    """Call with a figure: bf16 then takes that share of fp32's time."""

    def set_share(share: float) -> None:
        machine._say_once.cache_clear()
        monkeypatch.setattr(machine, "bf16_share", lambda: share)

    return set_share


@pytest.mark.parametrize(("share", "best"), [(0.55, "bf16"), (0.9, "fp32"), (11.0, "fp32")])
def test_auto_takes_bf16_only_where_it_is_clearly_faster(shares, share, best):
    shares(share)
    assert machine.precision("auto") == best


def test_whoever_asks_for_a_slow_bf16_gets_it_and_one_line(shares, capsys):
    shares(11.9)
    assert machine.precision("bf16") == machine.precision("bf16") == "bf16"
    (line,) = capsys.readouterr().out.splitlines()
    assert "11.9 times as long as fp32" in line
    assert machine.precision("fp32") == "fp32"
    assert not capsys.readouterr().out


def test_the_processor_is_measured_once_and_remembered(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CACHE", tmp_path)
    measured = []
    monkeypatch.setattr(machine, "_measured_share", lambda: measured.append(0) or 0.7)
    assert [machine.bf16_share.__wrapped__() for _ in range(2)] == [0.7, 0.7]
    assert len(measured) == 1
    (kept,) = (tmp_path / "machine").iterdir()
    kept.write_text("{")  # damaged: measured again
    assert machine.bf16_share.__wrapped__() == 0.7
    assert len(measured) == 2
    assert json.loads(kept.read_text())["bf16_share"] == 0.7


def test_a_measurement_is_a_ratio_and_changes_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    assert 0.05 < machine._measured_share(repeats=1) < 100
    assert torch.rand(()) == expected


@pytest.fixture
def few(tiny, quick, tmp_path) -> ddpm.Options:
    fit = replace(quick, iterations=4, precision="auto")
    return replace(ddpm.Options.default(), net=tiny, fit=fit, out=tmp_path / "teacher")


def test_a_runs_settings_and_card_hold_what_auto_stands_for(few, shares):
    shares(2.0)
    model = ddpm.train_teacher(few)
    assert model.card.training["settings"]["precision"] == "fp32"
    assert model.denoiser.precision == "fp32"


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_begun_elsewhere_goes_on_with_its_precision_unless_told(
    few, shares, stop_at_save, finished
):
    shares(0.5)
    if finished:
        ddpm.train_teacher(few)
    else:
        stop_at_save(lambda: ddpm.train_teacher(few))
    assert settings_before(few.out)["precision"] == "bf16"
    shares(5.0)  # this machine would take fp32
    assert ddpm.train_teacher(few).denoiser.precision == "bf16"
    with pytest.raises(Exception, match="precision was bf16, now fp32"):
        ddpm.train_teacher(replace(few, fit=replace(few.fit, precision="fp32")))


def test_compile_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler was not found" in machine.compiler()


@pytest.mark.parametrize(
    "package", ["teachers", "distill", "students", "eval", "experiments", "benchmarks"]
)
def test_threads_spin_briefly_before_torch_is_loaded_in_every_package(package):
    code = f"""
import os, sys
class AtTorch:  # sees every import
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(sys.stdout.flush() or 0)
sys.meta_path.insert(0, AtTorch())
import {package}
import torch
"""

    def spin(**user: str) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", *user)}
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=clean | user,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip()

    assert spin() == "3000"
    assert spin(OMP_WAIT_POLICY="ACTIVE") == "None"  # the user's own word stands


def test_metadata_reads_a_card_without_its_tensors(teacher):
    card = json.loads(files.metadata(teacher / "model.safetensors")["card"])
    assert card["method"] == "teacher"
