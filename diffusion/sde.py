"""The SDE view (Song et al. 2021b, section 3): VP, sub-VP and VE processes, read as angles.

A linear SDE dx = f(tau) x dtau + g(tau) dw from data x0 has marginals alpha x0 + sigma eps, and so
is a walk along the circle seen through a lens that grows or shrinks the image:

    x(tau) = scale(tau) x_t,    t = angle(tau) = atan2(sigma, alpha),    scale = hypot(alpha, sigma).

One denoiser and every sampler of the suite thus serve each of them: at equal angles they differ in
scale alone, and their score is the circle's, score(x_t) / scale.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.circle import FROM_X0, broadcast

BETA_MIN, BETA_MAX = 0.1, 20.0
SIGMA_MIN, SIGMA_MAX = 0.01, 50.0


@dataclass(frozen=True)
class Process:
    """A forward SDE by its closed forms; every field maps tau in [0, 1], float64, to a number."""

    alpha: Callable[[Tensor], Tensor]
    """What x0 is multiplied by."""
    sigma: Callable[[Tensor], Tensor]
    """The standard deviation of the noise."""
    drift: Callable[[Tensor], Tensor]
    """f = d log alpha / dtau."""
    diffusion: Callable[[Tensor], Tensor]
    """g, g^2 = d sigma^2 / dtau - 2 f sigma^2."""

    def angle(self, tau: Tensor) -> Tensor:
        return torch.atan2(self.sigma(tau), self.alpha(tau))

    def scale(self, tau: Tensor) -> Tensor:
        return torch.hypot(self.alpha(tau), self.sigma(tau))

    def score(self, denoise: Callable, x: Tensor, tau: Tensor) -> Tensor:
        """The gradient of log p_tau at x (B, C, H, W): -(x_t - cos(t) D) / sin^2(t) / scale.

        tau > 0, a scalar or (B,).
        """
        t, scale = self.angle(tau), broadcast(self.scale(tau), x)
        return FROM_X0["score"](x / scale, denoise(x / scale, t), t) / scale

    def angles(self, num_steps: int = 1000) -> Tensor:
        """The noise schedule at equal steps of tau, (N + 1,) from 0."""
        return self.angle(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64))


def _beta(tau: Tensor) -> Tensor:
    return BETA_MIN + tau * (BETA_MAX - BETA_MIN)


def _total_beta(tau: Tensor) -> Tensor:
    """Its integral from 0."""
    return tau * BETA_MIN + tau.square() * (BETA_MAX - BETA_MIN) / 2


_RATE = math.log(SIGMA_MAX / SIGMA_MIN)

# Song et al. 2021b, eq. 27 to 33 and appendix C, for data of unit variance
VP = Process(
    alpha=lambda tau: (-_total_beta(tau) / 2).exp(),
    sigma=lambda tau: (-torch.expm1(-_total_beta(tau))).sqrt(),
    drift=lambda tau: -_beta(tau) / 2,
    diffusion=lambda tau: _beta(tau).sqrt(),
)
SUB_VP = Process(
    alpha=VP.alpha,
    sigma=lambda tau: -torch.expm1(-_total_beta(tau)),
    drift=VP.drift,
    diffusion=lambda tau: (-_beta(tau) * torch.expm1(-2 * _total_beta(tau))).sqrt(),
)
VE = Process(
    alpha=torch.ones_like,
    sigma=lambda tau: SIGMA_MIN * torch.expm1(2 * _RATE * tau).sqrt(),  # exactly 0 at tau = 0
    drift=torch.zeros_like,
    diffusion=lambda tau: SIGMA_MIN * (_RATE * tau).exp() * math.sqrt(2 * _RATE),
)

PROCESSES = {"vp": VP, "sub-vp": SUB_VP, "ve": VE}
