"""Learned variance (Nichol & Dhariwal 2021, section 3.1): the bound that a share is learnt from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.circle import broadcast
from diffusion.grey_levels import log_levels


@dataclass(frozen=True)
class VariationalBound:
    """N times what the step from t to the angle s before it costs, in nats per channel value.

    Its mean over the list's steps is L_vlb without L_T, which no network changes.
    """

    angles: Tensor
    """(N + 1,) float64, ascending from 0; N >= 2."""
    grey_levels: tuple[float, float]
    """(mean, std) for which x0 = (grey level - mean) / std, as a codec of pixels has them."""

    def __call__(self, x0: Tensor, share: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """(B,). x0, share: the network's at x_t; target: the data's x0; t: (B,), above 0."""
        s = self.angles[torch.searchsorted(self.angles, t) - 1]
        last = s == 0
        # where the step is the last, any s > 0 keeps the other cost and its gradient finite
        step = step_cost(x0, share, target, t, torch.where(last, t / 2, s))
        cost = torch.where(broadcast(last, x0).bool(), self.last_cost(x0, share, target), step)
        return (len(self.angles) - 1) * cost.flatten(1).mean(1)

    def last_cost(self, x0: Tensor, share: Tensor, target: Tensor) -> Tensor:
        """-log P of the data's grey levels, from the list's first angle, element by element.

        beta is sin^2 there and the posterior's variance 0, in place of which it has the step's
        before it: both deviations in one, sin(t_1) fresh^(1 - share).
        """
        first, second = self.angles[1], self.angles[2]
        fresh = ((second - first).sin() * (second + first).sin()).sqrt()
        fresh = fresh / (second.sin() * first.cos())
        deviation = first.sin() * fresh ** (1 - share.double())
        mean, std = self.grey_levels
        levels = (target * std + mean).round()
        return -log_levels(levels, x0.double() * std + mean, deviation * std).to(x0.dtype)


def step_cost(x0: Tensor, share: Tensor, target: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """KL(q(x_s | x_t, target) || p(x_s | x_t)) element by element; 0 < s < t.

    Of two Gaussians, p's variance e^more times q's, more = 2 share log(sin t / sin s), and their
    means sqrt(cot^2 s - cot^2 t) |target - x0| of q's deviations apart. In float32 the least
    costs of 1000 steps keep three digits.
    """
    more = 2 * share * broadcast((t.sin() / s.sin()).log(), share)
    gap = (t - s).sin() * (t + s).sin() / (t.sin() * s.sin()).square()  # cot^2 s - cot^2 t
    apart = broadcast(gap, x0) * (target - x0).square()
    return (more + torch.expm1(-more) + apart * (-more).exp()) / 2
