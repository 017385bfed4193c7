"""Which noise levels a training step sees: a proposal for each image's level in [0, 1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn

from diffusion.batches import Batch
from diffusion.training import Follower, Nets, Objective

Levels = Callable[[Tensor, Tensor], Tensor]  # (angles ascending from 0, level (B,)) -> t (B,)


def uniform(angles: Tensor, level: Tensor) -> Tensor:
    """One of the list's angles but 0, all alike."""
    return angles[1 + (level * (len(angles) - 1)).long()]


def log_normal(angles: Tensor, level: Tensor) -> Tensor:
    """tan t log-normal, as EDM's sigma / sigma_data (Karras et al. 2022, table 1), within the list.

    With the weighting "v" the objective is then theirs.
    """
    mean, std = -1.2 - math.log(0.5), 1.2
    low, high = torch.special.ndtr((torch.stack([angles[1], angles[-1]]).tan().log() - mean) / std)
    t = (mean + std * torch.special.ndtri(low + level * (high - low))).exp().atan()
    return t.clamp(angles[1], angles[-1])  # what rounding leaves outside


class LossHistory(nn.Module):
    """A running mean of the squared loss in equal bins of the level, and the proposal from it.

    Each bin is proposed in proportion to the root of its mean, which makes the weighted loss's
    variance least, and weighted by 1 / p, which keeps its expectation (Nichol & Dhariwal 2021,
    section 3.3). Until every bin has been seen 10 times the proposal is uniform, and a
    thousandth of it always is, so that no bin is forgotten.

    Theirs keeps each step's last 10 losses; a bin's mean here forgets at the same pace.
    """

    mean_square: Tensor
    seen: Tensor
    fresh: Tensor

    def __init__(self, bins: int = 100):
        super().__init__()
        self.register_buffer("mean_square", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(bins, dtype=torch.int64))
        # this step's sums and counts, by bin; empty whenever the state is saved
        self.register_buffer("fresh", torch.zeros(2, bins, dtype=torch.float64), persistent=False)

    def proposal(self) -> Tensor:
        """(bins,) float64, of sum 1."""
        norm = self.mean_square.sqrt().clamp(min=1e-30)
        norm = torch.where(self.seen.min() >= 10, norm, torch.ones_like(norm))
        return 0.999 * norm / norm.sum() + 0.001 / len(norm)

    def place(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform levels (B,) -> the proposal's, through its inverse CDF, and weights (B,)."""
        p = self.proposal()
        ends = p.cumsum(0)
        chosen = torch.searchsorted(ends, level * ends[-1], right=True).clamp(max=len(p) - 1)
        within = 1 - ((ends[chosen] - level * ends[-1]) / p[chosen]).clamp(2**-40, 1)
        return (chosen + within) / len(p), 1 / (len(p) * p[chosen])

    @torch.no_grad()
    def record(self, level: Tensor, loss: Tensor) -> None:
        """Unweighted losses (B,) of this process's images at levels (B,) of the proposal."""
        bins = F.one_hot((level * len(self.seen)).long(), len(self.seen)).double()
        self.fresh += torch.stack([loss.double().square(), torch.ones_like(level)]) @ bins

    @torch.no_grad()
    def follow(self, nets: Nets, done: int, progress: float = 0.0) -> None:
        """After a step: every process's losses join the means, the same in each."""
        total, count = reduce(self.fresh, "sum")
        self.seen += count > 0
        pace = torch.where(count > 0, 1 / self.seen.clamp(1, 10), torch.zeros_like(total))
        self.mean_square.lerp_(total / count.clamp(min=1), pace)
        self.fresh.zero_()


@dataclass(frozen=True)
class ImportanceSampling:
    """An objective of the same expected gradient, which looks more often where its loss is large.

    It moves each image's level to where the history proposes, and divides by how much more often
    that is; any objective that is a function of the level will do.
    """

    objective: Objective
    history: LossHistory

    @property
    def followers(self) -> dict[str, Follower]:
        return {**self.objective.followers, "losses": self.history}

    def __call__(self, student: nn.Module, batch: Batch, progress: float) -> Tensor:
        level, weight = self.history.place(batch.level)
        loss = self.objective(student, batch._replace(level=level), progress)
        self.history.record(level, loss.detach())
        return loss * weight.float()
