import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion.circle import TO_X0, broadcast
from diffusion.model import load
from diffusion.samplers import sample
from diffusion.schedules import cosine, even
from distill.midtraining import Midtraining, Options, distill, trajectory
from tests.analytic import BIMODAL, DATA, NOISE, SKEWED, consistency_function, grid_batch, normal

close = torch.testing.assert_close
both_kinds_of_data = pytest.mark.parametrize("data", [SKEWED, BIMODAL], ids=["gaussian", "mixture"])
SIXTEEN = even(cosine(), 16)


class Counted:
    """A teacher that counts the images it is called on and keeps the conditions it is told."""

    def __init__(self, data):
        self.data, self.images, self.conditions = data, 0, []

    def __call__(self, x_t, t, condition=None):
        self.images += len(x_t)
        self.conditions.append(condition)
        return self.data(x_t, t)


def affine(angles: torch.Tensor) -> torch.Tensor:
    """(N, 2): the end of SKEWED's trajectory is a x + b at angles[1:]: its teacher is affine."""
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    points, end = trajectory(SKEWED, noise, angles)
    low, high = points.flatten(1).unbind(1)
    a = (end[1] - end[0]).flatten() / (high - low)
    return torch.stack([a, end[0].flatten() - a * low], 1)


def solution(angles: torch.Tensor):
    """The student that maps every point of SKEWED's trajectories to their ends."""
    lines = affine(angles)

    def student(x_t, t, condition=None, dropout=None):
        a, b = lines[torch.searchsorted(angles, t.contiguous()) - 1].unbind(1)
        return broadcast(a, x_t) * x_t + broadcast(b, x_t)

    return student


@both_kinds_of_data
@pytest.mark.parametrize("num_steps", [2, 5, 16])
def test_a_trajectory_begins_at_the_noise_and_ends_where_the_sampler_does(data, num_steps):
    noise, angles = normal(0, 8, 1, 2, 2), even(cosine(), num_steps)
    points, end = trajectory(data, noise, angles)
    assert len(points) == num_steps
    assert torch.equal(points[-1], noise)
    assert torch.equal(end, sample(data, iter([noise]), "dpm-solver++", angles))
    assert torch.equal(end, data(points[0], angles[1]))  # the last call's x0


@both_kinds_of_data
def test_a_fine_trajectory_follows_the_ode(data):
    noise = normal(0, 64, 1, 2, 2, dtype=torch.float64)
    angles = even(cosine(), 512)
    points, _ = trajectory(data, noise, angles)
    for i in (32, 128, 256, 384):
        exact = data.flow(noise, NOISE, angles[i])
        assert (points[i - 1] - exact).square().mean().sqrt() < 2e-3


@pytest.mark.parametrize("weighting", ["truncated", "v"])
@pytest.mark.parametrize("size", [64, 100])
def test_the_function_from_a_trajectory_to_its_end_has_no_loss(weighting, size):
    objective = Midtraining(SKEWED, SIXTEEN, weighting)
    batch = grid_batch(size, 1, 2, 2, dtype=torch.float64)
    loss = objective(solution(SIXTEEN), batch, 0.0)
    assert loss.shape == (size,)
    assert loss.max() < 1e-20
    assert objective(SKEWED, batch, 0.0).mean() > 1e-3  # the teacher is not it


@pytest.mark.parametrize("theta", [-0.1, 0.1])
def test_the_gradient_leads_a_perturbed_student_back(theta):
    theta, exact = torch.tensor(theta, requires_grad=True), solution(SIXTEEN)

    def student(x_t, t, condition, dropout=None):
        return exact(x_t, t) + theta * t.sin()[..., None, None, None] * x_t

    batch = grid_batch(64, 1, 2, 2, dtype=torch.float64)
    Midtraining(SKEWED, SIXTEEN)(student, batch, 0.0).mean().backward()
    assert theta.grad * theta > 0


@both_kinds_of_data
def test_the_minimiser_nears_the_consistency_function_at_the_solvers_order(data):
    """The target at pi/2: error log(N) / N^2, as steps of lambda do not shrink at the data end."""
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)

    def error(num_steps: int) -> float:
        _, end = trajectory(data, noise, even(cosine(), num_steps))
        return (end - data.flow(noise, NOISE, DATA)).square().mean().sqrt().item()

    assert error(16) < 0.02
    ratio = math.log2(error(256) / error(512))
    assert ratio == pytest.approx(2 - math.log2(math.log(512) / math.log(256)), abs=0.2)


@pytest.mark.parametrize("size", [256, 100, 8])
def test_a_training_step_costs_about_one_call_of_the_teacher_per_image(size):
    teacher = Counted(SKEWED)
    Midtraining(teacher, SIXTEEN)(SKEWED, grid_batch(size, 1, 2, 2), 0.0)
    assert size <= teacher.images < size + 16


