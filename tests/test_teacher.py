"""The teacher's objective: which noise levels it sees, and what it learns of all of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from diffusion import checkpoint
from diffusion.batches import Batch
from diffusion.console import UserError
from diffusion.denoiser import DenoiserConfig
from diffusion.files import load_tensors
from diffusion.machine import this_device
from diffusion.model import build, load
from diffusion.networks import UNet
from diffusion.schedules import SCHEDULES, cosine
from diffusion.training import Progress, fit, one_network
from distill import consistency
from teachers import ddpm
from teachers.ddpm import OBJECTIVES, Denoising
from teachers.levels import ImportanceSampling, LossHistory, log_normal, uniform
from tests.analytic import SKEWED, grid_batch

close = torch.testing.assert_close


def levels(count: int, offset: float = 0.5) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + offset) / count


def history_of(norms: list[float]) -> LossHistory:
    """As after 10 steps in which each bin's loss was this."""
    history, level = LossHistory(len(norms)), levels(len(norms))
    for done in range(10):
        history.record(level, torch.tensor(norms))
        history.follow(None, done)
    return history


def test_uniform_levels_are_every_angle_of_the_list_but_0():
    angles = cosine(8)
    assert torch.equal(uniform(angles, levels(8, 0.0)), angles[1:])
    assert torch.equal(uniform(angles, levels(8, 1 - 1e-9)), angles[1:])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_normal_levels_are_edms_between_the_lists_ends(schedule):
    """Kolmogorov and Smirnov's distance to N(-1.2, 1.2^2) of log sigma, sigma_data = 0.5."""
    angles, level = SCHEDULES[schedule](), levels(10_000)
    t = log_normal(angles, level)
    assert angles[1] <= t.min()
    assert t.max() <= angles[-1]
    z = ((0.5 * t.tan()).log() + 1.2) / 1.2
    low, high = torch.special.ndtr(((0.5 * angles[[1, -1]].tan()).log() + 1.2) / 1.2)
    close((torch.special.ndtr(z) - low) / (high - low), level, rtol=0, atol=1e-6)


def test_the_proposal_is_the_losses_norm_after_ten_losses_of_each_bin():
    norms = [1.0, 3.0, 4.0, 8.0]
    history, level = LossHistory(4), levels(8)
    for done in range(10):
        assert torch.equal(history.proposal(), torch.full((4,), 0.25, dtype=torch.float64))
        history.record(level, torch.tensor(norms).repeat_interleave(2))
        history.follow(None, done)
    expected = 0.999 * torch.tensor(norms, dtype=torch.float64) / 16 + 0.00025
    close(history.proposal(), expected)


def test_one_bin_without_its_ten_losses_keeps_the_proposal_uniform():
    history = LossHistory(4)
    for done in range(50):
        history.record(levels(4)[:3], torch.tensor([1.0, 2.0, 3.0]))
        history.follow(None, done)
    assert torch.equal(history.proposal(), torch.full((4,), 0.25, dtype=torch.float64))


def test_a_bins_mean_is_of_its_squares_and_then_forgets_a_tenth_a_step():
    history = LossHistory(1)
    mean, losses = 0.0, [float(i % 7 + 1) for i in range(30)]
    for done, loss in enumerate(losses):
        history.record(levels(2), torch.tensor([loss, 3 * loss]))
        history.follow(None, done)
        mean += (5 * loss**2 - mean) / min(done + 1, 10)
    assert history.mean_square.item() == pytest.approx(mean)


