"""Consistency between neighbouring angles: f(x_t, t) = f(x_s, s), and the parts it is made of."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.batches import Batch
from diffusion.circle import add_noise, rotate
from diffusion.training import Average
from distill.pairs import Pairs

Step = Callable[[Batch, Tensor, Tensor, Tensor], Tensor]  # (batch, x_t, t, s) -> x_s


@dataclass(frozen=True)
class Consistency:
    """f(x_t, t) = f(x_s, s), where `step` goes from x_t to x_s (Song et al. 2023, eq. 7 and 10).

    s = 0 needs no case: there f is the identity, and the target is x_s itself.
    """

    step: Step
    pairs: Pairs
    distance: Callable[[Tensor], Tensor]
    """Difference (B, C, H, W) -> (B,)."""
    weight: Callable[[Tensor, Tensor], Tensor]
    """(t, s) -> (B,)."""
    target: nn.Module | None = None
    """What judges x_s: an average of the student, or None for the student itself."""
    averages: Sequence[Average] = ()

    def __call__(self, student, batch: Batch, progress: float) -> Tensor:
        t, s = self.pairs(batch.level, progress)
        x_t = add_noise(batch.x0, batch.eps, t)
        with torch.no_grad():
            x_s = self.step(batch, x_t, t, s)
            torch.manual_seed(batch.seed)
            target = (self.target or student)(x_s, s, batch.label)
        torch.manual_seed(batch.seed)  # the same dropout mask for both passes
        loss = self.distance(student(x_t, t, batch.label) - target)
        return loss * self.weight(t, s).float()


def euler_step(teacher) -> Step:
    """One DDIM step of the teacher."""
    return lambda batch, x_t, t, s: rotate(x_t, teacher(x_t, t, batch.label), t, s)


def heun_step(teacher) -> Step:
    """One second-order step of the teacher: the trapezoid rule in cot t, diffusion.samplers.heun."""

    def step(batch: Batch, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x0 = teacher(x_t, t, batch.label)
        x0_s = teacher(rotate(x_t, x0, t, s), s, batch.label)
        return rotate(x_t, (x0 + x0_s) / 2, t, s)

    return step


def data_step(batch: Batch, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The true x0 in the teacher's place: consistency training."""
    return rotate(x_t, batch.x0, t, s)


def _pseudo_huber(difference: Tensor) -> Tensor:
    """sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(dimensions) (Song & Dhariwal 2023, section 3.3)."""
    flat = difference.flatten(1)
    c = 0.00054 * math.sqrt(flat.shape[1])
    return (flat.square().sum(1) + c * c).sqrt() - c


STEPS = {"heun": heun_step, "euler": euler_step, "data": lambda teacher: data_step}
DISTANCES = {
    "l2": lambda difference: (difference.flatten(1).square().sum(1) + 1e-12).sqrt(),
    "pseudo-huber": _pseudo_huber,
    "squared": lambda difference: difference.flatten(1).square().mean(1),
}
WEIGHTS = {
    "one": lambda t, s: torch.ones_like(t),
    "gap": lambda t, s: 1 / (t - s),  # Song & Dhariwal 2023, section 3.5, in angles
    "sigma-gap": lambda t, s: 1 / (t.tan() - s.tan()),  # theirs, light where noise is heavy
}
