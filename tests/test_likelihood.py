"""Bits per dimension: against closed-form densities, exact sums, and data of known entropy."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise, repeat

import pytest
import torch
from analytic import BIMODAL, NOISE, SKEWED, Gaussian, normal, normals, random_denoiser
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from diffusion import codec
from diffusion.checkpoint import Card
from diffusion.circle import FROM_X0, add_noise
from diffusion.codec import Scale
from diffusion.condition import Condition, Label, to_json
from diffusion.console import UserError
from diffusion.data import ImageSpec
from diffusion.denoiser import Denoiser
from diffusion.model import Model
from diffusion.noise import Noise
from diffusion.plan import plan
from diffusion.schedules import cosine, karras, linear_beta
from eval.measure.likelihood import (
    bits_per_dim,
    diffusion_cost,
    flow_angles,
    flow_log_density,
    log_levels,
    log_normal,
    offsets,
)

DOUBLE = torch.float64
FIRST = torch.tensor(0.01, dtype=DOUBLE)
FAR = torch.tensor(1.4, dtype=DOUBLE)


def signs(seed: int, *shape: int):
    return (draw.sign() for draw in normals(seed, *shape, dtype=DOUBLE))


# The decoder


@pytest.mark.parametrize("centre", [-900.0, -0.5, 0.0, 127.3, 255.5, 4000.0])
@pytest.mark.parametrize("deviation", [1e-3, 0.6, 20.0, 500.0])
def test_the_decoders_256_probabilities_sum_to_one(centre, deviation):
    levels = torch.arange(256, dtype=torch.uint8)
    log_masses = log_levels(
        levels, torch.full((256,), centre, dtype=DOUBLE), torch.tensor(deviation)
    )
    assert log_masses.isfinite().all()
    assert log_masses.logsumexp(0).item() == pytest.approx(0, abs=1e-12)


def test_the_decoders_probability_is_the_mass_within_half_a_level():
    levels = torch.tensor([0, 3, 7, 255], dtype=torch.uint8)
    centre = torch.tensor([1.2, 4.0, 6.6, 250.0], dtype=DOUBLE)
    gaussian = Normal(centre, 2.5)
    low, high = gaussian.cdf(levels.double() - 0.5), gaussian.cdf(levels.double() + 0.5)
    low[0], high[-1] = 0, 1
    log_masses = log_levels(levels, centre, torch.tensor(2.5))
    torch.testing.assert_close(log_masses, (high - low).log(), rtol=1e-10, atol=0)


def test_the_decoder_is_exact_where_its_probability_underflows():
    images, deviation = torch.tensor([100, 156], dtype=torch.uint8), torch.tensor(1.0)
    centre = torch.tensor([200.0, 56.0], dtype=DOUBLE)
    z = 99.5  # of the nearer edge; Mills' ratio gives the tail, and the farther edge adds nothing
    expected = -(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)) - 1 / z**2
    torch.testing.assert_close(
        log_levels(images, centre, deviation),
        torch.full((2,), expected, dtype=DOUBLE),
        rtol=1e-9,
        atol=0,
    )


# The probability flow


@pytest.mark.parametrize("data", [Gaussian(), SKEWED, Gaussian(-1.0, 1.7), Gaussian(0.4, 0.02)])
@pytest.mark.parametrize("last", [NOISE, FAR])
def test_flow_gives_the_density_of_a_gaussian(data, last):
    """The density of N(0, I) at the last angle, taken back along the exact flow."""
    x = add_noise(
        data.mean + data.scale * normal(0, 5, 1, 3, 3, dtype=DOUBLE),
        normal(1, 5, 1, 3, 3, dtype=DOUBLE),
        FIRST,
    )
    (_, before), (_, after) = data._marginal(FIRST), data._marginal(last)
    stretched = 9 * (after / before).log().item()
    expected = log_normal(data.flow(x, FIRST, last)) + stretched
    log_density = flow_log_density(data, x, flow_angles(FIRST, last, 24), signs(2, 5, 1, 3, 3))
    torch.testing.assert_close(log_density, expected, rtol=0, atol=9e-4)


def correlated() -> tuple[MultivariateNormal, Callable]:
    """Four pixels of full covariance, and E[x0 | x_t]."""
    root = normal(3, 4, 4, dtype=DOUBLE)
    covariance = root @ root.T / 4 + 0.05 * torch.eye(4, dtype=DOUBLE)
    mean, eye = normal(4, 4, dtype=DOUBLE), torch.eye(4, dtype=DOUBLE)

    def denoise(x_t, t, condition=None):
        cos, sin = t.cos(), t.sin()
        gain = cos * covariance @ torch.linalg.inv(cos**2 * covariance + sin**2 * eye)
        return (mean + (x_t.flatten(1) - cos * mean) @ gain.T).reshape(x_t.shape)

    cos, sin = FIRST.cos(), FIRST.sin()
    return MultivariateNormal(cos * mean, cos**2 * covariance + sin**2 * eye), denoise


def exact_trace(denoise: Callable, z: Tensor, angles: Tensor) -> Tensor:
    """Probes along every axis, in a batch: their mean is the trace itself."""
    dim = z[0].numel()
    axes = dim**0.5 * torch.eye(dim, dtype=z.dtype).reshape(dim, *z.shape[1:])
    probes = repeat(axes.repeat(len(z), 1, 1, 1))
    return (
        flow_log_density(denoise, z.repeat_interleave(dim, 0), angles, probes)
        .reshape(-1, dim)
        .mean(1)
    )


def test_flow_gives_the_density_of_correlated_pixels():
    marginal, denoise = correlated()
    z = marginal.sample((6,)).reshape(6, 1, 2, 2)
    log_density = exact_trace(denoise, z, flow_angles(FIRST, NOISE, 24))
    torch.testing.assert_close(log_density, marginal.log_prob(z.flatten(1)), rtol=0, atol=4e-4)


def test_random_probes_are_right_on_average():
    marginal, denoise = correlated()
    z, angles = marginal.mean.reshape(1, 1, 2, 2), flow_angles(FIRST, NOISE, 8)
    many = flow_log_density(denoise, z.expand(2000, 1, 2, 2), angles, signs(0, 2000, 1, 2, 2))
    error = many.mean() - exact_trace(denoise, z, angles)
    assert many.std() > 0.1
    assert error.abs() < 4 * many.std() / 2000**0.5


@pytest.mark.parametrize("last", [NOISE, torch.tensor(1.57, dtype=DOUBLE)])
def test_flow_gives_the_density_of_a_mixture(last):
    z = torch.linspace(-2.5, 1.8, 60, dtype=DOUBLE).reshape(60, 1, 1, 1)
    density, *_, score = BIMODAL._components(z, FIRST)
    expected = (density.log() - score**2 / 2).logsumexp(-1).flatten() - math.log(2 * math.pi) / 2
    log_density = flow_log_density(
        BIMODAL, z, flow_angles(FIRST, last, 24), repeat(torch.ones(1, 1, 1, 1))
    )
    torch.testing.assert_close(log_density, expected, rtol=1e-3, atol=1e-3)


def test_twice_the_steps_leave_a_sixteenth_of_the_error():
    z = torch.linspace(-2, 1.5, 40, dtype=DOUBLE).reshape(40, 1, 1, 1)
    one = torch.ones(1, 1, 1, 1)
    exact, *estimates = (
        flow_log_density(BIMODAL, z, flow_angles(FIRST, NOISE, steps), repeat(one))
        for steps in (640, 40, 80, 160)
    )
    errors = [(log_density - exact).square().mean().sqrt().item() for log_density in estimates]
    for coarse, fine in pairwise(errors):
        assert 11 < coarse / fine < 23


# The variational bound


def exact_cost(data: Gaussian, x0: Tensor, angles: Tensor) -> Tensor:
    """The sum of every step's expected divergence, pixel by pixel, for the ideal denoiser."""
    s, t = angles[1:-1], angles[2:]
    q = Normal(x0[..., None] * angles[-1].cos(), angles[-1].sin())
    prior = kl_divergence(q, Normal(torch.zeros((), dtype=DOUBLE), 1.0)).squeeze(-1)
    slope = data.scale**2 * t.cos() / (t.cos() ** 2 * data.scale**2 + t.sin() ** 2)
    off = (1 - slope * t.cos()) * (x0[..., None] - data.mean)
    error = off**2 + (slope * t.sin()) ** 2
    return prior + ((s.tan() ** -2 - t.tan() ** -2) / 2 * error).sum(-1)


