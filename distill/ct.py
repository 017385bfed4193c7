"""Consistency training (Song et al. 2023): `python -m distill.consistency --mode ct`."""

from dataclasses import dataclass

from torch import nn

from diffusion.model import Model
from distill import discrete, shared
from distill.discrete import Consistency, matching
from distill.pairs import CURRICULA, Angles, growing
from distill.steps import Denoise


@dataclass(frozen=True)
class Loss(discrete.NeighbourLoss):
    """How the student is compared with its target, between neighbours of a list of noise levels."""

    solver: discrete.Solver = "data"
    curriculum: discrete.Growth = "root"
    # The paper's 150 and 0.9 are for 800,000 iterations: in the thousands of here its targets are
    # too slow to carry the data from the first pair to the last.
    num_angles: int = 80
    target_ema: float = 0.1
    distance: discrete.Distance = "l2"
    weight: discrete.Weight = "one"


@dataclass(frozen=True)
class Options(shared.ConsistencyOptions):
    """ct: learn the way from any noise level straight to an image from the data alone, from random
    weights on (Song et al. 2023)."""

    loss: Loss = Loss()


PRESETS = {data: Options(fit=fit) for data, fit in shared.FITS.items()}


def objective(loss: Loss, teacher: Denoise, student: nn.Module, angles: Angles) -> Consistency:
    """f(x_t, t) = f(x_s, s) on neighbouring angles, more and more of them.

    Song et al. 2023, algorithm 3: x_s is x0 in less of the same noise (eq. 10), and the second f is
    that of an average of the student, slower as the angles come closer.
    """
    curriculum = CURRICULA[loss.curriculum](loss.num_angles)
    pairs = growing(angles, curriculum)
    return matching(loss, teacher, student, angles, pairs, curriculum)


def distill(options: Options) -> Model:
    """The student of these options: loaded where it is finished, else trained."""
    return shared.train("ct", options, objective, from_teacher=False)
