"""Learned variance: what it costs, what is best, and that a network finds it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion import checkpoint
from diffusion.circle import add_noise
from diffusion.codec import Scale
from diffusion.denoiser import DenoiserConfig
from diffusion.model import build, load
from diffusion.networks import UNetConfig
from diffusion.samplers import SOLVERS
from diffusion.schedules import SCHEDULES, cosine, even, linear_beta
from diffusion.training import fit, one_network
from distill import cd, ect, progressive, scm
from teachers import ddpm
from teachers.ddpm import OBJECTIVES, Denoising
from teachers.variance import VariationalBound, step_cost
from tests.analytic import Gaussian, grid_batch, normal, random_denoiser

close = torch.testing.assert_close
DOUBLE = torch.float64
CODEC = Scale(mean=100.0, std=60.0)
LEVELS = CODEC.grey_levels
# t -> s: long, short, from pure noise, and nearly to data
STEPS = [(1.2, 0.9), (0.7, 0.699), (math.pi / 2, 1.3), (math.pi / 2, 0.01), (0.02, 0.01)]


def angle(t: float) -> Tensor:
    return torch.tensor([t], dtype=DOUBLE)


def variances(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """beta and the posterior's variance, in alpha-bar (Ho et al. 2020, eq. 2 and 7)."""
    a_t, a_s = t.cos() ** 2, s.cos() ** 2
    beta = 1 - a_t / a_s
    return beta, (1 - a_s) / (1 - a_t) * beta


def left(scale: float, t: Tensor) -> Tensor:
    """Var[x0 | x_t] of data N(0, scale^2)."""
    return scale**2 * t.sin() ** 2 / ((scale * t.cos()) ** 2 + t.sin() ** 2)


def best_share(scale: float, t: Tensor, s: Tensor) -> Tensor:
    """With it a step's variance is that of p(x_s | x_t): the posterior's, and that of its mean."""
    beta, posterior = variances(t, s)
    weight = s.cos() * beta / t.sin() ** 2
    return (1 + weight**2 * left(scale, t) / posterior).log() / (beta / posterior).log()


