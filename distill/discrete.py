"""Consistency between two angles, f(x_t, t) = f(x_s, s): the loss of cd, ct, ict and ect."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.batches import Batch
from diffusion.circle import add_noise, broadcast, rotate
from diffusion.training import Average, Followers, frozen_copy
from distill.frechet import FrechetTerm
from distill.pairs import Angles, Curriculum, Ends, Pairs, segments, target_decay, to_data
from distill.steps import STEPS, Denoise, Step

Solver = Literal["heun", "euler", "data"]
Distance = Literal["l2", "pseudo-huber", "squared"]
Weight = Literal["one", "gap", "sigma-gap", "karras"]
Growth = Literal["fixed", "root", "doubling"]


@dataclass(frozen=True)
class PairLoss:
    """How the student is compared with its target, between two noise levels."""

    solver: Solver
    """How to get from one noise level to the next. heun, euler: by the teacher's step of second or
    first order; data: by the training image itself, without the teacher."""
    target_ema: float
    """How slowly the target follows the student, as the decay of an average of its weights (at
    first, where the number of noise levels grows). 0: the target is the student itself."""
    distance: Distance
    """How the student's image and its target are compared. l2: their distance; squared: its square;
    pseudo-huber: a distance that is smooth at 0 (Song & Dhariwal 2023)."""
    weight: Weight
    """How much each pair of noise levels, the angles t > s, counts. one: all alike; gap:
    1 / (t - s); sigma-gap: 1 / (tan t - tan s); karras: tan^(-6/7) of the pair's middle, as
    sigma-gap falls on Karras' list of angles."""
    segments: int = 1
    """Into how many parts the noise levels are cut. The student goes from any level to the end of
    its part, and makes an image in so many calls (Heek et al. 2024). 1: a consistency model."""


@dataclass(frozen=True)
class NeighbourLoss(PairLoss):
    """How the student is compared with its target, between neighbours of a list of noise levels."""

    curriculum: Growth = "fixed"
    """How the number of noise levels grows in training. fixed: not at all; root: as the root of the
    iterations (Song et al. 2023); doubling: in stages (Song & Dhariwal 2023)."""
    num_angles: int = 16
    """How many noise levels the student compares, in the end if the number grows."""


@dataclass(frozen=True)
class Consistency:
    """f(x_t, t) = f(x_s, s), where `step` leads from x_t to x_s (Song et al. 2023, eq. 7 and 10).

    With segments (Heek et al. 2024, multistep consistency models) f is the x0 whose rotation to
    the end a of t's segment arrives where the ODE does: from x_s f rotates there, too, and both
    rotations made one are the target. s = a needs no case, nor does a = 0, the plain model, for
    which f(x_s, s) itself is the target.
    """

    step: Step
    pairs: Pairs
    distance: Callable[[Tensor], Tensor]
    """Difference (B, C, H, W) -> (B,)."""
    weight: Callable[[Tensor, Tensor], Tensor]
    """(t, s) -> (B,)."""
    target: nn.Module | None = None
    """What judges x_s: an average of the student, or None for the student itself."""
    followers: Followers = field(default_factory=dict)
    ends: Ends = to_data
    """t -> the angle a < t where its segment ends; no step goes beyond it."""
    frechet: FrechetTerm | None = None
    """Joins the loss."""

    def joined_by(self, term: FrechetTerm) -> "Consistency":
        """The same objective with the term and what it follows."""
        followers = {**self.followers, "moments": term.frechet}
        return replace(self, frechet=term, followers=followers)

    def __call__(self, student: Denoise, batch: Batch, progress: float) -> Tensor:
        t, s = self.pairs(batch.level, progress)
        a = self.ends(t)
        s = torch.maximum(s, a)
        x_t = add_noise(batch.x0, batch.eps, t)
        with torch.no_grad():
            x0 = self.step(batch, x_t, t, s)
            x_s, masks = rotate(x_t, x0, t, s), batch.dropout()  # the same for both passes
            f = (self.target or student)(x_s, s, batch.condition, dropout=masks)
            target = join(x0, f, t, s, a)
        x0 = student(x_t, t, batch.condition, dropout=batch.dropout())
        loss = self.distance(x0 - target) * self.weight(t, s).float()
        return loss + self.frechet(x0, batch, progress) if self.frechet else loss


def join(x0: Tensor, f: Tensor, t: Tensor, s: Tensor, a: Tensor) -> Tensor:
    """The x0 whose rotation t -> a is x0's t -> s, then f's s -> a: diffusion.circle.merge_steps.

    In a form that is finite where s = a = 0, and exactly f for a = 0.
    """
    tiny = torch.finfo(t.dtype).tiny
    share = (t - s).sin() * a.sin() / (s.sin().clamp(min=tiny) * (t - a).sin())
    return torch.lerp(f, x0, broadcast(share, f))


def _pseudo_huber(difference: Tensor) -> Tensor:
    """sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(dimensions) (Song & Dhariwal 2023, 3.3)."""
    flat = difference.flatten(1)
    c = 0.00054 * math.sqrt(flat.shape[1])
    return (flat.square().sum(1) + c * c).sqrt() - c


DISTANCES = {
    # the norm itself; Song et al. 2023 square it (section 3, their l2 metric), as "squared" does
    "l2": lambda difference: (difference.flatten(1).square().sum(1) + 1e-12).sqrt(),
    "pseudo-huber": _pseudo_huber,
    "squared": lambda difference: difference.flatten(1).square().mean(1),
}
WEIGHTS = {
    "one": lambda t, s: torch.ones_like(t),
    "gap": lambda t, s: 1 / (t - s),  # Song & Dhariwal 2023, section 3.1, in angles
    # theirs. On equal angles it falls as cos^2 t, and is 6e-17 for the pair that ends at pure noise
    "sigma-gap": lambda t, s: 1 / (t.tan() - s.tan()),
    # theirs as it falls on their own list, Karras' of rho = 7, whatever list is trained:
    # sigma^(-6/7), of the pair's middle, for pure noise has no finite tan t
    "karras": lambda t, s: ((t + s) / 2).tan() ** (-6 / 7),
}


def matching(
    loss: PairLoss,
    teacher: Denoise,
    student: nn.Module,
    angles: Angles,
    pairs: Pairs,
    curriculum: Curriculum,
) -> Consistency:
    """The objective on these pairs, of the parts that the settings of a mode's loss name.

    curriculum: the number of equal steps that the target's decay grows with.
    """
    # in training mode, so that its dropout masks are the student's
    target = frozen_copy(student).to(angles(1).device).train() if loss.target_ema else None

    def decay(done: int, progress: float) -> float:
        return target_decay(loss.target_ema, curriculum, progress)

    return Consistency(
        step=STEPS[loss.solver](teacher),
        pairs=pairs,
        distance=DISTANCES[loss.distance],
        weight=WEIGHTS[loss.weight],
        target=target,
        followers={"target": Average(target, decay)} if target else {},
        ends=segments(angles(loss.segments)),
    )
