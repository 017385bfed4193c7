import math

import pytest
import torch

from diffusion.circle import add_noise
from diffusion.denoiser import Denoiser
from diffusion.schedules import cosine, even
from distill.consistency import (
    DISTANCES,
    WEIGHTS,
    Consistency,
    data_step,
    euler_step,
    growing,
    heun_step,
    neighbours,
    tightening,
)
from tests.analytic import (
    BIMODAL,
    SKEWED,
    consistency_function,
    grid_batch,
    normal,
    random_unet,
)

close = torch.testing.assert_close
both_kinds_of_data = pytest.mark.parametrize("data", [SKEWED, BIMODAL], ids=["gaussian", "mixture"])
BATCH = grid_batch(180, 1, 2, 2, dtype=torch.float64)
NEIGHBOURS = neighbours(even(cosine(), 18))


def squared(step, pairs=NEIGHBOURS, **options) -> Consistency:
    return Consistency(step, pairs, DISTANCES["squared"], WEIGHTS["one"], **options)


def exact_step(data):
    return lambda batch, x_t, t, s: data.flow(x_t, t, s)


@both_kinds_of_data
def test_the_exact_consistency_function_has_no_loss_along_the_exact_ode(data):
    """Song et al. 2023, section 3: f(x_t, t) = f(x_s, s) on a trajectory, down to s = 0."""
    student = consistency_function(data)
    assert squared(exact_step(data))(student, BATCH, 0.0).max() < 1e-16
    assert squared(exact_step(data))(data, BATCH, 0.0).mean() > 1e-4  # the denoiser is not it


@both_kinds_of_data
def test_better_steps_leave_the_exact_consistency_function_less_loss(data):
    student = consistency_function(data)
    steps = (exact_step(data), heun_step(data), euler_step(data))
    losses = [squared(step)(student, BATCH, 0.0).mean() for step in steps]
    assert 1e6 * losses[0] < losses[1] < losses[2]


@both_kinds_of_data
@pytest.mark.parametrize("theta", [-0.1, 0.1])
def test_the_gradient_leads_a_perturbed_student_back(data, theta):
    theta, exact = torch.tensor(theta, requires_grad=True), consistency_function(data)

    def student(x_t, t, label):
        return exact(x_t, t) + theta * t.sin()[..., None, None, None] * x_t

    squared(exact_step(data))(student, BATCH, 0.0).mean().backward()
    assert theta.grad * theta > 0


def test_only_the_students_pass_at_t_carries_a_gradient():
    """The target's minus of Song et al. 2023, eq. 7: a stopped gradient, the step's included."""
    theta, scale = (torch.tensor(0.5, requires_grad=True) for _ in range(2))

    def with_theta(theta):
        return lambda x_t, t, label=None: theta * SKEWED(x_t, t)

    def gradient(**options) -> torch.Tensor:
        objective = squared(euler_step(lambda *inputs: scale * SKEWED(*inputs)), **options)
        loss = objective(with_theta(theta), BATCH, 0.0).mean()
        return torch.autograd.grad(loss, [theta, scale], allow_unused=True)

    assert gradient() == gradient(target=with_theta(theta.detach()))
    assert gradient()[0].abs() > 0
    assert gradient()[1] is None


def test_another_network_judges_x_s_where_one_is_given():
    objective = squared(exact_step(SKEWED), target=consistency_function(SKEWED))
    assert objective(consistency_function(SKEWED), BATCH, 0.0).max() < 1e-20
    assert objective(lambda x_t, t, label: 0 * x_t, BATCH, 0.0).mean() > 0.1


@both_kinds_of_data
@pytest.mark.parametrize(("step", "order"), [(euler_step, 2), (heun_step, 3)])
def test_halving_a_step_divides_its_error_by_4_for_euler_and_8_for_heun(data, step, order):
    x_t = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)
    t = torch.full((41,), 1.0, dtype=torch.float64)

    def error(size: float) -> float:
        x_s = step(data)(BATCH, x_t, t, t - size)
        return (x_s - data.flow(x_t, t, t - size)).square().mean().sqrt().item()

    assert math.log2(error(0.02) / error(0.01)) == pytest.approx(order, abs=0.1)


def test_heuns_step_to_the_data_end_is_eulers_and_leaves_its_batch_alone():
    t = torch.tensor([1.5, 1.5, 0.5], dtype=torch.float64)
    s = torch.tensor([0.0, 1.2, 0.0], dtype=torch.float64)
    x_t = normal(0, 3, 1, 2, 2)
    heun, euler = (step(SKEWED)(BATCH, x_t, t, s) for step in (heun_step, euler_step))
    close(heun[[0, 2]], SKEWED(x_t, t)[[0, 2]])
    close(heun[[0, 2]], euler[[0, 2]])
    close(heun[1:2], heun_step(SKEWED)(BATCH, x_t[1:2], t[1:2], s[1:2]))


def test_consistency_trainings_step_adds_less_of_the_same_noise():
    """Song et al. 2023, eq. 10."""
    batch = grid_batch(18, 1, 2, 2)
    t, s = NEIGHBOURS(batch.level, 0.0)
    x_s = data_step(batch, add_noise(batch.x0, batch.eps, t), t, s)
    close(x_s, add_noise(batch.x0, batch.eps, s), rtol=1e-6, atol=1e-6)


