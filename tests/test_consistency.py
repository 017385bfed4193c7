import math
import re
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from diffusion import checkpoint
from diffusion.circle import add_noise, broadcast, merge_steps, rotate
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.denoiser import Denoiser
from diffusion.samplers import sample
from diffusion.schedules import cosine, even, karras
from distill import cd, ct, guidance, ict, midtraining, progressive
from distill.consistency import MODES, main, read_command
from distill.discrete import (
    DISTANCES,
    WEIGHTS,
    Consistency,
    join,
)
from distill.ict import NOISE as LOG_NORMAL
from distill.pairs import (
    CURRICULA,
    LogNormal,
    doubling,
    fixed,
    growing,
    neighbours,
    root,
    segments,
    target_decay,
    tightening,
)
from distill.shared import check_loss
from distill.steps import data_step, euler_step, heun_step
from teachers.presets import for_data
from tests.analytic import (
    BIMODAL,
    DATA,
    NOISE,
    SKEWED,
    consistency_function,
    grid_batch,
    normal,
    random_unet,
)

close = torch.testing.assert_close
both_kinds_of_data = pytest.mark.parametrize("data", [SKEWED, BIMODAL], ids=["gaussian", "mixture"])
BATCH = grid_batch(180, 1, 2, 2, dtype=torch.float64)
ANGLES = partial(even, cosine())
METHODS = [*MODES.values(), guidance, midtraining, progressive]
NEIGHBOURS = neighbours(even(cosine(), 18))


def squared(step, pairs=NEIGHBOURS, **options) -> Consistency:
    return Consistency(step, pairs, DISTANCES["squared"], WEIGHTS["one"], **options)


def implied_x0(x_t, x_s, t, s):
    """The x0 for which rotate(x_t, x0, t, s) is x_s. Needs t != s."""
    distance = broadcast(t.sin(), x_s) * x_s - broadcast(s.sin(), x_t) * x_t
    return distance / broadcast((t - s).sin(), x_t)


def exact_step(data):
    return lambda batch, x_t, t, s: implied_x0(x_t, data.flow(x_t, t, s), t, s)


@both_kinds_of_data
def test_the_exact_consistency_function_has_no_loss_along_the_exact_ode(data):
    """Song et al. 2023, section 3: f(x_t, t) = f(x_s, s) on a trajectory, down to s = 0."""
    student = consistency_function(data)
    assert squared(exact_step(data))(student, BATCH, 0.0).max() < 1e-16
    assert squared(exact_step(data))(data, BATCH, 0.0).mean() > 1e-4  # the denoiser is not it


SEGMENTS = segments(even(cosine(), 3))


@both_kinds_of_data
def test_with_segments_the_exact_map_to_each_ones_end_has_no_loss_and_samples_in_so_many(data):
    """Heek et al. 2024, algorithm 1: consistency within each segment of the angles."""

    def student(x_t, t, condition=None, dropout=None):
        a = SEGMENTS(t)
        x0 = implied_x0(x_t, data.flow(x_t, t, a), t, a)
        return torch.where(t[..., None, None, None] > 0, x0, x_t)

    objective = squared(exact_step(data), ends=SEGMENTS)
    assert objective(student, BATCH, 0.0).max() < 1e-16
    assert objective(consistency_function(data), BATCH, 0.0).mean() > 1e-3  # past the ends
    noise = normal(0, 64, 1, 2, 2, dtype=torch.float64)
    x0 = sample(student, iter([noise]), "ddim", even(cosine(), 3))
    close(x0, data.flow(noise, NOISE, DATA), rtol=0, atol=1e-9)


def test_a_border_ends_the_segment_above_it_and_begins_the_one_below():
    for count in (1, 2, 3, 5, 7):  # 5 and 7: borders that differ from the list's in rounding
        borders, angles = even(cosine(), count), even(cosine(), 30 * count)
        ends = segments(borders)(angles[1:])
        close(ends, borders[:-1].repeat_interleave(30), rtol=0, atol=1e-15)


def test_no_step_leaves_its_segment():
    """As tightening pairs would, whose s is 0 at first: there it is the segment's end."""
    taken = []

    def step(batch, x_t, t, s):
        taken.append((t, s))
        return data_step(batch, x_t, t, s)

    wide = tightening(math.pi / 2, 4, LOG_NORMAL)
    squared(step, wide, ends=SEGMENTS)(SKEWED, BATCH, 0.0)
    (t, s), (_, further) = taken[0], wide(BATCH.level, 0.0)
    assert torch.equal(s, torch.maximum(further, SEGMENTS(t)))
    assert (s > further).any()


