"""The circle: every noise level is an angle, every sampler step a rotation.

A noisy image is a point on a quarter circle between a data image and a noise image,

    x_t = cos(t) x0 + sin(t) eps,    0 <= t <= pi/2,

with x0 of zero mean and unit variance. `t` is an angle in radians, alpha = cos t,
sigma = sin t, log-SNR = -2 log tan t (TrigFlow time, Lu & Song 2024, section 3).

Shapes: images (B, C, H, W); angles (B,) or a scalar tensor. Angles are best float64: the
coefficients are computed in the angle's precision and only then cast to the images', so
that neighbouring angles of a 1000-step schedule lose no digits when they are subtracted.
"""

import torch
from torch import Tensor


def broadcast(coefficient: Tensor, images: Tensor) -> Tensor:
    """A per-image number (B,), or a scalar, shaped and typed to multiply (B, C, H, W)."""
    trailing = (1,) * (images.ndim - 1) if coefficient.ndim else ()
    return coefficient.to(images.dtype).reshape(coefficient.shape + trailing)


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The point x_t = cos(t) x0 + sin(t) eps (Ho et al. 2020, eq. 4, as an angle)."""
    return broadcast(t.cos(), x0) * x0 + broadcast(t.sin(), x0) * eps


def rotate(x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One DDIM step (Song et al. 2021, eq. 12, eta = 0): x_s from x_t and the x0 predicted there.

    The point at angle s of the circle through x0 and x_t. Needs t > 0, gives exactly x0 at
    s = 0. Equal to cos(t-s) x_t - sin(t-s) v; both coefficients are sums of nothing but
    positive terms where s <= t, so that rounding never cancels.
    """
    return broadcast(s.sin() / t.sin(), x_t) * x_t + broadcast((t - s).sin() / t.sin(), x0) * x0


def merge_steps(x0_predictions: list[Tensor], angles: list[Tensor]) -> Tensor:
    """The x0 whose single rotation angles[0] -> angles[-1] equals all the steps on the way.

    `angles` descends and is one longer than `x0_predictions`; prediction i was made at
    angles[i]. Rotation is linear, so the zero image rotated through the predictions gathers
    each with its weight sin(a-b) sin(s) / (sin a sin b); their sum sin(t-s) / sin t divides
    them to a convex average. Nothing cancels, s = 0 needs no case of its own, and a step of
    length zero has weight zero. This is the target of Salimans & Ho 2022, eq. 8 and
    appendix G, for any number of steps.
    """
    t, s = angles[0], angles[-1]
    gathered = torch.zeros_like(x0_predictions[0])
    for x0, a, b in zip(x0_predictions, angles[:-1], angles[1:], strict=True):
        gathered = rotate(gathered, x0, a, b)
    return gathered * broadcast(t.sin() / (t - s).sin(), gathered)


# The x0 that each prediction of a network at (x_t, t) stands for. eps says nothing of x0 at pi/2.
TO_X0 = {
    "x0": lambda x_t, x0, t: x0,
    "v": lambda x_t, v, t: broadcast(t.cos(), x_t) * x_t - broadcast(t.sin(), v) * v,
    "eps": lambda x_t, eps, t: (x_t - broadcast(t.sin(), eps) * eps) / broadcast(t.cos(), x_t),
}
# What an x0 at (x_t, t) stands for: v = cos(t) eps - sin(t) x0, score = -eps / sin t. Needs t > 0.
FROM_X0 = {
    "x0": lambda x_t, x0, t: x0,
    "v": lambda x_t, x0, t: (broadcast(t.cos(), x_t) * x_t - x0) / broadcast(t.sin(), x_t),
    "eps": lambda x_t, x0, t: (x_t - broadcast(t.cos(), x0) * x0) / broadcast(t.sin(), x_t),
    "score": lambda x_t, x0, t: (
        (broadcast(t.cos(), x0) * x0 - x_t) / broadcast(t.sin().square(), x_t)
    ),
}


# Weights of the velocity's squared error, which is (SNR + 1) times that of x0.
WEIGHTINGS = {
    "v": lambda t: torch.ones_like(t),  # SNR + 1, Salimans & Ho 2022, section 4
    "truncated": lambda t: torch.maximum(t.cos().square(), t.sin().square()),  # max(SNR, 1), eq. 9
    "eps": lambda t: t.cos().square(),  # SNR: DDPM's L_simple, Ho et al. 2020, eq. 14
}


def x0_loss(x0: Tensor, target: Tensor, t: Tensor, weighting: str) -> Tensor:
    """Weighted mean squared error per image (B,), in terms of x0. Needs t > 0."""
    weight = WEIGHTINGS[weighting](t) / t.sin().square()
    return (x0 - target).square().flatten(1).mean(1) * weight.float()
