import math
from decimal import Decimal, localcontext
from functools import partial
from itertools import pairwise

import pytest
import torch

from diffusion.console import UserError
from diffusion.samplers import sample
from diffusion.schedules import (
    SCHEDULES,
    cosine,
    even,
    halve,
    karras,
    linear_beta,
    respace,
    shifted,
    sigmoid,
    truncated,
    vp,
)
from tests.analytic import Gaussian

close = torch.testing.assert_close
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def decimal_cos(x: Decimal) -> Decimal:
    term = total = Decimal(1)
    for n in range(1, 40):
        term *= -x * x / (2 * n * (2 * n - 1))
        total += term
    return total


def linear_alpha_bar(count: int) -> list[Decimal]:
    """Ho et al. 2020: the running product of 1 - beta, beta from 0.0001 to 0.02."""
    products, low, high = [Decimal(1)], Decimal("0.0001"), Decimal("0.02")
    for i in range(count):
        products.append(products[-1] * (1 - low - (high - low) * i / (count - 1)))
    return products


def cosine_alpha_bar(count: int) -> list[Decimal]:
    """Nichol & Dhariwal 2021, eq. 17."""
    offset = Decimal("0.008")
    f = [decimal_cos((Decimal(i) / count + offset) / (1 + offset) * PI / 2) for i in range(count)]
    return [(x / f[0]) ** 2 for x in f] + [Decimal(0)]


def sigmoid_alpha_bar(count: int) -> list[Decimal]:
    """Jabri et al. 2022, section 3.3, with start -3, end 3, temperature 1."""
    v = [1 / (1 + (3 - Decimal(6 * i) / count).exp()) for i in range(count + 1)]
    return [(v[-1] - x) / (v[-1] - v[0]) for x in v]


PAPERS = {"linear": linear_alpha_bar, "cosine": cosine_alpha_bar, "sigmoid": sigmoid_alpha_bar}


