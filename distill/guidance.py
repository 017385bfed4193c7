"""Distillation of classifier-free guidance (Meng et al. 2023): `python -m distill.guidance`.

Stage one of two: a network that takes the guidance weight as an input does in one call what a
guided teacher does in two. It samples as the teacher does; `python -m distill.progressive
--teacher runs/NAME/guided` then halves its steps, at every weight of the range at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.batches import Batch
from diffusion.checkpoint import Card
from diffusion.circle import add_noise, x0_loss
from diffusion.config import FitConfig
from diffusion.console import UserError, run
from diffusion.denoiser import Denoiser
from diffusion.model import Model, build
from diffusion.noise import seed32
from diffusion.runs import train_model
from diffusion.training import Average
from distill import shared
from students.start import StudentOptions, begin, parse, student_card
from teachers.levels import uniform

LEARNED = "ancestral-learned"  # takes a variance that is not trained here


@dataclass(frozen=True)
class Options(StudentOptions):
    """Make a student that does a guided teacher's two calls a step in one (Meng et al. 2023).

    The guidance weight becomes an input of the network."""

    teacher: Path = Path("runs/digits-classes/teacher")
    """The run or checkpoint of a teacher that was trained with --num-classes."""
    guidance: tuple[float, float] = (1.0, 4.0)
    """The least and the greatest weight that the student learns. 1 is no guidance and must be
    within."""
    own_guidance: float = 1.5
    """The weight that the student samples with if students.generate is given no --guidance. On
    digits 1.5 is the least weight measured at which every image is of its class."""
    fit: FitConfig = field(default_factory=FitConfig)


PRESETS = {data: Options(fit=fit) for data, fit in shared.FITS.items()}


@dataclass(frozen=True)
class Guidance:
    """The student's x0 = the teacher's guided x0, at a weight of its own for each image.

    Meng et al. 2023, section 3, stage one, with velocity's weighting. batch.label is a
    diffusion.denoiser.Condition, which a teacher without a guidance input answers in two calls.
    """

    teacher: nn.Module
    angles: Tensor
    """(N + 1,) float64, ascending from 0: the teacher's."""
    averages: Sequence[Average] = ()

    def __call__(self, student, batch: Batch, progress: float) -> Tensor:
        t = uniform(self.angles, batch.level)
        x_t = add_noise(batch.x0, batch.eps, t)
        with torch.no_grad():
            target = self.teacher(x_t, t, batch.label)
        return x0_loss(student(x_t, t, batch.label), target, t, "v")


def with_guidance_input(teacher: Denoiser, guidance: tuple[float, float], seed: int) -> Denoiser:
    """The teacher's network and weights with a guidance input, which changes nothing as yet."""
    torch.manual_seed(seed32(seed))
    student = build(replace(teacher.net.config, guidance=guidance), teacher.precision)
    missing, unexpected = student.net.load_state_dict(teacher.net.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("guidance.") for name in missing)
    return student


def distill(options: Options) -> Model:
    """The guided student of these options: loaded where it is finished, else trained."""
    low, high = options.guidance
    if not 0 <= low <= 1 <= high < float("inf") or low == high:
        raise UserError(
            "--guidance must be a least and a greatest weight, from 0 on and with 1 in their "
            f"range, such as 1 4, got {low:g} {high:g}"
        )
    if not low <= options.own_guidance <= high:
        raise UserError(
            f"--own-guidance must be in --guidance's range {low:g} to {high:g}, "
            f"got {options.own_guidance:g}"
        )
    options, teacher, dataset, out = begin(options, "guided")
    if not teacher.card.net["num_classes"]:
        raise UserError(
            f"{options.teacher} knows no classes to guide towards: train a teacher with "
            "--num-classes"
        )
    if teacher.denoiser.guidance:
        raise UserError(
            f"{options.teacher} takes its guidance weight as an input already: give it to "
            "distill.progressive, or name its own teacher"
        )
    student = with_guidance_input(teacher.denoiser, options.guidance, options.fit.seed)
    inherited = student_card(teacher) | {
        "net": teacher.card.net | {"guidance": options.guidance},
        "guidance": options.own_guidance,
        "shifted": teacher.card.shifted,  # its plans are the teacher's
    }
    card = Card(
        method="guided",
        sampler="ancestral" if teacher.card.sampler == LEARNED else teacher.card.sampler,
        plans=teacher.card.plans,
        solvers=tuple(solver for solver in teacher.card.solvers if solver != LEARNED),
        training={"own_guidance": options.own_guidance},
        **inherited,
    )
    objective = Guidance(teacher.denoiser, teacher.schedule.to(teacher.device))
    return train_model(out, student, objective, dataset, options.fit, card)


def main() -> None:
    distill(parse(PRESETS, "python -m distill.guidance"))


if __name__ == "__main__":
    run(main)
