"""The training loop: it learns, and a run that is stopped anywhere ends as if it never was."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from diffusion import checkpoint, runs
from diffusion import training as loops
from diffusion.batches import Batch, Batches, batch_seed
from diffusion.console import Interrupted, UserError
from diffusion.data import Dataset
from diffusion.denoiser import Denoiser, DenoiserConfig
from diffusion.files import load_tensors
from diffusion.machine import this_device
from diffusion.model import build
from diffusion.schedules import cosine
from diffusion.training import Average, Progress, fit, frozen_copy, one_network
from distill import progressive
from distill.discrete import DISTANCES, WEIGHTS, Consistency
from distill.pairs import neighbours
from distill.steps import data_step
from eval.measure.evaluate import recipe
from teachers import ddpm
from teachers.ddpm import Denoising
from tests.stopped import stopped_after

ROOT = Path(__file__).parents[1]


def schedule() -> Tensor:
    return cosine(8).to(this_device())


def denoising(denoiser) -> Denoising:
    return Denoising(schedule())


def consistency(denoiser) -> Consistency:
    """An objective with a target of its own: an average of the student."""
    target = frozen_copy(denoiser).to(this_device())
    return Consistency(
        step=data_step,
        pairs=neighbours(schedule()),
        distance=DISTANCES["l2"],
        weight=WEIGHTS["one"],
        target=target,
        followers={"target": Average(target, lambda done, progress: 0.9)},
    )


@pytest.fixture
def training(tmp_path, tiny, quick, digits):
    """(objective, **settings) -> a new network and the loop that trains it, on one state file."""

    def begin(
        make, name: str = "state", layout=torch.contiguous_format, **settings
    ) -> tuple[torch.nn.Module, Iterator[Progress]]:
        config = replace(quick, **{"save_every": 0.0, **settings})
        torch.manual_seed(0)
        denoiser = Denoiser(replace(tiny, dropout=0.1).build(1, {}), config.precision, layout)
        state = tmp_path / f"{name}.safetensors"
        return denoiser, fit(one_network(denoiser, make(denoiser)), digits, config, state)

    return begin


def identity(denoiser: torch.nn.Module) -> str:
    return checkpoint.weights_sha256(denoiser.state_dict())


def undisturbed(training, make, **settings) -> str:
    denoiser, loop = training(make, "undisturbed", **settings)
    list(loop)
    return identity(denoiser)


@pytest.mark.parametrize(("make", "networks"), [(denoising, 1), (consistency, 2)])
def test_passes_of_every_network_are_counted_over_a_stop_too(training, make, networks):
    _, loop = training(make)
    next(loop)
    loop.close()
    *_, last = training(make)[1]
    assert last.passes == 30 * 32 * networks


@pytest.mark.parametrize("make", [denoising, consistency])
def test_a_run_stopped_and_resumed_ends_with_the_same_weights_bit_for_bit(training, make):
    _, loop = training(make)
    assert [next(loop).iteration, next(loop).iteration] == [5, 10]
    loop.close()
    denoiser, loop = training(make)
    resumed = [line.iteration for line in loop]
    assert min(resumed) >= 10
    assert resumed[-4:] == [15, 20, 25, 30]
    assert identity(denoiser) == undisturbed(training, make)


def test_a_run_in_the_layout_of_gpus_resumes_bit_for_bit_too(training):
    layout = torch.channels_last
    _, loop = training(denoising, layout=layout)
    next(loop)
    loop.close()
    denoiser, loop = training(denoising, layout=layout)
    list(loop)
    assert not all(weight.is_contiguous() for weight in denoiser.parameters())
    assert identity(denoiser) == undisturbed(training, denoising, layout=layout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_the_very_next_iteration_first(training, tmp_path, number):
    _, loop = training(denoising, save_every=1e9)
    next(loop)
    os.kill(os.getpid(), number)
    with pytest.raises(Interrupted, match="iteration 6 of 30") as stop:
        next(loop)
    assert stop.value.signal == number
    assert iterations_in(tmp_path / "state.safetensors") == 6
    denoiser, loop = training(denoising)
    list(loop)
    assert identity(denoiser) == undisturbed(training, denoising)


def test_signals_are_the_callers_again_after_training(training):
    before = signal.getsignal(signal.SIGTERM)
    _, loop = training(denoising)
    next(loop)
    assert signal.getsignal(signal.SIGTERM) != before
    loop.close()
    assert signal.getsignal(signal.SIGTERM) == before


# What a shell that was set up for another project may have of accelerate's.
ACCELERATE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_DYNAMO_MODE": "reduce-overhead",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True",
}


def test_accelerates_variables_in_the_environment_change_no_bit(training, monkeypatch):
    expected = undisturbed(training, denoising)
    for name, value in ACCELERATE.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state()  # as in a new process, which reads them
    denoiser, loop = training(denoising)
    list(loop)
    assert identity(denoiser) == expected
    worker = loops.make_worker()
    assert worker.gradient_accumulation_steps == 1
    assert worker.mixed_precision == "no"
    assert worker.state.dynamo_plugin.backend.value == "NO"


def iterations_in(state: Path) -> int:
    """Iterations done before the state was saved, by Adam's own count."""
    return int(load_tensors(state)[0]["optimizer.student.0.step"])