def exact_divergence(data: Gaussian, x0: Tensor, t: Tensor) -> Tensor:
    """E_q[log q(z | x0) - log p(z)] for the data's own p, pixel by pixel."""
    variance = t.cos() ** 2 * data.scale**2 + t.sin() ** 2
    distance = t.cos() ** 2 * (x0 - data.mean) ** 2 + t.sin() ** 2
    return (variance.log() + distance / variance - 1) / 2 - t.sin().log()


def cost(denoise: Callable, x0: Tensor, angles: Tensor) -> Tensor:
    indices = torch.arange(len(x0))
    noise = Noise(0, indices, x0.shape[1:])
    return diffusion_cost(denoise, x0, angles, noise, offsets(0, indices))


@pytest.mark.parametrize("angles", [cosine(), linear_beta(), karras(), cosine()[:800], cosine(2)])
@pytest.mark.parametrize("data", [SKEWED, Gaussian(-1.0, 1.7)])
def test_drawn_steps_estimate_the_sum_over_all(data, angles):
    x0 = torch.full((4000, 1, 2, 2), 0.8, dtype=DOUBLE)
    costs = cost(data, x0, angles)
    expected = exact_cost(data, x0[:1], angles).sum()
    assert (costs.mean() - expected).abs() < 4 * costs.std() / 4000**0.5 + 1e-9


