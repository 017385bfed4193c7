"""Intervals against Gaussians whose distance is known, and against real images."""

import pytest
import torch
from torch import Tensor

from diffusion import data
from eval.measure import features, intervals
from eval.measure.intervals import Estimate, distance_interval, pooled, uncertainty
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.real import Real
from eval.measure.seen import KEPT
from eval.results.records import Uncertainty

CPU = torch.device("cpu")


def gaussian(std: Tensor, count: int = 10**9) -> Moments:
    """The moments of a Gaussian of mean 0 and these standard deviations, as of so many images."""
    return Moments(count, torch.zeros(len(std)).double(), torch.diag(std.double() ** 2) * count)


def shifted(std: Tensor, scale: float, shift: float, count: int, random: torch.Generator) -> Tensor:
    x = torch.randn(count, len(std), generator=random) * std * scale
    return x + shift * (torch.arange(len(std)) == 0)


@pytest.mark.parametrize(
    ("dim", "count", "shift", "scale"),
    [(4, 400, 0.3, 1.1), (16, 600, 0.0, 1.0), (16, 600, 0.1, 1.0), (32, 400, 0.5, 0.8)],
)
def test_the_interval_holds_the_distance_of_two_gaussians_95_times_of_100(dim, count, shift, scale):
    """Less the bias the distance itself, in closed form; as it is, the mean over many trials."""
    std = torch.exp(-torch.arange(dim) * 4 / dim)
    real, trials = gaussian(std), 1000
    random = torch.Generator().manual_seed(dim)
    measured, known = [], []
    for _ in range(trials):
        x = shifted(std, scale, shift, count, random)
        fake = Moments.of(x)
        measured.append(frechet_distance(fake, real))
        known.append(uncertainty(x[:200], fake, real))
    distance, expected = (
        shift**2 + float((std * (1 - scale)).square().sum()),
        sum(measured) / trials,
    )
    held = [0, 0]
    for value, one in zip(measured, known, strict=True):
        low, high = distance_interval(value, one)
        held[0] += low - one.bias <= distance <= high - one.bias
        held[1] += low <= expected <= high
    assert all(0.93 <= count / trials <= 0.97 for count in held), held
    bias = sum(one.bias for one in known) / trials
    assert bias == pytest.approx(expected - distance, abs=0.2 * bias + 3 * _error(measured))


def _error(values: list[float]) -> float:
    return float(torch.tensor(values).std()) / len(values) ** 0.5


def test_two_models_of_one_noise_are_parted_by_their_difference_and_their_ratio():
    """The interval of a difference holds the true one 95 times of 100, and so does the ratio's; as
    the two share their noise, both are narrower than of two models of different noise."""
    std, random = torch.exp(-torch.arange(8) / 2.0), torch.Generator().manual_seed(1)
    real, trials, held, narrower = gaussian(std), 300, [0, 0], 0
    pairs, known = [], []
    for _ in range(trials):
        noise = shifted(std, 1.0, 0.0, 500, random)
        models = [
            noise * 1.3 + 0.3,
            noise * 1.2 + 0.25 + 0.1 * torch.randn(500, 8, generator=random),
        ]
        moments = [Moments.of(x) for x in models]
        pairs.append([frechet_distance(fake, real) for fake in moments])
        known.append([uncertainty(x[:250], f, real) for x, f in zip(models, moments, strict=True)])
    a_mean, b_mean = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
    for values, each in zip(pairs, known, strict=True):
        a, b = (Estimate(v, u.variance, u.influence) for v, u in zip(values, each, strict=True))
        low, high = a.less(b).interval()
        held[0] += low <= a_mean - b_mean <= high
        ratio = intervals.ratio_interval(a, b)
        held[1] += ratio[0] <= a_mean / b_mean <= ratio[1]
        alone = intervals.ratio_interval(Estimate(a.value, a.variance, []), b)
        narrower += ratio[1] - ratio[0] < 0.9 * (alone[1] - alone[0])
    assert all(0.915 <= count / trials <= 0.985 for count in held), held
    assert narrower == trials


