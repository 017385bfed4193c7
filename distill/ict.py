"""Improved consistency training (Song & Dhariwal 2023): distill.consistency --mode ict."""

from dataclasses import dataclass

from torch import nn

from diffusion.model import Model
from distill import discrete, shared
from distill.discrete import Consistency, matching
from distill.pairs import CURRICULA, Angles, LogNormal, growing
from distill.steps import Denoise

# The paper's P_mean = -1.1 and P_std at its sigma_data = 1/2: tan t is twice its sigma.
NOISE = LogNormal(mean=-0.4, std=2.0)


@dataclass(frozen=True)
class Loss(discrete.NeighbourLoss):
    """How the student is compared with its target, between neighbours of a list of noise levels."""

    solver: discrete.Solver = "data"
    curriculum: discrete.Growth = "doubling"
    num_angles: int = 160  # the paper's 1280 is for 400,000 iterations
    target_ema: float = 0.0
    distance: discrete.Distance = "pseudo-huber"
    weight: discrete.Weight = "karras"


@dataclass(frozen=True)
class Options(shared.ConsistencyOptions):
    """ict: learn as ct does, with what made that better: no averaged target, a smooth distance,
    stages (Song & Dhariwal 2023)."""

    loss: Loss = Loss()


PRESETS = {data: Options(fit=fit) for data, fit in shared.FITS.items()}


def objective(loss: Loss, teacher: Denoise, student: nn.Module, angles: Angles) -> Consistency:
    """f(x_t, t) = f(x_s, s) on neighbouring angles, whose number doubles stage by stage.

    Song & Dhariwal 2023, section 3: a pair is drawn as often as log-normal noise falls between its
    angles (3.5), and the second f is the student's own.
    """
    curriculum = CURRICULA[loss.curriculum](loss.num_angles)
    pairs = growing(angles, curriculum, NOISE.share)
    return matching(loss, teacher, student, angles, pairs, curriculum)


def distill(options: Options) -> Model:
    """The student of these options: loaded where it is finished, else trained."""
    return shared.train("ict", options, objective, from_teacher=False)