def test_placed_levels_are_stratified_over_the_proposal_and_keep_within_their_bins():
    history = history_of([1.0, 3.0, 4.0, 8.0])
    placed, weight = history.place(levels(100_000))
    p = history.proposal()
    assert placed.min() >= 0
    assert placed.max() < 1
    assert placed.diff().min() >= 0
    counts = (placed * 4).long().bincount(minlength=4) / 100_000
    close(counts.double(), p, rtol=0, atol=2e-5)
    close(weight, 1 / (4 * p[(placed * 4).long()]))
    top, _ = history.place(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert top[0] == 0
    assert top[1] < 1


def test_a_uniform_proposal_moves_no_level():
    level = levels(1000)
    placed, weight = LossHistory(10).place(level)
    close(placed, level)
    close(weight, torch.ones_like(level))


@dataclass(frozen=True)
class Steep:
    """A loss that grows a hundredfold over the levels, with a gradient: (a x0 - 1)^2 e^(5 l)."""

    followers = MappingProxyType({})

    def __call__(self, student, batch: Batch, progress: float) -> Tensor:
        error = (student * batch.x0 - 1).square().flatten(1).mean(1)
        return error * (5 * batch.level).exp()


def steep_batch(seed: int, count: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    x0 = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return Batch(x0, x0, (torch.arange(count) + offset) / count, None, seed)


def gradients(objective, count: int) -> Tensor:
    """The gradient of the loss of each of `count` batches of 16."""
    student, of_batches = torch.ones((), dtype=torch.float64, requires_grad=True), []
    for seed in range(count):
        loss = objective(student, steep_batch(seed, 16), 0.0).mean()
        of_batches.append(torch.autograd.grad(loss, student)[0])
    return torch.stack(of_batches)


def test_importance_sampling_keeps_the_expected_gradient_and_lessens_its_variance():
    """Within 4 standard errors; the history is that of earlier batches, and stands still."""
    history, count = LossHistory(20), 1500
    learning = ImportanceSampling(Steep(), history)
    student = torch.ones((), dtype=torch.float64)
    for seed in range(60):
        learning(student, steep_batch(10_000 + seed, 64), 0.0)
        history.follow(None, seed)
    assert history.seen.min() >= 10
    plain, proposed = gradients(Steep(), count), gradients(learning, count)
    error = math.sqrt((plain.var() + proposed.var()) / count)
    assert abs(plain.mean() - proposed.mean()).item() < 4 * error
    assert proposed.var() < 0.6 * plain.var()


def test_the_weighted_loss_of_an_exact_denoiser_is_the_uniform_one():
    """Over a grid of levels as fine as the list, where both expectations are plain sums."""
    angles, history = cosine(100), history_of([float(i + 1) for i in range(10)])
    batch = grid_batch(40_000, 1, 1, 1)
    uniform_loss = Denoising(angles)(SKEWED, batch, 0.0)
    weighted = ImportanceSampling(Denoising(angles), history)(SKEWED, batch, 0.0)
    error = math.sqrt((uniform_loss.var() + weighted.var()).item() / len(weighted))
    assert weighted.mean().item() == pytest.approx(uniform_loss.mean().item(), abs=4 * error)


@pytest.fixture
def training(tmp_path, tiny, quick, digits):
    """(levels, name) -> a new network, its objective, and the loop that trains it."""

    def begin(which: str, name: str) -> tuple[torch.nn.Module, object, Iterator[Progress]]:
        config = replace(quick, save_every=0.0, iterations=40)
        torch.manual_seed(0)
        denoiser = build(tiny, DenoiserConfig(), {}, config.precision)
        objective = OBJECTIVES[which](cosine(200).to(this_device()), "eps")
        if which == "importance":  # bins few enough to be filled in some 12 steps
            objective = replace(objective, history=LossHistory(20).to(this_device()))
        method = one_network(denoiser, objective)
        return denoiser, objective, fit(method, digits, config, tmp_path / name)

    return begin


@pytest.mark.parametrize(
    ("which", "stopped"), [("importance", 5), ("importance", 25), ("log-normal", 25)]
)
def test_a_run_of_any_levels_stopped_and_resumed_ends_the_same_bit_for_bit(
    training, tmp_path, which, stopped
):
    def end(name: str) -> tuple[str, dict]:
        denoiser, _, loop = training(which, name)
        list(loop)
        return checkpoint.weights_sha256(denoiser.state_dict()), load_tensors(tmp_path / name)[0]

    _, _, loop = training(which, "stopped")
    while next(loop).iteration < stopped:
        pass
    loop.close()
    weights, state = end("stopped")
    other_weights, other_state = end("whole")
    assert weights == other_weights
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def test_importance_sampling_trains_on_a_history_that_is_saved(training, tmp_path):
    _, objective, loop = training("importance", "state")
    list(loop)
    state = load_tensors(tmp_path / "state")[0]
    seen = state["follower.losses.seen"]
    assert torch.equal(seen, objective.history.seen.cpu())
    assert (seen >= 10).all()
    assert (seen <= 40).all()
    proposal = objective.history.proposal()
    assert proposal.max() > 1.2 * proposal.min()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("which", OBJECTIVES)
def test_a_teacher_trains_on_every_schedule_with_every_proposal(tmp_path, command, schedule, which):
    settings = "--width 8 --multipliers 1 --blocks 1 --attention --batch-size 8 --iterations 2"
    settings += f" --precision fp32 --schedule {schedule} --levels {which} --out {tmp_path}/run"
    assert command(ddpm.main, *settings.split()).code == 0
    card = checkpoint.load(tmp_path / "run")[1]
    assert card.training["settings"]["schedule"] == schedule
    assert card.training["settings"]["levels"] == which


@pytest.mark.parametrize("net", [{"attention": [16]}, {"blocks": -1}])
def test_a_checkpoint_of_a_network_that_is_refused_today_still_loads(teacher, tmp_path, tiny, net):
    _, card, _ = checkpoint.load(teacher)
    config = replace(
        tiny, **{key: tuple(v) if isinstance(v, list) else v for key, v in net.items()}
    )
    with pytest.raises(UserError):
        config.check()
    weights = UNet(config).state_dict()
    checkpoint.save(tmp_path / "old.safetensors", weights, replace(card, net=card.net | net))
    model = load(tmp_path / "old.safetensors")
    assert model.sample(model.plan(2, "ddim"), 0, torch.arange(2)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("flag", ["--clamp", "--no-clamp"])
def test_with_clamp_a_teacher_and_its_students_know_the_range_of_the_images(
    tmp_path, command, flag
):
    settings = ["--iterations", "2", "--batch-size", "8", "--precision", "fp32"]
    small = f"--width 8 --multipliers 1 --blocks 1 --attention --out {tmp_path}/teacher {flag}"
    assert command(ddpm.main, *settings, *small.split()).code == 0
    own = ["--mode", "ect", "--teacher", f"{tmp_path}/teacher", "--out", f"{tmp_path}/ect"]
    assert command(consistency.main, *settings, *own).code == 0
    for run in ("teacher", "ect"):
        model = load(tmp_path / run)
        expected = model.codec.bounds if flag == "--clamp" else None
        assert model.denoiser.config.bounds == expected
        if expected:
            levels = torch.tensor([0, 255], dtype=torch.uint8)
            close(model.codec.encode(levels), torch.tensor(expected))