@pytest.mark.parametrize("angles", [cosine(), cosine()[:800], cosine(40), karras(10)])
def test_images_between_them_draw_every_step_by_its_weight(angles):
    """With an error that is no matter of chance, nothing else is random."""
    x0, s, t = torch.full((5000, 1, 1, 1), 0.8, dtype=DOUBLE), angles[1:-1], angles[2:]
    q = Normal(0.8 * angles[-1].cos(), angles[-1].sin())
    error = (t.sin() * (1 + 3 * t)) ** 2
    expected = kl_divergence(q, Normal(torch.zeros_like(q.mean), 1.0))
    expected += ((s.tan() ** -2 - t.tan() ** -2) / 2 * error).sum()
    costs = cost(lambda x_t, t: x0 + (t.sin() * (1 + 3 * t))[:, None, None, None], x0, angles)
    assert costs.mean() == pytest.approx(expected.item(), rel=5e-4)


def test_images_share_the_steps_out_evenly_and_each_seed_starts_elsewhere():
    every = offsets(0, torch.arange(1000))
    for count in (10, 100, 1000):
        places = every[:count].sort().values
        around = torch.cat([places, 1 + places[:1]]).diff()
        assert around.min() > 0
        assert around.max() < 2 / count
    assert torch.equal(every[[700, 3]], offsets(0, torch.tensor([700, 3])))
    starts = torch.cat([offsets(seed, torch.tensor([5])) for seed in range(1000)]).sort().values
    assert (starts - torch.linspace(0, 1, 1000)).abs().max() < 2 / 1000**0.5  # Kolmogorov, p < 1e-3


def test_the_variational_bound_lies_above_and_closes_in_with_more_steps():
    data = SKEWED
    x0 = data.mean + data.scale * normal(0, 40_000, 1, 2, 2, dtype=DOUBLE)
    truth, gaps = exact_divergence(data, x0, FIRST).sum((1, 2, 3)), []
    for num_steps in (50, 200, 1000):
        angles = torch.cat([FIRST.new_zeros(1), flow_angles(FIRST, NOISE, num_steps)])
        gap = cost(data, x0, angles) - truth
        gaps.append(gap.mean().item())
        assert gaps[-1] > 3 * gap.std() / len(gap) ** 0.5
    assert gaps[1] < gaps[0] / 3
    assert gaps[2] < gaps[1] / 3


# Both, of whole images


@dataclass(frozen=True)
class Atoms:
    """Data that is one of K images, all as likely: (K, C, H, W) uint8, and their denoiser.

    Told the label k, it knows which one.
    """

    images: Tensor
    shift: float = 0.0
    """An error of its x0, in standard deviations of the data."""

    @property
    def spec(self) -> ImageSpec:
        channels, size, _ = self.images.shape[1:]
        return ImageSpec("atoms", channels, size)

    @property
    def codec(self) -> Scale:
        levels = self.images.double()
        return Scale(levels.mean().item(), levels.std(correction=0).item())

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        atoms = (self.images.double() - self.codec.mean).flatten(1) / self.codec.std
        if condition is not None:
            return atoms[condition["label"]].reshape(x_t.shape) + self.shift
        cos, sin = t.double().cos()[:, None], t.double().sin()[:, None]
        inner = cos * (x_t.double().flatten(1) @ atoms.T) - cos**2 * atoms.square().sum(1) / 2
        share = (inner / sin**2).softmax(1)
        return (share @ atoms).reshape(x_t.shape) + self.shift


class Velocity(nn.Module):
    """The network whose denoiser is that function."""

    def __init__(self, denoise: Callable):
        super().__init__()
        self.denoise, self.device = denoise, nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        return FROM_X0["v"](x_t, self.denoise(x_t, t, condition), t).float()


