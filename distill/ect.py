"""Easy consistency tuning (Geng et al. 2024): `python -m distill.consistency --mode ect`."""

from dataclasses import dataclass, field

from torch import nn

from diffusion.config import FitConfig
from diffusion.model import Model
from distill.discrete import Consistency, matching
from distill.pairs import Angles, LogNormal, fixed, tightening
from distill.steps import Denoise
from distill.student import ConsistencyOptions, Distance, PairLoss, Solver, Weight, train

# The paper's P_mean = -1.1 and P_std at its sigma_data = 1/2: tan t is twice its sigma.
NOISE = LogNormal(mean=-0.4, std=2.0)


@dataclass(frozen=True)
class Loss(PairLoss):
    """How the student is compared with its target, between two noise levels."""

    solver: Solver = "data"
    stages: int = 4
    """Stages of equal length. From each to the next the gap between the two noise levels halves."""
    target_ema: float = 0.0
    distance: Distance = "pseudo-huber"
    weight: Weight = "sigma-gap"
    frechet: float = 0.0
    """Weight of a second loss that makes images sharper, the Fréchet distance of the student's
    images from real ones in features of the teacher's network (Mathiasen & Hvilshøj 2020). 0:
    none."""


@dataclass(frozen=True)
class Options(ConsistencyOptions):
    """ect: learn from the data or the teacher's steps, from diffusion training to consistency in
    stages (Geng et al. 2024)."""

    loss: Loss = Loss()
    fit: FitConfig = field(default_factory=FitConfig)


FITS = {
    "digits": FitConfig(iterations=1000, learning_rate=2e-3, warmup=20, ema=0.99),
    "fashion-mnist": FitConfig(iterations=20_000, learning_rate=2e-4, warmup=200, ema=0.999),
    "cifar10": FitConfig(
        iterations=200_000, batch_size=128, learning_rate=1e-4, warmup=1000, ema=0.9999, flip=True
    ),
    "folder": FitConfig(minutes=15, batch_size=64, learning_rate=5e-4, ema=0.99),
    "folder, GPU": FitConfig(minutes=60, batch_size=128, learning_rate=2e-4, ema=0.99),
}
PRESETS = {data: Options(fit=fit) for data, fit in FITS.items()}


def objective(loss: Loss, teacher: Denoise, student: nn.Module, angles: Angles) -> Consistency:
    """f(x_t, t) = f(x_s, s) on log-normal angles t, and an s that is 0 at first and approaches t.

    Geng et al. 2024, section 4: from diffusion training to consistency. The second f is the
    student's own.
    """
    pairs = tightening(float(angles(1)[-1]), loss.stages, NOISE)
    return matching(loss, teacher, student, angles, pairs, fixed(1))


def distill(options: Options) -> Model:
    """The student of these options: loaded where it is finished, else trained."""
    return train("ect", options, objective)
