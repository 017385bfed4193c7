import math
from itertools import islice

import pytest
import torch

from diffusion.noise import Noise, seed32

SHAPE = (3, 8, 8)


def draws(seed: int, indices: torch.Tensor, count: int = 2) -> list[torch.Tensor]:
    return list(islice(Noise(seed, indices, SHAPE), count))


@pytest.mark.parametrize("batch_size", [1, 7, 64, 512])
def test_an_image_is_the_same_bit_for_bit_at_any_batch_size(batch_size):
    indices = torch.arange(1024)
    parts = [draws(5, part) for part in indices.split(batch_size)]
    for k, together in enumerate(draws(5, indices)):
        assert torch.equal(torch.cat([part[k] for part in parts]), together)


def test_an_image_is_the_same_bit_for_bit_in_any_order():
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    for shuffled, straight in zip(draws(5, order), draws(5, torch.arange(512))):
        assert torch.equal(shuffled, straight[order])


def test_a_far_index_and_a_large_seed_have_noise_of_their_own():
    far = draws(2**62, torch.tensor([10**12, 10**12 + 1]), 1)[0].flatten(1)
    assert correlation(far[0], far[1]) < 5 / math.sqrt(far[0].numel())


def test_every_bit_of_a_seed_changes_the_noise_and_a_generators_seed():
    seeds = [0, *(1 << bit for bit in range(63))]
    noise = torch.stack([draws(seed, torch.arange(1), 1)[0].flatten() for seed in seeds])
    assert len(noise.unique(dim=0)) == 64
    assert len({seed32(seed) for seed in seeds}) == 64


def test_seeds_of_32_bits_are_taken_as_they_are_and_larger_ones_as_32_bits():
    for seed in (0, 1, 12345, 2**31, 2**32 - 1):
        assert seed32(seed) == seed
    large = {seed32(k << 32) for k in range(1, 1001)}
    assert len(large) == 1000
    assert all(0 <= seed < 2**32 for seed in large)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 3), (3, 8, 8)])
def test_images_have_the_shape_asked_for_and_nothing_twice(shape):
    images = torch.stack(list(islice(Noise(0, torch.arange(64), shape), 3)))
    assert images.shape == (3, 64, *shape)
    assert images.dtype == torch.float32
    assert len(images.unique()) > 0.999 * images.numel()  # but for chance, in float32


# Below, n numbers: a mean is within 5 of its standard errors with probability 1 - 6e-7.


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """|E[a b]|, for standard normals; its standard error is 1 / sqrt(n)."""
    return (a.double() * b.double()).mean().abs().item()


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    """(draws 2, images 4096, pixels 192) of seed 0."""
    return torch.stack(draws(0, torch.arange(4096))).flatten(2)


@pytest.mark.parametrize(
    ("power", "moment", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]
)
def test_its_moments_are_those_of_the_standard_normal(sample, power, moment, variance):
    error = sample.double().pow(power).mean() - moment
    assert error.abs() < 5 * math.sqrt(variance / sample.numel())


def test_its_distribution_is_normal_out_to_the_tails(sample):
    for z in (-4.0, -3.0, -1.0, 0.0, 0.5, 2.0, 3.5):
        share = math.erfc(-z / math.sqrt(2)) / 2
        deviation = math.sqrt(share * (1 - share) / sample.numel())
        assert abs((sample < z).double().mean().item() - share) < 5 * deviation


def test_it_is_uncorrelated_between_images_pixels_draws_and_seeds(sample):
    other_seed = draws(1, torch.arange(4096), 1)[0].flatten(1)
    pairs = {
        "next image": (sample[:, 1:], sample[:, :-1]),
        "next pixel": (sample[..., 1:], sample[..., :-1]),
        "the pair of Box and Muller": sample.chunk(2, dim=2),
        "next draw": (sample[0], sample[1]),
        "next draw of the next image": (sample[0, 1:], sample[1, :-1]),
        "next seed": (sample[0], other_seed),
        "next seed of the next image": (sample[0, 1:], other_seed[:-1]),
    }
    for name, (a, b) in pairs.items():
        assert correlation(a, b) < 5 / math.sqrt(a.numel()), name
        assert correlation(a**2 - 1, b**2 - 1) < 5 * 2 / math.sqrt(a.numel()), name