@dataclass(frozen=True)
class Exploding:
    """Finite up to a share of the training, then not."""

    good: Denoising
    until: float
    followers = MappingProxyType({})

    def __call__(self, student, batch, progress: float) -> Tensor:
        return self.good(student, batch, progress) * (1 if progress < self.until else math.nan)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(training, tmp_path):
    _, loop = training(lambda denoiser: Exploding(denoising(denoiser), until=0.4))  # 12 of 30
    assert [next(loop).iteration, next(loop).iteration] == [5, 10]
    with pytest.raises(UserError, match="not finite at iteration 15"):
        next(loop)
    state = tmp_path / "state.safetensors"
    assert iterations_in(state) == 10
    assert all(tensor.isfinite().all() for tensor in load_tensors(state)[0].values())


@pytest.mark.parametrize("saves", [True, False])
def test_a_training_that_finds_no_memory_says_whether_anything_was_saved(
    command, tmp_path, train_tiny, quick, monkeypatch, saves
):
    def short_of_memory(*arguments, **settings):
        yield next(loops.fit(*arguments, **settings))
        raise MemoryError

    monkeypatch.setattr(runs, "fit", short_of_memory)
    config = replace(quick, save_every=0.0 if saves else math.inf)
    outcome = command(lambda: train_tiny(tmp_path / "run", config))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "lower --batch-size" in outcome.err
    assert ("the last save is kept" in outcome.err) == saves
    assert ("nothing was saved" in outcome.err) == (not saves)


def test_the_loop_learns(training):
    # an untrained network says velocity 0, whose squared error is 1 at every angle
    _, loop = training(denoising, iterations=150, batch_size=64, learning_rate=1e-2)
    losses = [line.loss for line in loop]
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert losses[-1] < 0.6


@pytest.mark.parametrize(("ema", "raw"), [(0.0, True), (0.9, False)])
def test_without_an_average_the_weights_kept_are_the_trained_ones(training, tmp_path, ema, raw):
    denoiser, loop = training(denoising, ema=ema)
    list(loop)
    state, _ = load_tensors(tmp_path / "state.safetensors")
    trained = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    assert (identity(denoiser) == checkpoint.weights_sha256(trained)) == raw


def test_the_average_kept_follows_the_weights_at_a_decay_that_ramps_up(training, tmp_path):
    denoiser, loop = training(denoising, ema=0.3, log_every=1, iterations=12)
    average = denoiser.net.stem.weight.detach().clone()
    for done, _ in enumerate(loop, 1):
        weights = load_tensors(tmp_path / "state.safetensors")[0]["student.net.stem.weight"]
        average = average.lerp(weights, 1 - min(0.3, done / (done + 9)))
    torch.testing.assert_close(denoiser.net.stem.weight.detach().cpu(), average)


def test_the_learning_rate_warms_up_and_falls_to_zero(training):
    _, loop = training(denoising, log_every=1, warmup=10, anneal="linear", learning_rate=1.0)
    rates = [line.learning_rate for line in loop]
    assert rates == pytest.approx([min(1, (i + 1) / 10) * (1 - i / 30) for i in range(30)])


# Runs


