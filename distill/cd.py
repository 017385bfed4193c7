"""Consistency distillation (Song et al. 2023): `python -m distill.consistency`."""

from dataclasses import dataclass

from torch import nn

from diffusion.config import FitConfig
from diffusion.model import Model
from distill import discrete, frechet, shared
from distill.discrete import Consistency, matching
from distill.pairs import CURRICULA, Angles, growing
from distill.steps import Denoise


@dataclass(frozen=True)
class Loss(frechet.FrechetLoss, discrete.NeighbourLoss):
    """How the student is compared with its target, between neighbours of a list of noise levels."""

    solver: discrete.Solver = "heun"
    target_ema: float = 0.95
    distance: discrete.Distance = "l2"
    weight: discrete.Weight = "one"


@dataclass(frozen=True)
class Options(shared.ConsistencyOptions):
    """cd: learn the way from any noise level straight to an image from the teacher's steps (Song et
    al. 2023)."""

    loss: Loss = Loss()


# from the teacher's step few large batches beat many small ones at as many images
DIGITS = FitConfig(iterations=300, batch_size=512, learning_rate=3e-3, warmup=20, ema=0.99)
FITS = shared.FITS | {"digits": DIGITS}
PRESETS = {data: Options(fit=fit) for data, fit in FITS.items()}


def objective(loss: Loss, teacher: Denoise, student: nn.Module, angles: Angles) -> Consistency:
    """f(x_t, t) = f(x_s, s) on neighbouring angles, x_s by the teacher's step from x_t.

    Song et al. 2023, algorithm 2. The second f is that of a slow average of the student.
    """
    curriculum = CURRICULA[loss.curriculum](loss.num_angles)
    pairs = growing(angles, curriculum)
    return matching(loss, teacher, student, angles, pairs, curriculum)


def distill(options: Options) -> Model:
    """The student of these options: loaded where it is finished, else trained."""
    return shared.train("cd", options, objective)
