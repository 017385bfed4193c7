"""Further metrics: against other implementations, closed forms, and images worse by degrees."""

from itertools import combinations, pairwise, product
from math import lcm

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cleanfid.fid import kernel_distance
from torch import Tensor

from diffusion import data
from diffusion.console import UserError
from eval.measure import sets
from eval.measure.features import random_network
from eval.measure.real import Real


@pytest.fixture(scope="module")
def digits() -> Real:
    """The digits as the harness has them."""
    return Real.sample(data.load("digits"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=seeded(seed))


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> list[float]:
    return list(sets.precision_recall_density_coverage(real, fake, k).values())


# Kernel distance


def test_kernel_distance_is_clean_fids_on_one_subset_of_everything():
    a, b = normal(300, 20).double(), normal(300, 20, 1).double() * 1.2 + 0.1
    theirs = kernel_distance(a.numpy(), b.numpy(), num_subsets=1, max_subset_size=300)
    assert sets.kid(a, b) == pytest.approx(theirs, rel=1e-10)


def test_kernel_distance_of_unequal_counts_is_the_double_loop():
    a, b = normal(9, 3).double(), normal(6, 3, 1).double() + 1

    def mean(pairs) -> float:
        return np.mean([(float(x @ y) / 3 + 1) ** 3 for x, y in pairs])

    own = [
        mean((x[i], x[j]) for i, j in product(range(len(x)), repeat=2) if i != j) for x in (a, b)
    ]
    assert sets.kid(a, b) == pytest.approx(sum(own) - 2 * mean(product(a, b)), rel=1e-12)


def test_kernel_distance_is_unbiased():
    a, b = normal(6, 2).double(), normal(5, 2, 1).double() * 2
    subsets = product(combinations(range(6), 3), combinations(range(5), 2))
    distances = [sets.kid(a[list(i)], b[list(j)]) for i, j in subsets]
    assert np.mean(distances) == pytest.approx(sets.kid(a, b), rel=1e-12)


def test_kernel_distance_of_features_in_float32_is_that_in_float64(digits):
    extract = random_network(digits, torch.device("cpu")).extract
    a, b = (extract(images).detach() for images in (digits.train, digits.test))
    assert sets.kid(a, b) == pytest.approx(sets.kid(a.double(), b.double()), rel=1e-4)


# Inception score


def test_certain_and_evenly_spread_classes_score_their_number():
    assert sets.inception_score(torch.eye(10).repeat(7, 1)) == pytest.approx(10, rel=1e-12)


@pytest.mark.parametrize("row", [[1.0, 0.0, 0.0], [0.2, 0.5, 0.3]])
def test_images_all_alike_score_one(row):
    assert sets.inception_score(torch.tensor([row] * 50)) == pytest.approx(1, rel=1e-12)


def test_score_is_the_exponential_of_the_mean_divergence_from_the_mean():
    p = (normal(200, 7) * 2).double().softmax(1).numpy()
    divergences = (p * np.log(p / p.mean(0))).sum(1)
    expected = np.exp(divergences.mean())
    assert sets.inception_score(torch.from_numpy(p)) == pytest.approx(expected, rel=1e-12)


# Precision, recall, density, coverage


def naive_prdc(real: Tensor, fake: Tensor, k: int) -> list[float]:
    """The papers' definitions, one pair of vectors at a time."""
    real, fake = real.double().numpy(), fake.double().numpy()

    def radius(points, i):
        others = [np.sqrt(((points[i] - p) ** 2).sum()) for j, p in enumerate(points) if j != i]
        return sorted(others)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, i) for i in range(len(fake))]
    gap = np.array([[np.sqrt(((x - y) ** 2).sum()) for y in fake] for x in real])
    in_real = np.array(
        [[gap[i, j] < r for j in range(len(fake))] for i, r in enumerate(real_radii)]
    )
    in_fake = np.array(
        [[gap[i, j] < r for i in range(len(real))] for j, r in enumerate(fake_radii)]
    )
    precision = np.mean([any(in_real[:, j]) for j in range(len(fake))])
    recall = np.mean([any(in_fake[:, i]) for i in range(len(real))])
    density = sum(in_real[:, j].sum() for j in range(len(fake))) / (k * len(fake))
    coverage = np.mean([gap[i].min() < r for i, r in enumerate(real_radii)])
    return [precision, recall, density, coverage]


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("whole", [False, True], ids=["real numbers", "whole numbers, with ties"])
def test_the_four_shares_are_those_of_a_loop_over_all_pairs(k, whole):
    real, fake = normal(70, 3), normal(50, 3, 1) + 1.5
    if whole:
        real, fake = (real * 2).round(), (fake * 2).round()
    expected = naive_prdc(real, fake, k)
    assert prdc(real, fake, k) == pytest.approx(expected, rel=1e-12)
    assert all(0 < share < 1 for share in expected)


