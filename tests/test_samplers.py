import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from diffusion.circle import add_noise
from diffusion.noise import Noise
from diffusion.samplers import SOLVERS, ddim, diffuse, langevin_step, sample
from diffusion.schedules import SCHEDULES, cosine, even, linear_beta, respace, truncated
from tests.analytic import (
    BIMODAL,
    DATA,
    NOISE,
    SKEWED,
    Gaussian,
    Mixture,
    consistency_function,
    normal,
    normals,
)

close = torch.testing.assert_close


def learned(data, share: float = 0.0):
    """The data's denoiser as one that has learnt this share for every variance."""

    def denoise(x_t, t, condition=None, variance=False):
        x0 = data(x_t, t, condition)
        return (x0, torch.full_like(x0, share)) if variance else x0

    return denoise


@dataclass(frozen=True)
class Turned:
    """Two pixels, by 30 degrees from a product of two distributions; noise turns into itself."""

    first: Gaussian | Mixture
    second: Gaussian | Mixture

    def _apply(self, call, x: torch.Tensor) -> torch.Tensor:
        cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
        a, b = x.unbind(-1)
        u, v = (cos * a + sin * b)[..., None], (cos * b - sin * a)[..., None]
        u, v = call(self.first, u)[..., 0], call(self.second, v)[..., 0]
        return torch.stack([cos * u - sin * v, sin * u + cos * v], dim=-1)

    def __call__(self, x_t, t, condition=None):
        return self._apply(lambda data, x: data(x, t), x_t)

    def flow(self, x_t, t, s):
        return self._apply(lambda data, x: data.flow(x, t, s), x_t)


PRODUCT = Turned(BIMODAL, Mixture((0.5, 0.5), (-1.0, 1.0), (0.3, 0.4)))