@pytest.mark.parametrize("name", PAPERS)
def test_every_angle_has_the_papers_alpha_bar_to_12_digits(name):
    with localcontext(prec=50):
        alpha_bar = PAPERS[name](1000)
        alpha = torch.tensor([float(a.sqrt()) for a in alpha_bar], dtype=torch.float64)
        sigma = torch.tensor([float((1 - a).sqrt()) for a in alpha_bar], dtype=torch.float64)
    angles = SCHEDULES[name](1000)
    torch.testing.assert_close(angles.sin(), sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(angles.cos(), alpha, rtol=1e-12, atol=1e-16)


def beta(tau: float) -> float:
    return 0.1 + 19.9 * tau


def total_beta(tau: float) -> float:
    """The integral of beta from 0."""
    return 0.1 * tau + 9.95 * tau**2


# Song et al. 2021b, appendix B: dx = f(tau) x dtau + g(tau) dw of each process, as (f, g^2).
SDES = {
    "vp": lambda tau: (-beta(tau) / 2, beta(tau)),
    "sub-vp": lambda tau: (-beta(tau) / 2, beta(tau) * -math.expm1(-2 * total_beta(tau))),
    "ve": lambda tau: (0.0, 0.01**2 * 5000 ** (2 * tau) * 2 * math.log(5000)),
}


@pytest.mark.parametrize("name", SDES)
def test_a_processs_angles_are_those_of_the_moments_that_its_sde_leads_to(name):
    """The moments' equations (Sarkka & Solin 2019, eq. 5.50 and 5.51), by Runge and Kutta."""

    def slope(tau, mean, variance):
        f, g_squared = SDES[name](tau)
        return f * mean, 2 * f * variance + g_squared

    count = 400
    h, mean, variance, angles = 1 / count, 1.0, 0.0, [0.0]
    for i in range(count):
        tau = i * h
        a = slope(tau, mean, variance)
        b = slope(tau + h / 2, mean + h / 2 * a[0], variance + h / 2 * a[1])
        c = slope(tau + h / 2, mean + h / 2 * b[0], variance + h / 2 * b[1])
        d = slope(tau + h, mean + h * c[0], variance + h * c[1])
        mean += h / 6 * (a[0] + 2 * b[0] + 2 * c[0] + d[0])
        variance += h / 6 * (a[1] + 2 * b[1] + 2 * c[1] + d[1])
        angles.append(math.atan2(math.sqrt(variance), mean))
    close(SCHEDULES[name](count), torch.tensor(angles, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_vp_is_the_limit_of_ddpms_linear_betas():
    """Song et al. 2021b, appendix B: within the first order of 1000 steps."""
    close(vp().sin(), linear_beta().sin(), rtol=0, atol=3e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 63, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_rises_from_0_in_so_many_steps_to_at_most_a_right_angle(name, num_steps):
    angles = SCHEDULES[name](num_steps)
    assert angles.dtype == torch.float64
    assert angles.shape == (num_steps + 1,)
    assert angles[0] == 0
    assert angles.diff().min() > 0
    assert angles[-1] <= math.pi / 2


def test_ddpms_schedule_ends_short_of_pure_noise():
    assert linear_beta()[-1].cos().item() == pytest.approx(0.00635, abs=5e-6)


@pytest.mark.parametrize("num_steps", [10, 100, 400])
def test_a_shorter_ddpm_schedule_is_at_least_as_noisy_at_its_end(num_steps):
    assert linear_beta(num_steps)[-1] >= linear_beta()[-1]


@pytest.mark.parametrize(
    "schedule",
    [cosine, partial(cosine, offset=0.02), sigmoid, partial(sigmoid, temperature=0.7)],
    ids=["cosine", "later cosine", "sigmoid", "sharper sigmoid"],
)
@pytest.mark.parametrize("num_steps", [1, 3, 7, 250, 1000])
def test_cosine_and_sigmoid_end_at_exactly_a_right_angle(schedule, num_steps):
    assert schedule(num_steps)[-1].item() == math.pi / 2


def test_karras_ratios_are_evenly_spaced_in_their_seventh_root():
    with localcontext(prec=50):
        low, high = (Decimal(ratio) ** (1 / Decimal(7)) for ratio in ("0.004", "160"))
        ratios = [float((low + (high - low) * i / 17) ** 7) for i in range(18)]
    expected = torch.tensor(ratios, dtype=torch.float64).atan()
    torch.testing.assert_close(karras(18)[1:], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_karras_angles_end_at_the_largest_ratio_to_the_last_digit(num_steps):
    largest = karras(num_steps, 0.01, 157.4)[-1].item()
    assert largest == pytest.approx(math.atan(157.4), rel=1e-15)


HALVINGS = [1000, 500, 250, 125, 63, 32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_halving_goes_from_1000_to_1_over_nested_lists_with_one_noisy_end(name):
    lists = [SCHEDULES[name](1000)]
    while len(lists[-1]) > 2:
        lists.append(halve(lists[-1]))
    assert [len(angles) - 1 for angles in lists] == HALVINGS
    for longer, shorter in pairwise(lists):
        assert set(shorter.tolist()) < set(longer.tolist())
        assert (shorter[0], shorter[-1]) == (0, lists[0][-1])


def test_halving_an_odd_count_leaves_one_short_step_at_the_data_end():
    assert halve(torch.arange(6.0)).tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize(
    ("num_steps", "kept"),
    [(8, [0, 4, 8]), (9, [0, 1, 5, 9]), (11, [0, 3, 7, 11]), (4, [0, 4]), (3, [0, 3])],
)
def test_a_factor_of_4_keeps_every_fourth_from_the_noisy_end(num_steps, kept):
    assert halve(torch.arange(num_steps + 1.0), factor=4).tolist() == kept


def test_a_factor_of_4_is_halving_twice():
    angles = linear_beta(1000)
    for _ in range(3):
        assert torch.equal(halve(angles, 4), halve(halve(angles)))
        angles = halve(angles, 4)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 18, 333, 999, 1000])
def test_respacing_takes_distinct_angles_of_the_list_within_half_a_place_of_even(num_steps):
    places = respace(torch.arange(1001.0), num_steps)
    even = torch.arange(num_steps + 1) * 1000 / num_steps
    assert (places - even).abs().max() <= 0.5 + 1e-4
    assert places.diff().min() >= 1


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_respacing_to_no_steps_or_more_than_there_are_is_the_users_mistake(num_steps):
    with pytest.raises(UserError, match=f"from 1 to this model's 1000, got {num_steps}"):
        respace(linear_beta(), num_steps)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_even_angles_are_equal_steps_to_the_lists_own_end(num_steps):
    end = linear_beta()[-1].item()
    expected = [end * i / num_steps for i in range(num_steps)]
    assert even(linear_beta(), num_steps).tolist() == pytest.approx([*expected, end], rel=1e-15)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_truncated_angles_are_equal_steps_from_the_lists_own_end_to_the_stop(num_steps):
    end = linear_beta()[-1].item()
    angles = truncated(linear_beta(), num_steps, stop=0.3)
    assert angles[0] == 0
    assert angles[-1] == end
    if num_steps > 1:
        step = (end - 0.3) / (num_steps - 1)
        assert angles[1:].tolist() == pytest.approx([0.3 + step * i for i in range(num_steps)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_shift_keeps_both_ends_and_the_order_and_one_by_1_changes_nothing(name):
    angles = SCHEDULES[name](50)
    assert torch.equal(shifted(angles, 1.0), angles)
    for shift in (0.3, 2.0, 5.0):
        moved = shifted(angles, shift)
        assert (moved[0], moved[-1]) == (angles[0], angles[-1])
        assert (moved.diff() > 0).all()


def test_a_shift_multiplies_the_tangents_and_its_inverse_undoes_it():
    angles = even(cosine(), 40)
    moved = shifted(angles, 3.0)
    close(moved[:-1].tan(), 3 * angles[:-1].tan(), rtol=1e-12, atol=0)
    close(shifted(moved, 1 / 3), angles, rtol=1e-12, atol=1e-15)
    close(even(cosine(), 40, 3.0), moved, rtol=0, atol=0)


def test_the_best_shift_is_the_deviation_of_the_data():
    """A step for N(0, 8^2), as an image's main component may be, turns by the difference of
    atan(tan(t) / 8), and DDIM's multiplies by its cosine: equal ones are best, and tan t times 8
    makes them. The exact map multiplies noise by 8.
    """
    wide, noise = Gaussian(0.0, 8.0), torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def reached(shift: float) -> float:
        return sample(wide, iter([noise]), "ddim", even(cosine(), 16, shift)).item()

    assert reached(8.0) == pytest.approx(8 * math.cos(math.pi / 32) ** 16, rel=1e-12)
    assert reached(1.0) < reached(2.0) < reached(4.0) < reached(8.0) < 8
    assert reached(16.0) < reached(8.0)