def test_a_ratio_to_what_may_be_nothing_has_no_bounded_interval():
    a, b = Estimate(2.0, 0.01, []), Estimate(1.0, 1.0, [])
    assert intervals.ratio_interval(a, b) is None
    sharp = intervals.ratio_interval(a, Estimate(1.0, 0.0, []))
    assert sharp == pytest.approx(Estimate(2.0, 0.01, []).interval())
    above = intervals.ratio_interval(a, Estimate(1.5, 0.0, []), Estimate(1.0, 0.0, []))
    assert above == pytest.approx([2 * (end - 1) for end in sharp])


def test_trainings_are_a_random_effect_and_their_common_noise_is_added():
    """Over many draws of a training's effect and of the noise that all share, the interval of
    three trainings holds the mean 95 times of 100."""
    random, held, trials = torch.Generator().manual_seed(0), 0, 1500
    for _ in range(trials):
        common = torch.randn(intervals.BLOCKS, generator=random)
        each = []
        for _ in range(3):
            own = torch.randn(intervals.BLOCKS, generator=random)
            effect = 0.3 * torch.randn(1, generator=random)
            # influences of the blocks, whose mean is the error of the figure
            blocks = common + 0.5 * own
            value = float(effect + blocks.mean() * intervals.BLOCKS**0.5)
            blocks = blocks.double() - blocks.double().mean()
            each.append(Estimate(value, float(blocks.var()), blocks.tolist()))
        low, high = intervals.of_trainings(each).interval()
        held += low <= 0 <= high
    assert 0.93 <= held / trials <= 0.97, held / trials


def test_seeds_are_so_many_more_images():
    one = Uncertainty(0.1, 0.004, 0.001, 0.01, [0.05, -0.05])
    (low, high), (few_low, few_high) = (
        distance_interval(1, known) for known in (pooled([one] * 4), one)
    )
    assert high - low == pytest.approx((few_high - few_low) / 2, rel=0.05)
    assert pooled([one] * 4).bias == one.bias


def test_the_jackknife_gives_a_means_and_a_variances_standard_errors():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    errors = intervals.jackknife(
        lambda i: {"mean": float(x[i].mean()), "var": float(x[i].var())}, 1000
    )
    # twenty groups know a standard deviation to a sixth
    assert errors["mean"] == pytest.approx(1000**-0.5, rel=0.5)
    assert errors["var"] == pytest.approx((2 / 1000) ** 0.5, rel=0.5)


def test_the_interval_of_disjoint_sets_of_real_images_holds_their_mean(tmp_path):
    """Twenty sets of 150 of Fashion-MNIST in a classifier's features."""
    real = Real.sample(data.load("fashion-mnist"))
    few = Real(real.spec, real.train[:3000], real.test[:3000], {"label": real.train_labels[:3000]},
               {"label": real.test_labels[:3000]}, 10, 3000)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STEPS", 60)
        own = features.classifier(few, CPU, tmp_path)
    reference, pool = (
        torch.cat([own.extract(x) for x in images.split(1000)]) for images in (few.train, few.test)
    )
    inside = disjoint(Moments.of(reference), pool, 20, 150)
    assert inside >= 17, inside


def disjoint(real: Moments, pool: Tensor, sets: int, size: int) -> int:
    """How many of so many disjoint sets of the pool have an interval that holds the mean."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    parts = [pool[which] for which in order[: sets * size].split(size)]
    moments = [Moments.of(part) for part in parts]
    distances = [frechet_distance(fake, real) for fake in moments]
    mean, inside = sum(distances) / sets, 0
    for part, fake, distance in zip(parts, moments, distances, strict=True):
        low, high = distance_interval(distance, uncertainty(part[: KEPT["features"]], fake, real))
        inside += low <= mean <= high
    return inside
