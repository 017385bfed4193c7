import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.circle import (
    FROM_X0,
    TO_X0,
    add_noise,
    merge_steps,
    rotate,
    x0_loss,
)
from tests.analytic import BIMODAL, normal

X0, EPS = (normal(seed, 4, 3, 2, 2, dtype=torch.float64) for seed in (0, 1))
close = torch.testing.assert_close


def descending(count: int, least: float) -> st.SearchStrategy[torch.Tensor]:
    """Angles pi/2 > t > s > ... > least, no two nearer than a thousandth of all."""
    widths = st.lists(st.floats(0.01, 1), min_size=count + 1, max_size=count + 1)

    def angles(gaps: list[float]) -> torch.Tensor:
        ends = torch.tensor(gaps, dtype=torch.float64).cumsum(0)
        return (least + (math.pi / 2 - least) * ends / ends[-1])[:-1].flip(0)

    return widths.map(angles)


def given_angles(count: int, least: float = 0.0):
    seeded = settings(max_examples=30, deadline=None, derandomize=True)
    return lambda test: seeded(given(descending(count, least))(test))


@given_angles(2)
def test_rotating_towards_x0_is_adding_less_of_the_same_noise(angles):
    t, s = angles
    close(rotate(add_noise(X0, EPS, t), X0, t, s), add_noise(X0, EPS, s))


@given_angles(2)
def test_rotation_turns_by_the_angle_t_minus_s_along_the_velocity(angles):
    t, s = angles
    x_t, v = add_noise(X0, EPS, t), t.cos() * EPS - t.sin() * X0
    close(rotate(x_t, X0, t, s), (t - s).cos() * x_t - (t - s).sin() * v)


@given_angles(3)
def test_two_rotations_towards_one_x0_are_one(angles):
    t, u, s = angles
    close(rotate(rotate(EPS, X0, t, u), X0, u, s), rotate(EPS, X0, t, s))


@pytest.mark.parametrize("t", [1e-8, 0.01, 1.0, math.pi / 2])
def test_rotating_to_the_data_end_gives_exactly_x0(t):
    t = torch.tensor(t, dtype=torch.float64)
    assert torch.equal(rotate(EPS.float(), X0.float(), t, torch.zeros_like(t)), X0.float())


def test_an_angle_per_image_is_each_image_at_its_own_angle():
    t, s = torch.tensor([[0.2, 0.7, 1.1, 1.5], [0.0, 0.6, 0.3, 1.0]], dtype=torch.float64)
    together = rotate(add_noise(X0, EPS, t), X0, t, s)
    for i in range(4):
        close(together[i], rotate(add_noise(X0[i], EPS[i], t[i]), X0[i], t[i], s[i]))


def merging_weights(angles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What merge_steps multiplies each prediction with: the predictions are unit vectors."""
    count = len(angles) - 1
    return merge_steps(list(torch.eye(count, dtype=dtype).reshape(count, 1, count, 1, 1)), angles)


@given_angles(5, least=0.01)
def test_merging_averages_predictions_by_differences_of_cot(angles):
    weights = merging_weights(list(angles), torch.float64).flatten()
    shares = (1 / angles.tan()).diff()
    close(weights, shares / shares.sum())
    assert weights.min() > 0


@given_angles(4)
def test_one_rotation_towards_the_merged_x0_is_all_the_steps(angles):
    predictions = list(normal(2, 3, *X0.shape, dtype=torch.float64))
    x = EPS
    for x0, t, s in zip(predictions, angles, angles[1:]):
        x = rotate(x, x0, t, s)
    close(rotate(EPS, merge_steps(predictions, list(angles)), angles[0], angles[-1]), x)


def test_merging_down_to_the_data_end_keeps_the_last_prediction_alone():
    angles = [torch.tensor(a, dtype=torch.float64) for a in (1.5, 0.7, 0.1, 0.0)]
    assert merging_weights(angles, torch.float32).flatten().tolist() == [0, 0, 1]


def test_neighbouring_and_tiny_angles_lose_no_digits_in_float32_images():
    t = torch.tensor(1.5, dtype=torch.float64)
    s = t - 2**-30
    moved = rotate(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), t, s)
    close(moved.item(), 2**-30 / math.sin(1.5), rtol=1e-6, atol=0)

    angles = torch.tensor([3.1e-6, 2.9e-6, 2.8999e-6, 1e-6], dtype=torch.float64)
    shares = (1 / angles.tan()).diff()
    weights = merging_weights(list(angles), torch.float32).flatten()
    close(weights.double(), shares / shares.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", FROM_X0)
@pytest.mark.parametrize("source", TO_X0)
def test_each_prediction_converts_to_each_other(source, target):
    t = torch.tensor([0.05, 0.5, 1.0, 1.5], dtype=torch.float64)
    cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
    meaning = {"x0": X0, "eps": EPS, "v": cos * EPS - sin * X0, "score": -EPS / sin}
    x_t = add_noise(X0, EPS, t)
    x0 = TO_X0[source](x_t, meaning[source], t)
    close(FROM_X0[target](x_t, x0, t), meaning[target])


@pytest.mark.parametrize("t", [0.02, 0.7, math.pi / 2])
def test_the_denoisers_score_is_the_gradient_of_the_log_density(t):
    t = torch.tensor(t, dtype=torch.float64)
    x_t = normal(0, 4, 1, 3, 3, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(BIMODAL.density(x_t, t).log().sum(), x_t)
    x_t = x_t.detach()
    close(FROM_X0["score"](x_t, BIMODAL(x_t, t), t), gradient, rtol=1e-7, atol=1e-9)


SNR = {  # as a weight of x0's squared error: Salimans & Ho 2022, section 4; Ho et al. 2020, eq. 14
    "v": lambda snr: snr + 1,
    "truncated": lambda snr: snr.clamp(min=1),
    "eps": lambda snr: snr,
}


@pytest.mark.parametrize("weighting", SNR)
def test_weights_are_those_of_the_signal_to_noise_ratio(weighting):
    t = torch.tensor([0.05, 0.7, 0.9, 1.5], dtype=torch.float64)
    snr = (t.cos() / t.sin()).square()
    expected = SNR[weighting](snr) * (X0 - EPS).square().mean((1, 2, 3))
    close(x0_loss(X0, EPS, t, weighting), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_a_weighting_named_for_a_prediction_is_that_predictions_squared_error(prediction):
    t = torch.tensor([0.05, 0.7, 0.9, 1.5], dtype=torch.float64)
    x_t = add_noise(X0, EPS, t)
    guess = X0 + 0.1 * normal(3, *X0.shape, dtype=torch.float64)
    wrong, right = (FROM_X0[prediction](x_t, x0, t) for x0 in (guess, X0))
    expected = (wrong - right).square().mean((1, 2, 3))
    close(x0_loss(guess, X0, t, prediction), expected, rtol=1e-6, atol=0)
