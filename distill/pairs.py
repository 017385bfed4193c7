"""The pairs of angles t > s on which a consistency student is taught, as its training goes on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Angles = Callable[[int], Tensor]  # num_steps -> the num_steps + 1 angles of equal steps, from 0
Curriculum = Callable[[float], int]  # progress -> equal steps of the discretisation
Pairs = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (level, progress) -> t, s
Ends = Callable[[Tensor], Tensor]  # t -> where its segment ends
Share = Callable[[Tensor], Tensor]  # angles of a list -> the share of pairs below each


def fixed(num_steps: int) -> Curriculum:
    return lambda progress: num_steps


def root(num_steps: int, first: int = 1) -> Curriculum:
    """Song et al. 2023, appendix C: steps grow as the root of the training done.

    Their N(k) counts angles, s0 = 2 at first: sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1 steps.
    """
    low, high = (first + 1) ** 2, (num_steps + 1) ** 2
    return lambda progress: math.ceil(math.sqrt(progress * (high - low) + low) - 1)


def doubling(num_steps: int, first: int = 10) -> Curriculum:
    """Song & Dhariwal 2023, section 3.4: 10, 20, 40, ... steps for equal shares of the training."""
    stages = 1 + max(0, math.ceil(math.log2(num_steps / first)))
    return lambda progress: min(first * 2 ** int(progress * stages), num_steps)


CURRICULA = {"fixed": fixed, "root": root, "doubling": doubling}


def target_decay(first: float, curriculum: Curriculum, progress: float) -> float:
    """mu(k) = exp(s0 log mu0 / N(k)), Song et al. 2023, appendix C; mu0 while N(k) stays s0.

    N(k) and s0 count angles.
    """
    return first ** ((curriculum(0.0) + 1) / (curriculum(progress) + 1))


@dataclass(frozen=True)
class LogNormal:
    """Angles whose log tan t is normal: the papers' log sigma, less the log of their sigma_data."""

    mean: float
    std: float

    def share(self, t: Tensor) -> Tensor:
        """The share of angles below t (Song & Dhariwal 2023, section 3.5, its error functions)."""
        return torch.special.ndtr((t.tan().log() - self.mean) / self.std)

    def tan(self, level: Tensor, top: float) -> Tensor:
        """The inverse of share, as tan t: at least 0.001, at most that of the angle `top`."""
        ratio = (self.mean + self.std * torch.special.ndtri(level)).exp()
        return ratio.clamp(1e-3, math.tan(top))


def uniform(angles: Tensor) -> Tensor:
    """Every pair of a list equally often (Song et al. 2023, algorithm 2)."""
    return torch.arange(len(angles), device=angles.device)


def neighbours(angles: Tensor, share: Share = uniform) -> Pairs:
    """Neighbouring angles of one list, a pair as often as `share` grows from one to the other."""

    def pairs(level: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        below = share(angles).to(level.dtype)
        i = torch.searchsorted(below[1:] / below[-1], level, right=True)
        return angles[i + 1], angles[i]

    return pairs


def growing(angles: Angles, curriculum: Curriculum, share: Share = uniform) -> Pairs:
    """Neighbouring angles of the list that the curriculum has come to."""
    lists = cache(angles)

    def pairs(level: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        return neighbours(lists(curriculum(progress)), share)(level, progress)

    return pairs


def tightening(top: float, stages: int, proposal: LogNormal) -> Pairs:
    """Geng et al. 2024, section 4: tan t log-normal, s approaching t stage by stage.

    tan s / tan t = 1 - n(t) / 2^stage, at least 0, stage = 1, 2, ..., with
    n(t) = 1 + 8 sigmoid(-tan t / 2) (their sigma is tan t / 2). The first stage has s = 0
    wherever tan t < 3.9: there it is diffusion training.
    """

    def pairs(level: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        ratio = proposal.tan(level, top)
        gap = (1 + 8 * torch.sigmoid(-ratio / 2)) / 2 ** int(1 + progress * stages)
        return ratio.atan(), (ratio * (1 - gap).clamp(min=0)).atan()

    return pairs


def to_data(t: Tensor) -> Tensor:
    """One segment: every angle's ends at the data."""
    return torch.zeros_like(t)


def segments(borders: Tensor) -> Ends:
    """Between neighbouring borders, ascending from 0 (Heek et al. 2024, section 3.1).

    A border belongs to the segment below it: a student's step starts there.
    """
    inner = borders[1:-1] + 1e-9  # a border that rounding put above itself is one still
    return lambda t: borders[torch.searchsorted(inner, t)]