def test_every_angle_of_every_trajectory_is_trained_on_once():
    seen = []

    def student(x_t, t, condition, dropout=None):
        seen.extend(zip(t.tolist(), x_t.flatten(1).tolist(), strict=True))
        return x_t

    batch = grid_batch(64, 1, 2, 2)
    Midtraining(BIMODAL, SIXTEEN)(student, batch, 0.0)
    points, _ = trajectory(BIMODAL, batch.eps[:4], SIXTEEN)
    expected = [
        (t, x.flatten().tolist())
        for t, images in zip(SIXTEEN[1:].tolist(), points, strict=True)
        for x in images
    ]
    assert sorted(seen) == sorted(expected)


def test_two_processes_that_share_a_batch_train_on_what_one_trains_on():
    batch = grid_batch(64, 1, 2, 2)
    objective = Midtraining(BIMODAL, SIXTEEN)
    whole = objective(SKEWED, batch, 0.0)
    for rank in (0, 1):
        mine = [part[rank::2] for part in batch[:3]]
        close(
            objective(SKEWED, batch._replace(x0=mine[0], eps=mine[1], level=mine[2]), 0.0),
            whole[rank::2],
        )


def test_a_guided_label_goes_along_with_its_weight():
    condition = {"label": torch.arange(40), "guidance": torch.arange(40) / 2}
    batch = grid_batch(40, 1, 2, 2)._replace(condition=condition)

    def denoiser(x_t, t, given, dropout=None):
        assert torch.equal(given["guidance"], given["label"] / 2)
        return given["label"][:, None, None, None] + 0 * x_t

    assert Midtraining(denoiser, SIXTEEN)(denoiser, batch, 0.0).max() < 1e-9


def test_a_point_has_the_label_of_its_trajectory():
    """A teacher that makes x0 = label: so must every target be."""
    label, labels = torch.arange(40), []

    def teacher(x_t, t, given):
        return given["label"][:, None, None, None] + 0 * x_t

    def student(x_t, t, given, dropout=None):
        labels.append(given["label"])
        return teacher(x_t, t, given)

    batch = grid_batch(40, 1, 2, 2)._replace(condition={"label": label})
    assert Midtraining(teacher, SIXTEEN)(student, batch, 0.0).max() < 1e-9
    assert sorted(set(labels[0].tolist())) == [0, 1, 2]  # of 3 trajectories


def test_the_target_carries_no_gradient_to_the_teacher():
    theta, scale = (torch.ones((), requires_grad=True) for _ in range(2))
    objective = Midtraining(lambda *inputs: scale * SKEWED(*inputs), SIXTEEN)
    batch = grid_batch(32, 1, 2, 2)
    objective(lambda *inputs, **more: theta * SKEWED(*inputs, **more), batch, 0.0).sum().backward()
    assert theta.grad.abs() > 0
    assert scale.grad is None


def test_a_small_network_learns_most_of_what_one_step_of_ddim_lacks():
    """On the mixture: 1 call of the student against 1 of its teacher, which is the mean of all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def student(x_t, t, condition=None, dropout=None):
        inputs = torch.stack([x_t.flatten(), t.float().expand(len(x_t))], 1)
        return TO_X0["v"](x_t, net(inputs).reshape(x_t.shape), t)

    objective = Midtraining(BIMODAL, SIXTEEN)
    optimizer = torch.optim.Adam(net.parameters())
    for i in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 300)
        batch = grid_batch(256, 1, 1, 1)._replace(eps=normal(i, 256, 1, 1, 1))
        optimizer.zero_grad()
        objective(student, batch, 0.0).mean().backward()
        optimizer.step()
    noise = normal(1000, 4096, 1, 1, 1)
    exact = consistency_function(BIMODAL)(noise, NOISE)
    with torch.no_grad():
        mine, ddim = (f(noise, NOISE.expand(4096)) for f in (student, BIMODAL))
    error, ddim_error = ((x0 - exact).square().mean().sqrt() for x0 in (mine, ddim))
    assert ddim_error > 0.8
    assert error < ddim_error / 5


def test_a_run_leaves_a_student_that_samples_by_consistency_on_its_own_angles(
    tmp_path, teacher, quick
):
    fit = replace(quick, iterations=4)
    options = Options(teacher=teacher, out=tmp_path / "run", solver_steps=8, fit=fit)
    made = distill(options)
    card = load(tmp_path / "run").card
    assert (card.method, card.sampler) == ("midtraining", "consistency")
    assert [plan.num_steps for plan in card.plans] == [1, 2, 4, 8]
    assert all(set(plan.angles) <= set(card.plan(8).angles) for plan in card.plans)
    assert card.parent == load(teacher).sha256
    assert distill(options).sha256 == made.sha256


def test_a_student_of_few_angles_claims_no_more_steps_than_those(tmp_path, teacher, quick):
    fit = replace(quick, iterations=1)
    options = Options(teacher=teacher, out=tmp_path / "run", solver_steps=3, fit=fit)
    assert [plan.num_steps for plan in distill(options).card.plans] == [1, 2]