def test_joined_steps_are_merged_ones_and_at_the_data_end_the_second_alone():
    x0, f = normal(0, 2, 1, 2, 2, dtype=torch.float64), normal(1, 2, 1, 2, 2, dtype=torch.float64)
    t, s, a = torch.tensor([[1.2, 1.5], [0.7, 0.4], [0.3, 0.4]], dtype=torch.float64)
    close(join(x0, f, t, s, a), merge_steps([x0, f], [t, s, a]))
    assert torch.equal(join(x0, f, t, torch.zeros(2).double(), torch.zeros(2).double()), f)


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

    def student(x_t, t, condition, dropout=None):
        return exact(x_t, t) + theta * t.sin()[..., None, None, None] * x_t

    squared(exact_step(data))(student, BATCH, 0.0).mean().backward()
    assert theta.grad * theta > 0


def test_only_the_students_pass_at_t_carries_a_gradient():
    """The target's minus of Song et al. 2023, eq. 7: a stopped gradient, the step's included."""
    theta, scale = (torch.tensor(0.5, requires_grad=True) for _ in range(2))

    def with_theta(theta):
        return lambda x_t, t, condition=None, dropout=None: theta * SKEWED(x_t, t)

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
    assert objective(lambda x_t, *_, **__: 0 * x_t, BATCH, 0.0).mean() > 0.1


@both_kinds_of_data
@pytest.mark.parametrize(("step", "order"), [(euler_step, 2), (heun_step, 3)])
def test_halving_a_step_divides_its_error_by_4_for_euler_and_8_for_heun(data, step, order):
    x_t = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)
    t = torch.full((41,), 1.0, dtype=torch.float64)

    def error(size: float) -> float:
        x_s = rotate(x_t, step(data)(BATCH, x_t, t, t - size), t, t - size)
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
    x_t = add_noise(batch.x0, batch.eps, t)
    x_s = rotate(x_t, data_step(batch, x_t, t, s), t, s)
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


@pytest.mark.parametrize("name", CURRICULA)
def test_a_curriculum_never_coarsens_and_ends_at_its_number(name):
    steps = [CURRICULA[name](37)(k / 1000) for k in range(1000)]
    assert steps == sorted(steps)
    assert steps[-1] == 37


