"""Noise schedules: each is a list of angles 0 = t_0 < t_1 < ... < t_N, float64.

Every schedule is computed from sin and cos together (atan2) and in forms that do not
subtract near-equal numbers, so that the smallest angles are as exact as the largest.
"""

import math

import torch
from torch import Tensor

from diffusion.console import UserError


def linear_beta(num_steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> Tensor:
    """DDPM's schedule (Ho et al. 2020, section 4). Its end is not quite noise: cos t_N = 0.00635.

    With fewer than 1000 steps the betas grow in proportion, at most to 0.999.
    """
    scale = 1000 / num_steps
    betas = torch.linspace(beta_min, beta_max, num_steps, dtype=torch.float64) * scale
    log_alpha_bar = torch.log1p(-betas.clamp(max=0.999)).cumsum(0)
    sigma, alpha = (-torch.expm1(log_alpha_bar)).sqrt(), (log_alpha_bar / 2).exp()
    return _from_zero(torch.atan2(sigma, alpha))


def cosine(num_steps: int = 1000, offset: float = 0.008) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, ending at exactly pi/2.

    They clip the last beta at 0.999 to keep eps finite; a velocity is finite there anyway.
    """
    i = torch.arange(1, num_steps + 1, dtype=torch.float64)
    first = offset / (1 + offset) * math.pi / 2
    turned = i / num_steps / (1 + offset) * math.pi / 2
    phi = (i / num_steps + offset) / (1 + offset) * math.pi / 2
    # sin^2 t = 1 - cos^2(phi) / cos^2(first), without the subtraction
    sigma = (turned.sin() * (phi + first).sin()).sqrt()
    return _from_zero(torch.atan2(sigma, phi.cos()).clamp(max=math.pi / 2))


def sigmoid(
    num_steps: int = 1000, start: float = -3.0, end: float = 3.0, temperature: float = 1.0
) -> Tensor:
    """Jabri et al. 2022, section 3.3, ending at exactly pi/2."""
    i = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    low, high = start / temperature, end / temperature
    x = low + i * (high - low)

    def span(a: Tensor, b: float) -> Tensor:  # sigmoid(a) - sigmoid(b), without the subtraction
        return torch.sinh((a - b) / 2) / (2 * torch.cosh(a / 2) * math.cosh(b / 2))

    # alpha^2 goes with sigmoid(high) - sigmoid(x), and sigma^2 with sigmoid(x) - sigmoid(low)
    return _from_zero(torch.atan2(span(x, low).sqrt(), (-span(x, high)).clamp(min=0).sqrt()))


def karras(
    num_steps: int = 1000,
    ratio_min: float = 0.004,
    ratio_max: float = 160.0,
    rho: float = 7.0,
) -> Tensor:
    """Karras et al. 2022, eq. 5, with t = atan(sigma / sigma_data), a ratio from 0.004 to 160."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = ratio_min ** (1 / rho), ratio_max ** (1 / rho)
    ratios = (low + ramp * (high - low)) ** rho
    ratios[-1] = ratio_max  # exactly, and for a single step too
    return _from_zero(torch.atan(ratios))


def vp(num_steps: int = 1000) -> Tensor:
    """The variance-preserving SDE (Song et al. 2021b, eq. 32 and 33) at equal steps of its time."""
    alpha, variance = _vp(num_steps)
    return torch.atan2(variance.sqrt(), alpha)


def sub_vp(num_steps: int = 1000) -> Tensor:
    """Their sub-VP SDE, whose deviation is VP's variance (eq. 29)."""
    alpha, variance = _vp(num_steps)
    return torch.atan2(variance, alpha)


def _vp(num_steps: int) -> tuple[Tensor, Tensor]:
    """VP's factor of x0 and its noise's variance, where beta rises from 0.1 to 20."""
    tau = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    total_beta = tau * 0.1 + tau.square() * (20 - 0.1) / 2  # the integral of beta from 0
    return (-total_beta / 2).exp(), -torch.expm1(-total_beta)


def ve(num_steps: int = 1000) -> Tensor:
    """Their variance-exploding SDE for data of unit variance (eq. 30): sigma from 0.01 to 50."""
    tau = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    sigma = 0.01 * torch.expm1(2 * math.log(50 / 0.01) * tau).sqrt()  # exactly 0 at tau = 0
    return torch.atan2(sigma, torch.ones_like(tau))


SCHEDULES = {
    "linear": linear_beta,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "karras": karras,
    "vp": vp,
    "sub-vp": sub_vp,
    "ve": ve,
}


def halve(angles: Tensor, factor: int = 2) -> Tensor:
    """Every second (`factor`-th) angle, counted from the noisy end, and 0.

    An odd count leaves one shorter step at the data end:
    1000 -> 500 -> 250 -> 125 -> 63 -> 32 -> 16 -> 8 -> 4 -> 2 -> 1.
    """
    kept = angles.flip(0)[::factor].flip(0)
    return kept if kept[0] == 0 else _from_zero(kept)


def respace(angles: Tensor, num_steps: int) -> Tensor:
    """`num_steps` of the list's own angles, evenly spread over it, ending at its noisy end."""
    longest = len(angles) - 1
    if not 1 <= num_steps <= longest:
        raise UserError(
            f"the number of steps must be from 1 to this model's {longest}, got {num_steps}"
        )
    i = torch.linspace(0, longest, num_steps + 1, dtype=torch.float64).round().long()
    return angles[i]


def even(angles: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """Equal steps from 0 to the list's end, shifted, at which consistency models are trained.

    For consistency distillation in few minutes far better than Karras' spacing, most of whose
    angles crowd close to noise.
    """
    return shifted(torch.linspace(0, float(angles[-1]), num_steps + 1, dtype=torch.float64), shift)


def shifted(angles: Tensor, shift: float) -> Tensor:
    """tan t times `shift`, both ends where they were: above 1, more steps where noise is heavy.

    For data of deviation d a DDIM step's error goes with the difference of atan(tan(t) / d), so
    that a shift by d is best: the main components of larger images have many times the variance of
    a pixel, and are decided close to pi/2 (the shift of Hoogeboom et al. 2023, section 3.1).
    """
    t = angles + torch.atan2(
        (shift - 1) * angles.sin() * angles.cos(), angles.cos() ** 2 + shift * angles.sin() ** 2
    )
    t *= angles[-1] / t[-1]
    t[-1] = angles[-1]  # exactly
    return t


def check_shift(shift: float) -> None:
    if not 0 < shift <= 1e6:
        raise UserError(f"--shift must be above 0 and at most 1e6, got {shift:g}")


def truncated(angles: Tensor, num_steps: int, stop: float = 0.2) -> Tensor:
    """Equal steps from the list's end to the angle `stop`, then the rest in one: early stopping.

    The last call's x0 is the image, however many calls there are: those that finer steps near the
    data would take go where noise is heavy. The default was best on 8x8 digits at 8 calls.
    """
    called = torch.linspace(stop, float(angles[-1]), num_steps, dtype=torch.float64)
    called[-1] = angles[-1]  # for a single step too
    return _from_zero(called)


def _from_zero(angles: Tensor) -> Tensor:
    return torch.cat([angles.new_zeros(1), angles])