def test_a_set_against_itself_has_all_four_at_one():
    x = normal(200, 8)
    assert prdc(x, x) == pytest.approx([1, 1, 1, 1], rel=1e-12)


def test_sets_far_apart_have_all_four_at_nought():
    assert prdc(normal(50, 8), normal(60, 8, 1) + 100) == [0, 0, 0, 0]


def test_one_of_two_clusters_halves_recall_and_coverage_and_keeps_precision():
    left, right = normal(50, 4), normal(50, 4, 1) + 100
    assert prdc(torch.cat([left, right]), left) == pytest.approx([1, 0.5, 1, 0.5], rel=1e-12)
    assert prdc(left, torch.cat([left, right])) == pytest.approx([0.5, 1, 0.5, 1], rel=1e-12)


def test_balls_without_enough_neighbours_are_refused():
    with pytest.raises(UserError, match="more than 5 images, got 9 real and 5 fake"):
        sets.precision_recall_density_coverage(normal(9, 2), normal(5, 2))


# Sliced Wasserstein


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 60), (7, 31), (1, 5)])
def test_in_one_dimension_the_distance_is_that_of_the_repeated_and_sorted_values(n, m):
    a, b = normal(n, 1), normal(m, 1, 1) * 2 + 1
    many = lcm(n, m)
    pairs = (np.sort(np.repeat(x.double().numpy()[:, 0], many // len(x))) for x in (a, b))
    expected = np.mean(np.subtract(*pairs) ** 2)
    assert sets.sliced_wasserstein(a, b, 3, seeded()) == pytest.approx(expected, rel=1e-12)


def test_a_shift_costs_its_square_over_the_dimensions():
    x, shift = normal(100, 16).double(), torch.linspace(-1, 2, 16).double()
    expected = float(shift.square().sum()) / 16
    distance = sets.sliced_wasserstein(x, x + shift, 4000, seeded())
    assert distance == pytest.approx(expected, rel=0.07)  # 3 standard errors of 2^.5 / 4000^.5
    assert sets.sliced_wasserstein(x, x, 10, seeded()) == 0


def test_order_and_repetition_of_the_images_change_no_sliced_distance():
    a, b = normal(50, 8), normal(30, 8, 1)
    again = sets.sliced_wasserstein(a.flip(0).repeat(3, 1), b, 20, seeded())
    assert again == pytest.approx(sets.sliced_wasserstein(a, b, 20, seeded()), rel=1e-12)


# Nearest images and memorisation


def test_the_nearest_image_is_that_of_a_loop(digits):
    images, bank = digits.test[:20], digits.train[:300]
    distance, index = sets.nearest(images, bank)
    for image, d, i in zip(images, distance, index, strict=True):
        rms = [(image.double() - other.double()).square().mean().sqrt() for other in bank]
        assert float(d) == pytest.approx(float(min(rms)), rel=1e-12)
        assert float(rms[i]) == float(min(rms))


def test_a_copy_is_found_at_no_distance_and_a_brighter_one_at_what_was_added():
    bank = torch.randint(0, 200, (300, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    which = torch.randperm(300, generator=seeded(1))[:50]
    for brighter in (0, 3):
        distance, index = sets.nearest(bank[which] + brighter, bank)
        assert distance.tolist() == pytest.approx([brighter] * 50, rel=1e-14)
        assert index.equal(which)


def memorisation(images, train, test) -> dict[str, float]:
    return sets.memorisation(sets.two_nearest(images, train), sets.two_nearest(test, train))


def test_a_copied_training_set_is_flagged(digits):
    figures = memorisation(digits.train[:300], digits.train, digits.test)
    assert (figures["ratio"], figures["nearer"]) == (0, 1)
    assert figures["p_value"] < 1e-50
    assert (figures["copied"], figures["copied_floor"]) == (1, 0)


def test_copies_with_a_little_noise_are_flagged(digits):
    figures = memorisation(noise(digits.train[:300], 8), digits.train, digits.test)
    assert figures["ratio"] < 0.3
    assert figures["p_value"] < 1e-50
    assert figures["copied"] > 0.9


def test_fresh_images_are_flagged_no_more_often_than_the_p_value_says(digits):
    p_values = []
    for seed in range(20):
        fresh, held_out = digits.test[torch.randperm(359, generator=seeded(seed))].split(180)
        figures = memorisation(fresh, digits.train, held_out)
        p_values.append(figures["p_value"])
        assert figures["ratio"] == pytest.approx(1, abs=0.15)
        assert figures["nearer"] == pytest.approx(0.5, abs=0.1)
        assert figures["copied"] <= 0.01
    assert sum(p < 0.05 for p in p_values) <= 3
    assert min(p_values) > 0.001


def test_a_few_copies_among_fresh_images_are_counted_though_the_median_hides_them(digits):
    fresh, held_out = digits.test.split(180)
    figures = memorisation(torch.cat([digits.train[:20], fresh]), digits.train, held_out)
    assert figures["copied"] == pytest.approx(20 / 200)
    assert figures["ratio"] > 0.9


def test_images_far_from_everything_are_no_copies(digits):
    images = torch.randint(0, 256, (100, 1, 8, 8), generator=seeded(), dtype=torch.uint8)
    figures = memorisation(images, digits.train, digits.test)
    assert figures["ratio"] > 2
    assert (figures["nearer"], figures["copied"]) == (0, 0)
    assert figures["p_value"] > 0.999


# Tiles


def test_the_size_of_the_tiles_changes_nothing(monkeypatch, digits):
    a, b = normal(45, 5).double(), normal(38, 5, 1).double() + 0.5
    images, train, test = digits.test[:30], digits.train[:60], digits.test[30:70]

    def everything() -> list[float]:
        return [
            sets.kid(a, b),
            *prdc(a, b),
            sets.sliced_wasserstein(a, b, 20, seeded()),
            *sets.nearest(images, train)[0].tolist(),
            *sets.nearest(images, train)[1].tolist(),
            *memorisation(images, train, test).values(),
        ]

    whole = everything()
    for size in (1, 7):
        monkeypatch.setattr(sets, "TILE", size)
        assert everything() == pytest.approx(whole, rel=1e-9)


# Images made worse by degrees


def noise(images: Tensor, std: float) -> Tensor:
    eps = torch.randn(images.shape, generator=seeded(5))
    return (images + std * eps).round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor, std: float) -> Tensor:
    weights = torch.exp(-torch.arange(-4, 5).square() / (2 * std**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    return F.conv2d(padded, kernel[None, None]).round().to(torch.uint8)


@pytest.fixture(scope="module", params=["random projections", "random network"])
def ladders(request, digits) -> dict[str, list[Tensor]]:
    """Features of half of the digits, and of the other half by degrees of blur, noise, collapse."""
    order = torch.randperm(len(digits.train), generator=seeded())
    half, other = order.split(len(order) // 2)
    images, labels = digits.train[other], digits.train_labels[other]
    axes = normal(64, 16, 1) / 8
    extract = {
        "random projections": lambda images: images.flatten(1).float() / 255 @ axes,
        "random network": random_network(digits, torch.device("cpu")).extract,
    }[request.param]
    worse = {
        "blur": [images] + [blur(images, std) for std in (0.6, 0.8, 1.2, 2)],
        "noise": [images] + [noise(images, std) for std in (32, 64, 128)],
        "collapse": [images[labels < classes] for classes in (10, 6, 4)],
    }
    features = {name: [extract(step) for step in steps] for name, steps in worse.items()}
    return features | {"real": [extract(digits.train[half])]}


@pytest.mark.parametrize("worse", ["blur", "noise", "collapse"])
@pytest.mark.parametrize(
    "distance",
    [
        sets.kid,
        lambda real, fake: sets.sliced_wasserstein(real, fake, 64, seeded()),
    ],
    ids=["kid", "sliced_wasserstein"],
)
def test_every_distance_grows_at_each_step_of_blur_noise_and_collapse(ladders, distance, worse):
    real = ladders["real"][0]
    steps = [distance(real, fake) for fake in ladders[worse]]
    assert all(a < b for a, b in pairwise(steps)), steps


@pytest.mark.parametrize(
    ("worse", "falls"),
    [
        ("blur", ("recall", "coverage")),
        ("noise", ("precision", "density", "coverage")),
        ("collapse", ("recall", "coverage")),
    ],
)
def test_what_each_harm_takes_away_falls_at_each_step(ladders, worse, falls):
    real = ladders["real"][0]
    steps = [sets.precision_recall_density_coverage(real, fake) for fake in ladders[worse]]
    for name in falls:
        shares = [step[name] for step in steps]
        assert all(a >= b for a, b in pairwise(shares)), (name, shares)
        assert shares[-1] < 0.75 * shares[0]
    if worse == "collapse":
        assert all(step["precision"] > 0.9 for step in steps)
