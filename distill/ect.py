"""Easy consistency tuning (Geng et al. 2024): `python -m distill.consistency --mode ect`."""

from dataclasses import dataclass

from torch import nn

from diffusion.model import Model
from distill import discrete, frechet, shared
from distill.discrete import Consistency, matching
from distill.pairs import Angles, LogNormal, fixed, tightening
from distill.steps import Denoise

# The paper's P_mean = -1.1 and P_std at its sigma_data = 1/2: tan t is twice its sigma.
NOISE = LogNormal(mean=-0.4, std=2.0)


@dataclass(frozen=True)
class Loss(frechet.FrechetLoss, discrete.PairLoss):
    """How the student is compared with its target, between two noise levels."""

    solver: discrete.Solver = "data"
    stages: int = 4
    """Stages of equal length. From each to the next the gap between the two noise levels halves."""
    target_ema: float = 0.0
    distance: discrete.Distance = "pseudo-huber"
    weight: discrete.Weight = "sigma-gap"


@dataclass(frozen=True)
class Options(shared.ConsistencyOptions):
    """ect: learn from the data or the teacher's steps, from diffusion training to consistency in
    stages (Geng et al. 2024)."""

    loss: Loss = Loss()


PRESETS = {data: Options(fit=fit) for data, fit in shared.FITS.items()}


def objective(loss: Loss, teacher: Denoise, student: nn.Module, angles: Angles) -> Consistency:
    """f(x_t, t) = f(x_s, s) on log-normal angles t, and an s that is 0 at first and approaches t.

    Geng et al. 2024, section 4: from diffusion training to consistency. The second f is the
    student's own.
    """
    pairs = tightening(float(angles(1)[-1]), loss.stages, NOISE)
    return matching(loss, teacher, student, angles, pairs, fixed(1))


def distill(options: Options) -> Model:
    """The student of these options: loaded where it is finished, else trained."""
    return shared.train("ect", options, objective)