def card_of(spec: ImageSpec, scale: Scale, angles: Tensor, kinds: dict) -> Card:
    """A teacher's, of a network that no card describes."""
    return Card(
        method="teacher",
        plans=(plan("ancestral", angles),),
        abilities=(),
        net={},
        denoiser={},
        condition=to_json(kinds),
        codec=codec.to_json(scale),
        data=asdict(spec),
    )


def model(data: Atoms, angles: Tensor | None = None) -> Model:
    angles = cosine() if angles is None else angles
    kinds = {"label": Label(len(data.images))}
    card = card_of(data.spec, data.codec, angles, kinds)
    return Model(Denoiser(Velocity(data), kinds=kinds), card, "")


def atoms(count: int, size: int, shift: float = 0.0) -> Atoms:
    """Far apart from each other, and none of their pixels at an end of the scale."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 255, (count, 1, size, size), generator=generator)
    return Atoms(images.to(torch.uint8), shift)


GREYS = Atoms(torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1))


def measured(data: Atoms, repeats: int, labels: Tensor | None = None, angles=None) -> list[float]:
    """Both bounds and both errors."""
    condition = None if labels is None else {"label": labels}
    figures = bits_per_dim(model(data, angles), data.images.repeat(repeats, 1, 1, 1), condition)
    assert figures["images"] == repeats * len(data.images)
    return [figures[name + end] for end in ("", "-error") for name in NAMES]


NAMES = ("variational-bound", "probability-flow")


def test_one_pixel_of_any_grey_takes_eight_bits():
    """A little more by the flow, whose decoder is no exact posterior, half a bit by 1000 steps."""
    variational, flow, variational_error, flow_error = measured(GREYS, 8)
    assert flow - 3 * flow_error > 8
    assert flow < 8.06
    assert flow < variational - 3 * variational_error
    assert variational < 8.7


@pytest.mark.parametrize("angles", [cosine(), karras(), linear_beta(), cosine(100)])
@pytest.mark.parametrize(("count", "size"), [(2, 2), (64, 2), (500, 3)])
def test_bits_are_the_datas_entropy_and_the_decoders_rounding(count, size, angles):
    data = atoms(count, size)
    entropy = math.log2(count) / size**2
    rounding = -math.log2(math.erf(0.5 / (angles[1].sin() * data.codec.std * math.sqrt(2))))
    variational, flow, variational_error, flow_error = measured(
        data, -(-500 // count), None, angles
    )
    assert abs(flow - entropy - rounding) < 4 * flow_error
    assert variational > entropy + rounding - 3 * variational_error


def test_a_wrong_mean_takes_more_bits():
    right, off, farther = (measured(atoms(64, 2, shift), 4)[:2] for shift in (0, 0.003, 0.01))
    for small, middle, large in zip(right, off, farther):
        assert small + 0.05 < middle < large - 0.05


def test_bits_that_the_label_tells_are_not_paid_for():
    data = atoms(64, 2)
    without, labelled = measured(data, 8), measured(data, 8, torch.arange(64).repeat(8))
    for i in (0, 1):
        error = math.hypot(without[i + 2], labelled[i + 2])
        assert without[i] - labelled[i] == pytest.approx(math.log2(64) / 4, abs=4 * error)


def test_the_batch_size_changes_only_the_rounding(digits):
    shape = {"width": 8, "multipliers": (1,), "blocks": 1, "attention": ()}
    denoiser = random_denoiser(num_classes=10, **shape).eval().requires_grad_(False)
    card = card_of(digits.spec, digits.codec, cosine(20), denoiser.kinds)
    conditional = Model(denoiser, card, "")
    images, labels = digits.test.take(torch.arange(9))
    parts, whole = (bits_per_dim(conditional, images, labels, 3, size) for size in (7, 64))
    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole != pytest.approx(bits_per_dim(conditional, images, None, 3), rel=1e-5)
    assert whole != pytest.approx(bits_per_dim(conditional, images, labels, 4), rel=1e-5)


@pytest.mark.parametrize(
    ("images", "angles", "message"),
    [
        (torch.zeros(3, 1, 2, 2), cosine(), "uint8 .* got torch.float32"),
        (
            torch.zeros(3, 3, 2, 2, dtype=torch.uint8),
            cosine(),
            r"\(1, 2, 2\), got .*\(3, 3, 2, 2\)",
        ),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), cosine(), "2 or more"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), cosine(1), "2 or more steps, got one of 1"),
    ],
)
def test_what_has_no_likelihood_is_refused(images, angles, message):
    with pytest.raises(UserError, match=message):
        bits_per_dim(model(atoms(4, 2), angles), images, None)