@pytest.mark.parametrize(
    ("num_steps", "dtype", "tolerance"),
    [
        (1, torch.float32, 1e-6),
        (2, torch.float32, 1e-6),
        (8, torch.float32, 1e-6),
        (63, torch.float32, 1e-6),
        (1000, torch.float32, 1000 * 2**-24),  # a rounding at each step, all to one side at worst
        (1000, torch.float64, 1e-12),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_shrinks_unit_variance_noise_by_the_product_of_its_steps_cosines(
    schedule, num_steps, dtype, tolerance
):
    angles = respace(SCHEDULES[schedule](), num_steps)
    noise = normal(0, 16, 1, 8, 8, dtype=dtype)
    x0 = sample(Gaussian(), iter([noise]), "ddim", angles)
    assert x0.dtype == dtype
    exact = angles.diff().cos().prod() * noise.double()
    close(x0.double(), exact, rtol=tolerance, atol=tolerance)


# Song et al. 2021; Karras et al. 2022, algorithm 1; Lu et al. 2022b, algorithm 2; Zhao et al.
# 2023, theorem 3.1
@pytest.mark.parametrize(
    ("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpm-solver++", 2), ("unipc", 3)]
)
@pytest.mark.parametrize(
    "data", [SKEWED, BIMODAL, PRODUCT], ids=["gaussian", "mixture", "two dimensions"]
)
def test_doubling_the_steps_divides_the_error_by_2_to_the_order(sampler, order, data):
    """The last call, from angle 0.1 to 0, is common to all and no part of the order."""
    first, last = torch.tensor([1.5, 0.1], dtype=torch.float64)
    noise = torch.linspace(-3, 3, 61, dtype=torch.float64).reshape(-1, 1, 1, 1)
    if data is PRODUCT:
        noise = torch.cat([noise, 1.5 * (3 * noise).sin()], dim=-1)
    exact = data(data.flow(noise, first, last), last)

    def error(num_steps: int) -> float:
        angles = torch.linspace(last, first, num_steps, dtype=torch.float64)
        x0 = SOLVERS[sampler].run(data, iter([noise]), torch.cat([DATA[None], angles]))
        return (x0 - exact).square().mean().sqrt().item()

    assert error(512) < 0.01
    assert math.log2(error(256) / error(512)) == pytest.approx(order, abs=0.15)


def amplitudes(sampler: str, angles: torch.Tensor, data: Gaussian) -> torch.Tensor:
    """The factor of each noise in x0, for a Gaussian of mean 0: image k has noise k alone."""
    count = len(angles) - 1
    noise = torch.eye(count, dtype=torch.float64).reshape(count, count, 1, 1, 1)
    return SOLVERS[sampler].run(data, iter(noise), angles).flatten()


@pytest.mark.parametrize("sampler", ["ancestral", "stochastic"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.6])
def test_doubling_the_steps_halves_a_random_samplers_error_in_variance(sampler, scale):
    """Exactly, without a draw."""

    def error(num_steps: int) -> float:
        variance = amplitudes(sampler, even(cosine(), num_steps), Gaussian(0.0, scale))
        return (variance.square().sum() - scale**2).abs().item()

    assert error(400) < 0.05
    assert math.log2(error(200) / error(400)) == pytest.approx(1, abs=0.15)


def test_early_stopped_sampling_ends_with_the_denoiser_at_its_last_angle_on_the_ode():
    noise = torch.linspace(-3, 3, 61, dtype=torch.float64).reshape(-1, 1, 1, 1)
    stop = torch.tensor(0.3, dtype=torch.float64)
    exact = BIMODAL(BIMODAL.flow(noise, NOISE, stop), stop)

    def error(num_steps: int) -> float:
        x0 = sample(BIMODAL, iter([noise]), "truncated", truncated(cosine(), num_steps, 0.3))
        return (x0 - exact).square().mean().sqrt().item()

    assert error(512) < 0.01
    assert math.log2(error(256) / error(512)) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("s", [0.0, 0.4, 1.2])
def test_diffusing_further_is_the_forward_process(s):
    """From x_s of any x0, noise of the right variance; from s = 0, add_noise itself."""
    s, t = torch.tensor([s, 1.4], dtype=torch.float64)
    x0, eps, z = (normal(seed, 3, 1, 2, 2, dtype=torch.float64) for seed in (0, 1, 2))
    none = torch.zeros_like(z)
    close(diffuse(add_noise(x0, none, s), none, s, t), add_noise(x0, none, t))
    kept, added = diffuse(add_noise(none, eps, s), none, s, t), diffuse(none, z, s, t)
    close((kept / eps).square() + (added / z).square(), t.sin().square().expand(3, 1, 2, 2))
    if s == 0:
        close(diffuse(x0, z, s, t), add_noise(x0, z, t))


def test_langevin_steps_keep_a_gaussian_but_for_the_ratios_square():
    """x -> x - e x / V + sqrt(2 e) z, e = 2 r^2 V, has variance V / (1 - r^2) at rest."""
    variance, ratio, noise = 0.25, 0.16, normals(0, 32, 1, 64, 64)
    x = variance**0.5 * next(noise)
    for _ in range(100):
        x = langevin_step(x, -x / variance, next(noise), ratio)
    assert x.var().item() == pytest.approx(variance / (1 - ratio**2), rel=0.01)


def test_a_corrected_image_does_not_depend_on_its_batch():
    angles = even(cosine(), 4)
    both, alone = (Noise(0, torch.tensor(indices), (1, 8, 8)) for indices in ([3, 5], [5]))
    pair = sample(BIMODAL, both, "predictor-corrector", angles)
    close(pair[1:], sample(BIMODAL, alone, "predictor-corrector", angles), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["stochastic", "unipc"])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_in_one_or_two_steps_they_are_samplers_known_by_other_names(sampler, num_steps):
    known = {"stochastic": "consistency", "unipc": "ddim"}[sampler]
    x0 = [
        sample(
            BIMODAL, normals(0, 4, 1, 2, 2, dtype=torch.float64), name, even(cosine(), num_steps)
        )
        for name in (sampler, known)
    ]
    close(*x0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_takes_the_steps_of_song_et_al_with_any_eta(eta):
    """Song et al. 2021, eq. 12 and 16, in alpha-bar."""
    angles = torch.tensor([0.0, 0.1, 0.4, 1.1, 1.5], dtype=torch.float64)
    noise = normals(0, 4, 1, 2, 2, dtype=torch.float64)
    x = next(noise)
    for t, s in pairwise(angles.flip(0)):
        a_t, a_s = t.cos() ** 2, s.cos() ** 2
        x0 = SKEWED(x, t)
        eps = (x - a_t.sqrt() * x0) / (1 - a_t).sqrt()
        sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)).sqrt()
        fresh = next(noise) if eta else 0.0
        x = a_s.sqrt() * x0 + (1 - a_s - sigma**2).clamp(min=0).sqrt() * eps + sigma * fresh
    close(
        ddim(SKEWED, normals(0, 4, 1, 2, 2, dtype=torch.float64), angles, eta), x, rtol=0, atol=1e-6
    )


