"""Progressive distillation (Salimans & Ho 2022): `python -m distill.progressive`."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.batches import Batch
from diffusion.checkpoint import Card
from diffusion.circle import add_noise, merge_steps, rotate, x0_loss
from diffusion.config import FitConfig
from diffusion.console import UserError, run, say
from diffusion.model import Model
from diffusion.runs import train_model
from diffusion.schedules import halve, respace
from diffusion.training import Average
from students.start import StudentOptions, find_teacher, student_card
from teachers.presets import preset


@dataclass(frozen=True)
class Halving:
    """The student's one rotation over `factor` steps of the list = the teacher's `factor` rotations.

    table: (n, factor + 1) float64 from steps_table: the teacher's angles in each student step.
    """

    teacher: nn.Module
    table: Tensor
    weighting: str = "truncated"
    averages: Sequence[Average] = ()

    def __call__(self, student, batch: Batch, progress: float) -> Tensor:
        row = (batch.level * len(self.table)).long()
        angles = list(self.table[row].unbind(1))
        t = angles[0]
        x_t = add_noise(batch.x0, batch.eps, t)
        with torch.no_grad():
            target = merged_target(self.teacher, x_t, angles, batch.label)
        return x0_loss(student(x_t, t, batch.label), target, t, self.weighting)


def merged_target(teacher, x_t: Tensor, angles: list[Tensor], label=None) -> Tensor:
    """The x0 with which one rotation angles[0] -> angles[-1] arrives where the teacher's steps do."""
    predictions = []
    for t, s in pairwise(angles):
        predictions.append(teacher(x_t, t, label))
        x_t = rotate(x_t, predictions[-1], t, s)
    return merge_steps(predictions, angles)


def steps_table(angles: Tensor, factor: int) -> Tensor:
    """(n, factor + 1): the angles, descending, that each step of halve(angles, factor) spans.

    The shorter step at the data end is filled up with steps of length zero at its noisy side,
    which weigh nothing.
    """
    last = len(angles) - 1
    start = torch.arange(last, 0, -factor).flip(0)[:, None]
    end = (start - factor).clamp(min=0)
    within = torch.arange(factor, -1, -1)
    return angles[torch.minimum(start, end + within)]


@dataclass(frozen=True)
class Options(StudentOptions):
    """Halve a teacher's sampling steps, round after round, down to one."""

    start_steps: int = 1000
    """Steps that the first round's teacher takes; at most the teacher's own 1000."""
    end_steps: int = 1
    """Where to stop."""
    factor: int = 2
    """Steps merged into one in each round."""
    weighting: Literal["truncated", "v"] = "truncated"
    """max(SNR, 1) or SNR + 1, as weights of x0's squared error."""
    last_rounds: float = 2.5
    """Rounds that end at 2 steps or fewer train this many times as long."""
    fit: FitConfig = field(default_factory=FitConfig)

    @staticmethod
    def default(data: str) -> "Options":
        chosen = preset(data)
        return Options(fit=chosen.halving, start_steps=chosen.start_steps)


def distill(options: Options) -> list[Model]:
    """One student per round, each in its own folder and usable on its own."""
    if options.factor < 2:
        raise UserError(f"--factor must be at least 2, got {options.factor}")
    if options.end_steps < 1:
        raise UserError(f"--end-steps must be at least 1, got {options.end_steps}")
    if options.last_rounds <= 0:
        raise UserError(f"--last-rounds must be above 0, got {options.last_rounds:g}")
    teacher, dataset, out = find_teacher(options, "progressive", options.fit)
    angles = respace(teacher.schedule, options.start_steps)
    students = []
    while len(angles) - 1 > options.end_steps:
        table = steps_table(angles, options.factor)
        angles = halve(angles, options.factor)
        num_steps = len(angles) - 1
        longer = options.last_rounds if num_steps <= 2 else 1.0
        fit = replace(options.fit, iterations=round(options.fit.iterations * longer))
        say(f"round: {num_steps} steps, from the teacher's {options.factor} for each")
        card = Card(
            method="progressive",
            sampler="ddim",
            plans={num_steps: angles.tolist()},
            solvers=(),
            training={"factor": options.factor, "weighting": options.weighting},
            **student_card(teacher),
        )
        objective = Halving(teacher.denoiser, table.to(teacher.device), options.weighting)
        student = deepcopy(teacher.denoiser).requires_grad_(True)
        teacher = train_model(out / f"{num_steps:04d}", student, objective, dataset, fit, card)
        students.append(teacher)
    if not students:
        raise UserError(
            f"--start-steps {options.start_steps} is not above --end-steps {options.end_steps}"
        )
    return students


def main() -> None:
    distill(StudentOptions.parse(Options, "python -m distill.progressive"))


if __name__ == "__main__":
    run(main)