@pytest.mark.parametrize("share", [-0.3, 0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize(("t", "s"), STEPS)
def test_a_step_costs_the_divergence_of_the_two_gaussians(t, s, share):
    """DDPM's posterior and eq. 15's Gaussian, by torch.distributions."""
    t, s = angle(t), angle(s)
    x_t, x0, target = (normal(seed, 4, 1, 2, 2, dtype=DOUBLE) for seed in (0, 1, 2))
    beta, posterior = variances(t, s)

    def mean(x0: Tensor) -> Tensor:
        kept = (1 - beta).sqrt() * s.sin() ** 2 / t.sin() ** 2
        return s.cos() * beta / t.sin() ** 2 * x0 + kept * x_t

    variance = (share * beta.log() + (1 - share) * posterior.log()).exp()
    q, p = Normal(mean(target), posterior.sqrt()), Normal(mean(x0), variance.sqrt())
    cost = step_cost(x0, torch.full_like(x0, share), target, t, s)
    close(cost, kl_divergence(q, p), rtol=1e-7, atol=1e-12)


def test_in_float32_a_step_of_a_thousand_costs_what_it_does_in_float64():
    x0, target, share = (normal(seed, 999, 1, 2, 2, dtype=DOUBLE) for seed in (0, 1, 2))
    t, s = cosine()[2:], cosine()[1:-1]
    exact = step_cost(x0, share, x0 + 0.01 * target, t, s)
    rounded = step_cost(x0.float(), share.float(), (x0 + 0.01 * target).float(), t, s)
    close(rounded.double().mean((1, 2, 3)), exact.mean((1, 2, 3)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("share", [-0.3, 0.0, 0.4, 1.0])
def test_the_last_step_costs_the_grey_levels_under_a_gaussian_of_clipped_variance(share):
    """The posterior's log-variance is a list whose first entry, log 0, is its second's."""
    angles = linear_beta()
    beta, posterior = variances(angles[1:], angles[:-1])
    posterior[0] = posterior[1]
    deviation = (share * beta[0].log() + (1 - share) * posterior[0].log()).div(2).exp() * CODEC.std
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    target = CODEC.encode(images)
    centre = images.double() + normal(0, 4, 1, 8, 8)
    x0 = ((centre - CODEC.mean) / CODEC.std).float()
    bins = Normal(centre, deviation)
    low = torch.where(images == 0, 0.0, bins.cdf(images - 0.5))
    mass = torch.where(images == 255, 1.0, bins.cdf(images + 0.5)) - low
    cost = VariationalBound(angles, LEVELS).last_cost(x0, torch.full_like(x0, share), target)
    likely = mass > 1e-6  # where the cdfs' difference has digits
    assert likely.double().mean() > 0.9
    close(cost.double()[likely], -mass.log()[likely], rtol=1e-3, atol=1e-4)


def test_the_bound_takes_each_angle_to_the_one_before_it_and_the_first_to_the_data():
    angles, bound = cosine(8), VariationalBound(cosine(8), LEVELS)
    x0, share = normal(0, 8, 1, 8, 8), normal(1, 8, 1, 8, 8)
    target = CODEC.encode(CODEC.decode(normal(2, 8, 1, 8, 8)))
    costs = bound(x0, share, target, angles[1:])
    steps = step_cost(x0[1:], share[1:], target[1:], angles[2:], angles[1:-1])
    close(costs[1:], 8 * steps.mean((1, 2, 3)))
    close(costs[0], 8 * bound.last_cost(x0, share, target)[0].mean())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bound_and_its_gradient_are_finite_however_wrong_the_network_is(schedule):
    angles = SCHEDULES[schedule]()
    target = CODEC.encode(torch.arange(256).repeat(250).reshape(1000, 1, 8, 8).to(torch.uint8))
    share = normal(0, 1000, 1, 8, 8).requires_grad_()
    x0 = target + 2 * normal(1, 1000, 1, 8, 8)
    cost = VariationalBound(angles, LEVELS)(x0, share, target, angles[1:])
    assert cost.isfinite().all()
    assert torch.autograd.grad(cost.sum(), share)[0].isfinite().all()


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.6])
@pytest.mark.parametrize(("t", "s"), STEPS)
def test_the_cost_is_least_at_the_variance_that_gaussian_data_has(t, s, scale):
    """The mean over x0 given x_t: the cost is quadratic, so two points of its variance will do."""
    t, s = angle(t), angle(s)
    targets = torch.tensor([-1.0, 1.0], dtype=DOUBLE).reshape(2, 1, 1, 1) * left(scale, t).sqrt()

    def cost(share: Tensor) -> Tensor:
        return step_cost(torch.zeros_like(targets), share.expand_as(targets), targets, t, s).mean()

    best, h = best_share(scale, t, s).requires_grad_(), 1e-4
    below, least, above = cost(best - h), cost(best), cost(best + h)
    bend = (above - 2 * least + below) / h**2
    assert ((above - below) / (2 * h)).abs() < 1e-4 * bend
    assert min(cost(best - 0.1), cost(best + 0.1)) > least
    assert torch.autograd.grad(least, best)[0].abs() < 1e-6 * bend


@pytest.mark.parametrize(("t", "s"), STEPS)
def test_beta_is_best_for_unit_variance_and_the_posteriors_variance_for_a_single_image(t, s):
    t, s = angle(t), angle(s)
    close(best_share(1.0, t, s), torch.ones_like(t))
    close(best_share(0.0, t, s), torch.zeros_like(t))


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.6])
def test_the_best_share_of_short_steps_is_the_velocitys_squared_error_whatever_their_length(scale):
    t = angle(0.8)
    for length in (1e-3, 1e-4):
        close(best_share(scale, t, t - length), left(scale, t) / t.sin() ** 2, rtol=3e-3, atol=0)


def variance_sampled(scale: float, angles: Tensor, share) -> float:
    """x0's variance, exactly: image k has noise k alone. share: (t, s) -> the step's share."""
    before = dict(zip(angles.tolist(), angles.roll(1), strict=True))

    def denoise(x_t, t, variance=False):
        x0 = Gaussian(0.0, scale)(x_t, t)
        return (x0, share(t, before[t.item()]).expand_as(x0)) if variance else x0

    count = len(angles) - 1
    noise = torch.eye(count, dtype=DOUBLE).reshape(count, count, 1, 1, 1)
    return SOLVERS["ancestral-learned"].run(denoise, iter(noise), angles).square().sum().item()


def fixed(share: float):
    return lambda t, s: torch.full_like(t, share)


@pytest.mark.parametrize("num_steps", [2, 8])
@pytest.mark.parametrize("scale", [0.5, 1.6])
def test_the_best_share_gives_back_the_datas_variance_at_few_steps_and_no_fixed_one_does(
    scale, num_steps
):
    """Less what the last call leaves of it, which no step before can change."""
    angles = even(cosine(), num_steps)
    exact = scale**2 - left(scale, angles[1]).item()
    best = variance_sampled(scale, angles, lambda t, s: best_share(scale, t, s))
    assert best == pytest.approx(exact, rel=1e-9)
    for share in (0.0, 1.0):
        assert abs(variance_sampled(scale, angles, fixed(share)) - exact) > 0.1 * exact


@pytest.mark.parametrize("scale", [0.5, 1.6])
def test_doubling_the_steps_quarters_the_error_of_a_share_learnt_on_short_ones(scale):
    """And halves that of fixed variances."""

    def error(num_steps: int, share) -> float:
        angles = even(cosine(), num_steps)
        exact = scale**2 - left(scale, angles[1]).item()
        return abs(variance_sampled(scale, angles, share) / exact - 1)

    def learnt(t, s):
        return left(scale, t) / t.sin() ** 2

    for share, order in ((learnt, 2), (fixed(0.0), 1), (fixed(1.0), 1)):
        assert math.log2(error(128, share) / error(256, share)) == pytest.approx(order, abs=0.15)