def lines(run: Path) -> list[dict]:
    """The log, as strict JSON, where NaN is none."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    text = (run / "log.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_finished_run_is_not_trained_again(tmp_path, train_tiny, monkeypatch):
    run = train_tiny(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(runs, "fit", None)
    train_tiny(run)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert not (run / "state").exists()


@pytest.mark.parametrize("stage", ["finished", "stopped"])
def test_a_run_with_other_settings_is_refused_by_the_settings_name(
    tmp_path, train_tiny, quick, stage, monkeypatch
):
    run = tmp_path / "run"
    if stage == "stopped":
        monkeypatch.setattr(runs, "fit", stopped_after(2))
        with pytest.raises(KeyboardInterrupt):
            train_tiny(run, replace(quick, save_every=0.0))
        monkeypatch.undo()
    else:
        train_tiny(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"learning_rate was 0\.005, now 0\.001"):
        train_tiny(run, replace(quick, learning_rate=1e-3))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_on_images_of_another_scale_is_refused(tmp_path, train_tiny, digits):
    darker = replace(digits, codec=replace(digits.codec, mean=3.0))
    train_tiny(tmp_path / "run")
    with pytest.raises(UserError, match="other settings"):
        train_tiny(tmp_path / "run", dataset=darker)


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "finished"])
def test_a_run_knows_its_images_by_their_fingerprint_wherever_they_lie(
    tmp_path, train_tiny, quick, digits, monkeypatch, stopped
):
    def lying(name: str, sha256: str) -> Dataset:
        return replace(digits, spec=replace(digits.spec, name=name, sha256=sha256))

    run, config = tmp_path / "run", replace(quick, save_every=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit", stopped_after(3 if stopped else 99))
        with suppress(KeyboardInterrupt):
            train_tiny(run, config, dataset=lying("/a/photos", "1" * 64))
    assert (run / "model.safetensors").exists() != stopped
    with pytest.raises(UserError, match="trained on other images than /a/photos holds"):
        train_tiny(run, config, dataset=lying("/a/photos", "2" * 64))
    train_tiny(run, config, dataset=lying("/b/pictures", "1" * 64))
    assert (run / "model.safetensors").exists()


def test_a_run_from_before_fingerprints_knows_its_images_by_their_name(tmp_path):
    images = {"name": "/a/photos", "mean": 3.0}
    before = {"data": "/a/photos", "images": images}
    now = {**before, "data_sha256": "1" * 64}
    runs.require_same(tmp_path, before, now)
    runs.require_same(tmp_path, now, before)
    assert recipe(before) == recipe(now)
    with pytest.raises(UserError, match="data was /a/photos, now /b/photos"):
        runs.require_same(tmp_path, before, now | {"data": "/b/photos"})


def test_an_option_that_is_new_and_off_makes_no_other_run_and_no_other_recipe(tmp_path):
    before = {"seed": 0, "ema": 0.9}
    off = before | {"frechet": 0.0, "start": None, "flip": False}
    runs.require_same(tmp_path, before, off)
    assert recipe(before) == recipe(off)
    with pytest.raises(UserError, match=r"frechet was None, now 1\.0"):
        runs.require_same(tmp_path, before, before | {"frechet": 1.0})
    assert recipe(before) != recipe(before | {"frechet": 1.0})


def test_a_round_from_another_number_of_steps_is_not_taken_for_this_one(tmp_path, teacher, quick):
    def distill(start: int):
        options = progressive.Options(
            teacher=teacher, out=tmp_path, start_steps=start, end_steps=2, fit=quick
        )
        return progressive.distill(options)

    distill(4)
    with pytest.raises(UserError, match="other settings"):  # 3 steps, too, become 2
        distill(3)


def test_a_run_stopped_between_its_last_step_and_its_model_keeps_its_whole_log(
    tmp_path, train_tiny, monkeypatch
):
    def killed(*arguments):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    monkeypatch.setattr(runs, "leave", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(run)
    monkeypatch.undo()
    before = lines(run)
    train_tiny(run)
    assert lines(run) == before
    assert (run / "model.safetensors").exists()


def test_a_run_stopped_between_its_state_and_its_log_line_still_logs_that_line(
    tmp_path, train_tiny, quick, monkeypatch
):
    def save_and_stop(*arguments):
        save(*arguments)
        if (run / "log.jsonl").exists():
            raise KeyboardInterrupt

    run, save, config = tmp_path / "run", loops.save, replace(quick, save_every=0.0)
    monkeypatch.setattr(loops, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(run, config)
    monkeypatch.undo()
    train_tiny(run, config)
    assert [line["iteration"] for line in lines(run)] == [5, 10, 15, 20, 25, 30]


def test_a_log_line_torn_by_a_kill_is_cut_off(tmp_path, train_tiny, quick, monkeypatch, capsys):
    run, config = tmp_path / "run", replace(quick, save_every=0.0)
    monkeypatch.setattr(runs, "fit", stopped_after(3))
    with pytest.raises(KeyboardInterrupt):
        train_tiny(run, config)
    monkeypatch.undo()
    with open(run / "log.jsonl", "a") as log:
        log.write('{"iteration": 20, "lo')
    train_tiny(run, config)
    assert [line["iteration"] for line in lines(run)] == [5, 10, 15, 20, 25, 30]
    assert [line["number"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]
    assert "lacks" not in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 1])
def test_a_log_line_that_is_lost_is_missed(tmp_path, train_tiny, quick, monkeypatch, capsys, place):
    run, config = tmp_path / "run", replace(quick, save_every=0.0)
    monkeypatch.setattr(runs, "fit", stopped_after(3))
    with pytest.raises(KeyboardInterrupt):
        train_tiny(run, config)
    monkeypatch.undo()
    whole = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(whole[:place] + whole[place + 1 :]))
    train_tiny(run, config)
    assert f"{run / 'log.jsonl'} lacks 1 of its 2 lines" in capsys.readouterr().out
    assert [line["number"] for line in lines(run)] == [2 - place, 3, 4, 5, 6]


def test_a_process_killed_twice_and_restarted_ends_as_one_that_was_not(
    tmp_path, monkeypatch, command
):
    settings = "--width 8 --multipliers 1 --blocks 1 --attention --batch-size 8 --warmup 5"
    settings += " --iterations 400 --precision fp32 --dropout 0.1 --save-every 0 --log-every 5"
    start = [sys.executable, "-m", "teachers.ddpm", *settings.split(), "--out", "killed"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    monkeypatch.chdir(tmp_path)
    log, moments = Path("killed/log.jsonl"), random.Random()
    for reached in (moments.randint(1, 25), moments.randint(30, 60)):
        process = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL)
        while not log.exists() or len(log.read_bytes().splitlines()) < reached:
            assert process.poll() is None, f"ended before line {reached}"
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.01))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert subprocess.run(start, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert command(ddpm.main, *settings.split(), "--out", "whole").code == 0

    assert checkpoint.load(Path("killed"))[2] == checkpoint.load(Path("whole"))[2]
    assert not list(Path("killed").rglob("*.part"))
    killed, whole = lines(Path("killed")), lines(Path("whole"))
    assert [line["iteration"] for line in killed] == list(range(5, 401, 5))
    assert [line["loss"] for line in killed] == [line["loss"] for line in whole]


def test_every_training_seed_draws_other_batches(digits, quick):
    def first(seed: int) -> Batch:
        return Batches(digits, replace(quick, seed=seed), Accelerator(cpu=True)).draw(3)

    assert torch.equal(first(1).eps, first(1).eps)
    for seed in (1, 2, 2**31, 2**32, 2**62, 2**63 - 1):
        for mine, other in zip(first(0)[:3], first(seed)[:3], strict=True):
            assert not torch.equal(mine, other)


def test_batches_of_seeds_of_32_bits_are_as_they_always_were():
    for seed, i in ((0, 0), (1, 0), (7, 12345), (2**31, 9), (2**32 - 1, 10**6)):
        assert batch_seed(seed, i) == (seed * 0x9E3779B9 + i) % 2**32


def test_seeds_whose_low_32_bits_agree_begin_with_other_weights(tmp_path, command, tiny):
    settings = "--width 8 --multipliers 1 --blocks 1 --attention --patch 1 --batch-size 8"
    settings += " --iterations 1 --learning-rate 1e-9 --ema 0 --precision fp32"  # it hardly moves

    def stem(seed: int) -> Tensor:
        run = tmp_path / f"{seed}"
        assert command(ddpm.main, *settings.split(), "--seed", seed, "--out", run).code == 0
        return checkpoint.load(run)[0]["stem.weight"]

    first, second = stem(5), stem(5 + 2**32)
    assert (first - second).abs().max() > 0.01
    torch.manual_seed(5)
    net = build(tiny, DenoiserConfig(), {}, "fp32").net
    torch.testing.assert_close(first, net.stem.weight.detach(), rtol=0, atol=1e-6)


def test_no_two_of_a_thousand_seeds_share_a_batch_within_a_million_iterations():
    starts = torch.tensor(sorted(batch_seed(seed, 0) for seed in range(1000)))
    gaps = torch.cat([starts.diff(), starts[:1] + 2**32 - starts[-1:]])
    assert gaps.min() > 10**6


def test_a_tracker_holds_the_log_and_without_its_package_is_refused(
    tmp_path, monkeypatch, train_tiny, quick
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_tiny(tmp_path / "run", replace(quick, track="tensorboard"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert [event.step for event in events.Scalars(name)] == list(range(5, 31, 5))
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([line[name] for line in log], rel=1e-6)
    plain = train_tiny(tmp_path / "plain", quick)
    assert checkpoint.load(plain)[2] == checkpoint.load(run)[2]
    assert not (plain / "tensorboard").exists()
    monkeypatch.setattr("diffusion.tracking.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--track wandb needs the package wandb: pip install"):
        train_tiny(tmp_path / "other", replace(quick, track="wandb"))


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_VERSION", "1", "needs --fsdp_version 2 beside it, got 1"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params is not supported: leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "checkpointing is not supported: leave it out"),
    ],
)
def test_a_launch_that_asks_for_more_than_shares_is_refused(
    tmp_path, monkeypatch, train_tiny, variable, value, words
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    train_tiny(tmp_path / "run")  # by one process, which has nobody to share with
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        train_tiny(tmp_path / "other")