def test_the_root_curriculum_is_song_et_als_number_of_angles():
    """Song et al. 2023, appendix C, with their s0 = 2 and s1 = 150."""
    s0, s1, curriculum = 2, 150, root(150)
    for progress in (0.0, 0.001, 0.25, 0.9999):
        n = math.ceil(math.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
        assert curriculum(progress) + 1 == n


def test_the_doubling_curriculum_spends_equal_shares_on_10_to_1280_steps():
    steps = [doubling(1280)((k + 0.5) / 80) for k in range(80)]
    assert steps == [10 * 2 ** (k // 10) for k in range(80)]


def test_the_targets_decay_rises_with_the_number_of_angles_and_is_constant_with_it():
    """mu(k) = exp(s0 log mu0 / N(k)), Song et al. 2023, appendix C."""
    curriculum = root(150)
    for progress in (0.0, 0.3, 0.99):
        n = curriculum(progress) + 1
        decay = target_decay(0.9, curriculum, progress)
        assert decay == pytest.approx(math.exp(2 * math.log(0.9) / n), rel=1e-12)
    assert target_decay(0.95, fixed(16), 0.7) == 0.95


def test_growing_pairs_are_neighbours_of_the_list_of_the_moment():
    pairs = growing(ANGLES, doubling(40))  # 10, 20, 40
    for progress, count in [(0, 10), (0.33, 10), (0.34, 20), (0.67, 40), (0.9999, 40)]:
        expected = neighbours(even(cosine(), count))(BATCH.level, 0)
        for now, then in zip(pairs(BATCH.level, progress), expected):
            assert torch.equal(now, then)


def test_log_normal_pairs_are_as_frequent_as_the_error_functions_say():
    """Song & Dhariwal 2023, section 3.5: p(i) ~ erf(z_{i+1}) - erf(z_i), z of log sigma_i."""
    angles = even(torch.tensor([0.0, 1.5]), 12)
    t, s = neighbours(angles, LOG_NORMAL.share)(grid_batch(100_000).level, 0.0)
    assert (torch.searchsorted(angles, t) - torch.searchsorted(angles, s) == 1).all()
    frequencies = torch.bincount(torch.searchsorted(angles, s), minlength=12) / len(t)

    def erf(angle):
        return math.erf((math.log(math.tan(angle)) + 0.4) / (2.0 * math.sqrt(2))) if angle else -1

    shares = torch.tensor([erf(b) - erf(a) for a, b in pairwise(angles.tolist())])
    close(frequencies, shares / shares.sum(), rtol=0, atol=2e-5)


def test_a_log_normal_angle_and_its_share_are_inverse():
    proposal = LogNormal(mean=-0.3, std=1.4)
    level = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    close(proposal.share(proposal.tan(level, math.pi / 2).atan()), level, rtol=1e-9, atol=0)


STAGES = 8
LEVELS = grid_batch(1000).level


def stage(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """t and s in the middle of stage 1 to 8."""
    return tightening(math.pi / 2, STAGES, LOG_NORMAL)(LEVELS, (number - 0.5) / STAGES)


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
    t, s = tightening(math.pi / 2, STAGES, LOG_NORMAL)(torch.cat([extremes, LEVELS]), progress)
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


# The data in the teacher's place


def drift(data, gap: float, distance: str) -> torch.Tensor:
    """The mean pull on the exact map at t = 0.8 from its values at s = t - gap, by quadrature.

    Over the x0 that each x_t may come from, of the distance's gradient.
    """
    t = torch.tensor(0.8, dtype=torch.float64)
    x_t = torch.linspace(-1.8, 1.8, 37, dtype=torch.float64).reshape(-1, 1, 1, 1)
    x0 = torch.linspace(-4, 4, 801, dtype=torch.float64).reshape(1, -1, 1, 1)
    prior = data.density(x0, torch.zeros(1, dtype=torch.float64))
    weight = prior * (-((x_t - t.cos() * x0) ** 2) / (2 * t.sin() ** 2)).exp()
    weight = weight / weight.sum(1, keepdim=True)
    x_s = rotate(x_t, x0, t, t - gap)
    exact = consistency_function(data)
    f_s = exact(x_s.reshape(-1, 1, 1, 1), (t - gap).expand(x_s.numel())).reshape(x_s.shape)
    difference = (exact(x_t, t.expand(len(x_t))) - f_s).detach().requires_grad_(True)
    DISTANCES[distance](difference.reshape(-1, 1, 1, 1)).sum().backward()
    return (weight * difference.grad).sum(1)


def test_taught_by_the_data_the_exact_map_is_pulled_less_the_closer_the_pair():
    """Song et al. 2023, theorem 2: a squared distance over a gap d is the teacher's up to o(d)."""
    wide, narrow = (drift(BIMODAL, gap, "squared").square().mean().sqrt() for gap in (0.02, 0.01))
    assert math.log2(wide / narrow) == pytest.approx(2, abs=0.2)
    assert narrow < 2e-3


def test_taught_by_the_data_a_norm_leads_to_a_median_instead():
    """Theorem 2 takes a distance with second derivatives; the norm of one number has none at 0."""
    wide, narrow = (drift(BIMODAL, gap, "l2").square().mean().sqrt() for gap in (0.02, 0.01))
    assert narrow > 0.8 * wide > 0.05


# Modes


def aim(mode: str, **settings):
    """The objective of a mode of the default settings but for these."""
    student = torch.nn.Linear(1, 1)
    return MODES[mode].objective(MODES[mode].Loss(**settings), BIMODAL, student, ANGLES)


def test_ct_has_song_et_als_averaged_target_and_ict_none():
    (average,) = aim("ct").followers.values()
    assert [average.decay(1, progress) for progress in (0.0, 0.99)] == [
        target_decay(0.1, root(80), progress) for progress in (0.0, 0.99)
    ]
    assert aim("ict").followers == {}
    assert aim("ict").target is None


def generations(iterations: int, **settings) -> float:
    """Targets that follow one another in ct's training: what 1 - mu adds up to."""
    (average,) = aim("ct", **settings).followers.values()
    return sum(
        1 - average.decay(done, (done - 1) / iterations) for done in range(1, iterations + 1)
    )


def test_cts_targets_carry_the_data_through_all_its_pairs():
    """A target knows of the data what the one before it knew at the pair below."""
    assert generations(1000) > ct.Loss().num_angles
    assert generations(6400, num_angles=150, target_ema=0.9) < 20  # for 150 pairs


def test_icts_weight_falls_towards_noise_as_sigma_to_the_minus_6_7_and_stays_above_0_there():
    """1 / (tan t - tan s) on Karras' list, whose sigma^(1/7) is even (their eq. 5)."""
    weight = WEIGHTS[ict.Loss().weight]
    angles = karras(1280)[2:]
    ours, theirs = (w(angles[1:], angles[:-1]) for w in (weight, WEIGHTS["sigma-gap"]))
    share = ours / theirs
    close(share, share[:1].expand(len(share)), rtol=0.02, atol=0)
    for count in (10, 160):
        weights = weight(*neighbours(even(cosine(), count))(BATCH.level, 0.0))
        last, middle = weights[-1], weights[len(weights) // 2]
        assert 0.005 < last / middle < 0.2


def test_ects_target_may_be_the_teachers_step():
    batch = grid_batch(8, 1, 2, 2)
    t, s = (torch.full((8,), angle, dtype=torch.float64) for angle in (1.0, 0.8))
    x_t = add_noise(batch.x0, batch.eps, t)
    for solver, step in [("euler", euler_step(BIMODAL)), ("data", data_step)]:
        close(aim("ect", solver=solver).step(batch, x_t, t, s), step(batch, x_t, t, s))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--mode cd --stages 4", "--mode cd has no --stages: it goes with --mode ect"),
        ("--stages=4", "--mode cd has no --stages: it goes with --mode ect"),
        (
            "--mode ect --num-angles 8",
            "--mode ect has no --num-angles: it goes with --mode cd or ct",
        ),
        ("--mode scm --distance l2", "--mode scm has no --distance"),
        ("--mode ct --frechet 1", "--mode ct has no --frechet: it goes with --mode cd or ect"),
        ("--mode cm", "--mode must be one of cd, ct, ict, ect, scm, got cm"),
    ],
)
def test_an_option_of_another_mode_is_refused_in_one_line_that_says_whose_it_is(
    arguments, words, command
):
    outcome = command(main, *arguments.split())
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert words in outcome.err


def test_scm_takes_no_step_but_eulers(command):
    outcome = command(main, "--mode", "scm", "--solver", "heun")
    assert outcome.code == 2
    assert all(word in outcome.err for word in ("heun", "euler", "data"))


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("scm", {"tangent_warmup": 2.0}, "--tangent-warmup must be in [0, 1], got 2"),
        ("ect", {"stages": 0}, "--stages must be at least 1 and at most 100, got 0"),
        ("cd", {"frechet": -1.0}, "--frechet must be at least 0, at most 1e6, got -1"),
        ("cd", {"frechet": 1.0, "segments": 2}, "--frechet goes with --segments 1, got 2"),
        ("cd", {"num_angles": 5, "segments": 2}, "--num-angles must be a multiple of --segments 2"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_trained_with_is_refused(mode, settings, words):
    with pytest.raises(UserError) as error:
        check_loss(MODES[mode].Loss(**settings))
    assert words in str(error.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["--help --mode {}", "--mode {} --help", "--mode={} -h"])
def test_the_help_of_a_mode_shows_its_options_and_no_others(mode, order, command):
    outcome = command(main, *order.format(mode).split())
    assert outcome.code == 0
    every = {field.name for module in MODES.values() for field in fields(module.Loss)}
    listed = {name for name in every if f"--{name.replace('_', '-')} " in outcome.out}
    assert listed == {field.name for field in fields(MODES[mode].Loss)}
    assert MODES[mode].Options.__doc__.split("(")[0].split("\n")[0] in outcome.out


def test_without_a_mode_the_help_shows_cds_options_and_names_every_mode(command):
    outcome = command(main, "--help")
    assert "--num-angles" in outcome.out
    assert "--stages" not in outcome.out
    assert [mode for mode in MODES if f"\n{mode}: " not in outcome.out] == []


SETTINGS = {
    "cd": {
        "solver": "heun",
        "curriculum": "fixed",
        "num_angles": 16,
        "segments": 1,
        "target_ema": 0.95,
        "distance": "l2",
        "weight": "one",
        "frechet": 0.0,
    },
    "ct": {
        "solver": "data",
        "curriculum": "root",
        "num_angles": 80,
        "segments": 1,
        "target_ema": 0.1,
        "distance": "l2",
        "weight": "one",
    },
    "ict": {
        "solver": "data",
        "curriculum": "doubling",
        "num_angles": 160,
        "segments": 1,
        "target_ema": 0.0,
        "distance": "pseudo-huber",
        "weight": "karras",
    },
    "ect": {
        "solver": "data",
        "stages": 4,
        "segments": 1,
        "target_ema": 0.0,
        "distance": "pseudo-huber",
        "weight": "sigma-gap",
        "frechet": 0.0,
    },
    "scm": {"solver": "euler", "tangent_warmup": 0.1},
}
FIT = {
    "iterations": 1, "minutes": None, "batch_size": 256, "learning_rate": 1e-9, "warmup": 100,
    "anneal": "cosine", "ema": 0.999, "clip": 1.0, "weight_decay": 0.0, "precision": "fp32",
    "label_dropout": 0.1, "flip": False, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_runs_settings_are_those_by_which_it_was_recognised_before(mode, teacher, tmp_path):
    """Another key or value, and a run that was begun is refused, and a recipe is another."""
    fit = FitConfig(iterations=1, learning_rate=1e-9, precision="fp32")
    MODES[mode].distill(MODES[mode].Options(teacher=teacher, out=tmp_path, fit=fit))
    settings = checkpoint.load(tmp_path)[1].training["settings"]
    images = ("data", "data_sha256", "images", "net", "parent", "plans", "shift")
    own = {name: value for name, value in settings.items() if name not in images}
    assert own == {"mode": mode, **SETTINGS[mode], **FIT}
    assert settings.keys() - own.keys() == set(images)


@pytest.fixture(scope="module")
def untrained(teacher, quick, tmp_path_factory):
    """(mode, its --start) -> the weights of a run that changes them by next to nothing."""

    def weights(mode: str, start=None) -> dict[str, torch.Tensor]:
        fit = replace(quick, iterations=1, learning_rate=1e-9)
        out, method = tmp_path_factory.mktemp("run"), MODES[mode]
        method.distill(method.Options(teacher=teacher, out=out, fit=fit, start=start))
        return checkpoint.load(out)[0]

    return weights


@pytest.mark.parametrize("mode", MODES)
def test_a_student_starts_from_another_checkpoint_where_told(mode, untrained, teacher, student):
    close(untrained(mode=mode, start=student), checkpoint.load(student)[0], rtol=0, atol=1e-6)


def test_a_student_that_goes_on_from_another_names_it_and_counts_its_images(
    teacher, student, tmp_path, quick
):
    first = checkpoint.load(student)[1]
    options = cd.Options(teacher=teacher, start=student, fit=quick, out=tmp_path / "on")
    card = cd.distill(options).card
    assert card.method == f"{first.method}+consistency-cd"
    spent = quick.iterations * quick.batch_size
    assert card.training["images"] == spent
    assert card.training["total_images"] == spent + first.training["total_images"] > spent


@pytest.mark.parametrize("mode", ["cd", "ect", "scm"])
def test_a_distilled_student_starts_from_its_teacher(mode, untrained, teacher):
    close(untrained(mode=mode), checkpoint.load(teacher)[0], rtol=0, atol=1e-6)


def test_a_start_of_another_network_is_refused(teacher, tmp_path, quick):
    weights, card, _ = checkpoint.load(teacher)
    checkpoint.save(
        tmp_path / "other.safetensors", weights, replace(card, data=card.data | {"name": "others"})
    )
    with pytest.raises(UserError, match=r"other\.safetensors has another network"):
        cd.distill(cd.Options(teacher=teacher, start=tmp_path / "other.safetensors", fit=quick))


@pytest.mark.parametrize(
    ("arguments", "mode"), [("", "cd"), ("--mode ect", "ect"), ("--mode=scm", "scm")]
)
def test_a_mode_trains_by_its_own_preset(monkeypatch, arguments, mode):
    monkeypatch.setattr("sys.argv", ["command", *arguments.split()])
    assert read_command() == (MODES[mode], MODES[mode].PRESETS["digits"])


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_method_has_a_preset_for_each_dataset_and_for_folders(method, gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    for data in ("digits", "fashion-mnist", "cifar10"):
        assert for_data(method.PRESETS, data).fit.minutes is None
    folder = for_data(method.PRESETS, "/home/me/photos").fit
    assert (folder.batch_size, folder.minutes >= 60) == ((128, True) if gpu else (64, False))


def test_the_commands_of_the_documents_are_understood(monkeypatch):
    """Every distill.consistency that README, docs and results show parses."""
    root = Path(__file__).parents[1]
    texts = [root / "README.md", *root.glob("docs/*.md"), *root.glob("results/*/README.md")]
    pattern = r"distill\.consistency((?: +--[a-z]+(?:-[a-z]+)*(?: +[\w./][\w./-]*)?)*)"
    commands = {words for path in texts for words in re.findall(pattern, path.read_text())}
    assert len(commands) > 10
    for words in commands:
        words = words.replace("--help", "")
        monkeypatch.setattr("sys.argv", ["command", *words.split()])
        mode, options = read_command()
        check_loss(options.loss)
        assert isinstance(options, mode.Options)