def test_x0_learns_from_its_own_loss_alone():
    batch, angles = grid_batch(16, 1, 8, 8), cosine(8)
    denoiser = random_denoiser(learned_variance=True)
    bound = VariationalBound(angles, LEVELS)
    plain, hybrid = (
        torch.autograd.grad(
            Denoising(angles, bound=b)(denoiser, batch, 0.0).mean(),
            [*denoiser.net.head.parameters()],
        )
        for b in (None, bound)
    )
    for alone, both in zip(plain, hybrid, strict=True):
        close(both[:1], alone[:1])
        assert torch.equal(alone[1:], torch.zeros_like(alone[1:]))
        assert both[1:].abs().max() > 0


@pytest.mark.parametrize("levels", OBJECTIVES)
def test_a_network_that_learns_its_variance_lowers_the_bound_below_that_of_fixed_ones(
    levels, tmp_path, tiny, quick, digits
):
    angles, config = cosine(16), replace(quick, iterations=150, ema=0.9)
    bound = VariationalBound(angles, digits.codec.grey_levels)
    torch.manual_seed(0)
    denoiser = build(tiny, DenoiserConfig(learned_variance=True), {}, config.precision)
    objective = OBJECTIVES[levels](angles, "v", bound=bound)
    list(fit(one_network(denoiser, objective), digits, config, tmp_path / "state"))
    x0 = digits.codec.encode(digits.test.images)
    t = angles[1 + torch.arange(len(x0)) % 16]
    with torch.no_grad():
        guess, share = denoiser(add_noise(x0, normal(0, *x0.shape), t), t, variance=True)
    assert share.abs().mean() > 0.1
    learnt = bound(guess, share, x0, t).mean()
    assert learnt < 0.97 * min(
        bound(guess, torch.full_like(x0, fixed), x0, t).mean() for fixed in (0, 1)
    )


NET = "--width 8 --multipliers 1 --blocks 1 --attention --precision fp32 --batch-size 16"


@pytest.fixture(scope="module")
def learning_teacher(tmp_path_factory):
    """A run of two steps' training."""
    run = tmp_path_factory.mktemp("runs") / "teacher"
    net = UNetConfig(width=8, multipliers=(1,), blocks=1, attention=())
    learned = DenoiserConfig(learned_variance=True)
    options = ddpm.Options.default("digits")
    config = replace(options.fit, iterations=2, batch_size=16, precision="fp32")
    ddpm.train_teacher(replace(options, net=net, denoiser=learned, fit=config, out=run))
    return run


def test_a_teacher_told_to_learn_its_variance_samples_with_it(tmp_path, command):
    settings = f"{NET} --iterations 2 --learned-variance --out {tmp_path}/run"
    assert command(ddpm.main, *settings.split()).code == 0
    model = load(tmp_path / "run")
    assert model.card.sampler == "ancestral-learned"
    assert [plan.num_steps for plan in model.card.plans] == [1000]
    images = model.sample(model.plan(5, "ancestral-learned"), 0, torch.arange(3))
    assert images.shape == (3, 1, 8, 8)
    assert command(ddpm.main, *settings.replace("--learned-", "--no-learned-").split()).code != 0


def test_students_of_a_teacher_with_a_variance_keep_its_share_as_it_is(learning_teacher, quick):
    config, teacher = replace(quick, iterations=2), load(learning_teacher)
    rounds = progressive.Options(teacher=learning_teacher, start_steps=4, end_steps=2, fit=config)
    students = progressive.distill(rounds)
    for mode in (cd, ect, scm):
        out = learning_teacher.parent / mode.__name__
        options = mode.Options(teacher=learning_teacher, out=out, fit=config)
        students.append(mode.distill(options))
    for student in students:
        before, after = (model.denoiser.net.head.weight for model in (teacher, student))
        assert torch.equal(after[1:], before[1:])
        assert not torch.equal(after[:1], before[:1])
        images = student.sample(student.plan(), 0, torch.arange(3))
        assert images.shape == (3, 1, 8, 8)
        assert student.card.sampler != "ancestral-learned"


def test_cards_of_networks_that_learn_no_variance_say_so_and_older_ones_need_not(tmp_path, teacher):
    weights, card, _ = checkpoint.load(teacher)
    older = {key: value for key, value in card.denoiser.items() if key != "learned_variance"}
    checkpoint.save(tmp_path / "older.safetensors", weights, replace(card, denoiser=older))
    assert not card.denoiser["learned_variance"]
    assert not load(tmp_path / "older.safetensors").denoiser.config.learned_variance