def test_an_ancestral_step_samples_ddpms_posterior():
    """Ho et al. 2020, eq. 7: from x_t at the last angle of three to x_s at the second."""
    t, s = torch.tensor([1.2, 0.9], dtype=torch.float64)
    a_t, a_s = t.cos() ** 2, s.cos() ** 2
    beta = 1 - a_t / a_s
    x_t, fresh = (normal(seed, 4, 1, 2, 2, dtype=torch.float64) for seed in (0, 1))
    x0 = SKEWED(x_t, t)
    mean = a_s.sqrt() * beta / (1 - a_t) * x0 + (1 - beta).sqrt() * (1 - a_s) / (1 - a_t) * x_t
    x_s = mean + ((1 - a_s) / (1 - a_t) * beta).sqrt() * fresh
    seen = []

    def denoise(x, at):
        seen.append(x)
        return SKEWED(x, at)

    SOLVERS["ancestral"].run(denoise, iter([x_t, fresh]), torch.stack([0 * s, s, t]))
    close(seen[1], x_s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ancestral_steps_of_a_learnt_share_of_0_are_ancestral_steps_bit_for_bit(dtype):
    noises = (normals(0, 4, 1, 2, 2, dtype=dtype) for _ in range(2))
    plain, chosen = (
        sample(learned(BIMODAL), noise, sampler, respace(cosine(), 20))
        for noise, sampler in zip(noises, ("ancestral", "ancestral-learned"), strict=True)
    )
    assert torch.equal(chosen, plain)


@pytest.mark.parametrize("share", [-0.5, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("t", [1.2, math.pi / 2])
def test_a_learnt_variance_lies_between_beta_and_the_posteriors_in_its_logarithm(t, share):
    """Nichol & Dhariwal 2021, eq. 15, in alpha-bar: the step's second noise alone differs."""
    t, s = torch.tensor([t, 0.9], dtype=torch.float64)
    a_t, a_s = t.cos() ** 2, s.cos() ** 2
    beta = 1 - a_t / a_s
    posterior = (1 - a_s) / (1 - a_t) * beta
    x_t, fresh = (normal(seed, 4, 1, 2, 2, dtype=torch.float64) for seed in (0, 1))
    mean = a_s.sqrt() * beta / (1 - a_t) * SKEWED(x_t, t)
    mean += (1 - beta).sqrt() * (1 - a_s) / (1 - a_t) * x_t
    x_s = mean + (share * beta.log() + (1 - share) * posterior.log()).div(2).exp() * fresh
    x = SOLVERS["ancestral-learned"].run(
        learned(SKEWED, share), iter([x_t, fresh]), torch.stack([0 * s, s, t])
    )
    close(x, SKEWED(x_s, s), rtol=0, atol=1e-12)


def test_ancestral_sampling_gives_back_the_datas_mean_and_variance():
    """Within 5 standard errors, and the 2% that 250 steps of the posterior's variance leave out."""
    count = 50_000
    noise = Noise(0, torch.arange(count), (1, 1, 1))
    x0 = sample(SKEWED, noise, "ancestral", respace(cosine(), 250)).double()
    assert x0.mean().item() == pytest.approx(0.3, abs=5 * 0.5 / math.sqrt(count))
    assert x0.var().item() == pytest.approx(0.25, rel=0.02 + 5 * math.sqrt(2 / count))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_an_exact_consistency_function_samples_its_data_in_any_number_of_steps(num_steps):
    """Kolmogorov and Smirnov's distance, below 2.23 / sqrt(n) with probability 1 - 1e-4."""
    count = 20_000
    noise = Noise(0, torch.arange(count), (1, 1, 1))
    angles = even(cosine(), num_steps)
    x0 = sample(consistency_function(BIMODAL), noise, "consistency", angles)
    quantiles = BIMODAL.cdf(x0, DATA).flatten().sort().values
    ranks = (torch.arange(count) + 0.5) / count
    assert (quantiles - ranks).abs().max() < 2.23 / math.sqrt(count)


def calls_of(sampler: str, angles: torch.Tensor) -> int:
    """How often the sampler calls the denoiser."""
    calls = []

    def denoise(x_t, t, condition, variance=False):
        calls.append(t)
        return learned(SKEWED)(x_t, t, condition, variance)

    sample(denoise, normals(0, 2, 1, 1, 1), sampler, angles)
    return len(calls)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_each_sampler_calls_the_network_as_often_as_it_claims(sampler, num_steps):
    claimed = SOLVERS[sampler].calls(num_steps)
    assert claimed == (
        2 * num_steps - 1 if sampler in ("heun", "predictor-corrector") else num_steps
    )
    assert calls_of(sampler, even(cosine(), num_steps)) == claimed


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 17, 64])
@pytest.mark.parametrize("schedule", [linear_beta, cosine])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_spends_its_budget_of_calls_and_never_more(solver, schedule, nfe):
    angles = SOLVERS[solver].angles(schedule(), nfe)
    assert angles.diff().min() > 0
    twice = solver in ("heun", "predictor-corrector")
    assert calls_of(solver, angles) == (nfe - 1 + nfe % 2 if twice else nfe)


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - {"consistency"}))
@pytest.mark.parametrize("schedule", [linear_beta, cosine])
def test_every_solver_goes_from_noise_to_nearly_where_the_ode_or_its_data_is(solver, schedule):
    """The Gaussian's standard deviation, on the angles that the solver chooses for 64 calls."""
    angles = SOLVERS[solver].angles(schedule(), 64)
    x0 = sample(learned(SKEWED), Noise(0, torch.arange(64), (1, 8, 8)), solver, angles)
    assert x0.std().item() == pytest.approx(0.5, rel=0.12)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_every_call_gets_the_condition_and_no_call_a_gradient(sampler):
    condition, scale = {"label": torch.tensor([3, 1])}, torch.ones((), requires_grad=True)

    def denoise(x_t, t, given, variance=False):
        assert given is condition
        return learned(lambda x_t, t, condition: scale * SKEWED(x_t, t))(x_t, t, given, variance)

    x0 = sample(denoise, normals(0, 2, 1, 1, 1), sampler, even(cosine(), 3), condition)
    assert not x0.requires_grad


def test_the_skewed_gaussians_ode_ends_where_ddim_in_a_thousand_steps_does():
    noise = normal(0, 16, 1, 2, 2, dtype=torch.float64)
    x0 = sample(SKEWED, iter([noise]), "ddim", cosine())
    close(x0, SKEWED.flow(noise, NOISE, DATA), rtol=0, atol=0.01)


@pytest.mark.parametrize("schedule", ["vp", "sub-vp", "ve"])
def test_predictor_and_corrector_reverse_the_sde_to_the_datas_moments(schedule):
    """Within 5 standard errors, and 3% in deviation, of which Langevin steps leave 1.3%."""
    images, pixels = 64, 256
    noise, angles = Noise(0, torch.arange(images), (1, 16, 16)), SCHEDULES[schedule]()
    x0 = sample(SKEWED, noise, "predictor-corrector", respace(angles, 200)).double()
    error = SKEWED.scale / math.sqrt(images * pixels)
    # VE ends at 50 data deviations of noise, from where x0 is still seen a little
    assert x0.mean().item() == pytest.approx(SKEWED.mean, abs=5 * error + 0.01)
    assert x0.std().item() == pytest.approx(SKEWED.scale, rel=0.03 + 5 * error)