def test_both_passes_drop_the_same_units():
    student = Denoiser(random_unet(dropout=0.5)).train()
    batch = grid_batch(8, 1, 8, 8)
    t = torch.full((8,), 1.0, dtype=torch.float64)
    assert squared(data_step, lambda level, progress: (t, t))(student, batch, 0.0).max() == 0

    first, second = student(batch.x0, t), student(batch.x0, t)  # without the seed between them
    assert (first - second).square().mean() > 1e-3


def test_neighbours_are_each_step_of_the_list_equally_often():
    angles = even(cosine(), 18)
    t, s = NEIGHBOURS(BATCH.level, 0.0)
    assert torch.equal(t, angles[1:].repeat_interleave(10))
    assert torch.equal(s, angles[:-1].repeat_interleave(10))


def test_growing_uses_its_lists_in_turn_for_equal_shares_of_the_training():
    lists = [even(cosine(), count) for count in (2, 5, 9)]
    pairs = growing(lists)
    for progress, expected in [(0, 0), (0.33, 0), (0.34, 1), (0.66, 1), (0.67, 2), (0.9999, 2)]:
        for now, then in zip(
            pairs(BATCH.level, progress), neighbours(lists[expected])(BATCH.level, 0)
        ):
            assert torch.equal(now, then)


STAGES = 8
LEVELS = grid_batch(1000).level


def stage(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 1 to 8, in its middle: t, s."""
    return tightening(math.pi / 2, STAGES)(LEVELS, (number - 0.5) / STAGES)


def gap(number: int) -> torch.Tensor:
    t, s = stage(number)
    return 1 - s.tan() / t.tan()


def test_tightening_begins_as_diffusion_training_but_near_noise():
    t, s = stage(1)
    assert s[t.tan() < 3.85].max() == 0
    assert s[t.tan() > 3.95].min() > 0


@pytest.mark.parametrize("progress", [0.0, 0.124, 0.125, 0.5, 0.9999])
def test_tightening_keeps_s_below_t(progress):
    extremes = torch.tensor([0, math.nextafter(1, 0)], dtype=torch.float64)
    t, s = tightening(math.pi / 2, STAGES)(torch.cat([extremes, LEVELS]), progress)
    assert (s >= 0).all()
    assert (s < t).all()
    assert t.max() <= math.pi / 2


@pytest.mark.parametrize("number", range(1, STAGES))
def test_tightening_halves_the_gap_from_stage_to_stage(number):
    apart = gap(number) < 1  # where s is above 0 already
    close(gap(number + 1)[apart], gap(number)[apart] / 2, rtol=1e-9, atol=0)
    assert (gap(number + 1) <= gap(number)).all()


def test_tightening_keeps_the_gap_in_proportion_to_n_of_t():
    """n = 1 + 8 sigmoid(-sigma), Geng et al. 2024, section 4, with sigma_data = 1/2."""
    share = gap(STAGES) / (1 + 8 * torch.sigmoid(-stage(STAGES)[0].tan() / 2))
    close(share, share[:1].expand(len(share)), rtol=1e-9, atol=0)


def test_tightening_draws_tan_t_log_normally():
    z = (stage(1)[0].tan().log() + 0.4) / 2.0
    inside = (LEVELS > 0.01) & (LEVELS < 0.99)  # beyond, clipped
    close(torch.special.ndtr(z)[inside], LEVELS[inside], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_is_least_at_0_and_grows_with_the_difference(name):
    scales = torch.tensor([0.0, 1e-3, 0.1, 1.0, 10.0])[:, None, None, None]
    distance = DISTANCES[name](scales * normal(0, 1, 3, 4, 4))
    assert distance[0] == pytest.approx(0, abs=1e-5)
    assert distance.diff().min() > 0


def test_pseudo_huber_is_the_norm_far_out_and_the_square_close_by():
    """Song & Dhariwal 2023, section 3.3: c = 0.00054 sqrt(dimensions)."""
    c = 0.00054 * math.sqrt(48)
    unit = torch.ones(1, 3, 4, 4, dtype=torch.float64) / math.sqrt(48)
    close(DISTANCES["pseudo-huber"](1e3 * unit).item(), 1e3, rtol=1e-5, atol=0)
    close(DISTANCES["pseudo-huber"](1e-5 * unit).item(), 1e-10 / (2 * c), rtol=1e-4, atol=0)


def test_a_pairs_weight_multiplies_its_loss():
    one = squared(data_step)(SKEWED, BATCH, 0.0)
    t, s = NEIGHBOURS(BATCH.level, 0.0)
    weighted = Consistency(data_step, NEIGHBOURS, DISTANCES["squared"], WEIGHTS["gap"])
    close(weighted(SKEWED, BATCH, 0.0), one / (t - s), rtol=1e-6, atol=0)


def test_one_step_from_noise_to_data_is_diffusion_training():
    """s = 0: f is the identity there, and the target x0 itself."""
    pairs = neighbours(even(cosine(), 1))
    t, _ = pairs(BATCH.level, 0.0)
    denoised = SKEWED(add_noise(BATCH.x0, BATCH.eps, t), t)
    loss = squared(data_step, pairs)(SKEWED, BATCH, 0.0)
    close(loss, (denoised - BATCH.x0).square().mean((1, 2, 3)))
