"""Mid-training of a consistency student (Hu et al. 2025, CMT): `python -m distill.midtraining`."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.batches import Batch
from diffusion.checkpoint import Card
from diffusion.circle import x0_loss
from diffusion.condition import Condition, take
from diffusion.console import at_least, run
from diffusion.model import Model
from diffusion.plan import MOST_STEPS, plan
from diffusion.runs import train_model
from diffusion.samplers import sample
from diffusion.schedules import even, respace
from diffusion.training import Followers, one_network
from distill import progressive
from students.start import StudentOptions, begin, parse, student_card

SOLVER = "dpm-solver++"


@dataclass(frozen=True)
class Options(StudentOptions):
    """Prepare a student for consistency training: teach it where the teacher's trajectories end.

    Give the result to distill.consistency --start (Hu et al. 2025)."""

    solver_steps: int = 16
    """Steps of DPM-Solver++ by which the teacher goes from noise to image. The student learns at
    the same number of noise levels."""
    weighting: Literal["truncated", "v"] = "truncated"
    """How much each noise level counts, as a weight of x0's squared error. truncated: max(SNR, 1);
    v: SNR + 1."""


# for as long as a round of halving
PRESETS = {data: Options(fit=preset.fit) for data, preset in progressive.PRESETS.items()}


@dataclass(frozen=True)
class Midtraining:
    """f(x_t, t) = the end of the teacher's short trajectory through x_t (Hu et al. 2025).

    The target is fixed and the same from every angle: no stopped gradient, no second network.
    B images share ceil(B / N) trajectories of N calls, so that each costs about one call of the
    teacher.
    """

    teacher: nn.Module
    angles: Tensor
    """(N + 1,) float64, ascending from 0: the trajectory's."""
    weighting: str = "truncated"
    followers: Followers = field(default_factory=dict)

    def __call__(self, student: nn.Module, batch: Batch, progress: float) -> Tensor:
        num_steps, size = len(self.angles) - 1, len(batch.eps)
        count = math.ceil(size / num_steps)
        with torch.no_grad():
            noise, condition = batch.eps[:count], take(batch.condition, slice(count))
            points, end = trajectory(self.teacher, noise, self.angles, condition)
        row = torch.arange(size, device=end.device) % count
        step = (batch.level * num_steps).long()  # level is stratified: each angle in turn
        t = self.angles[1 + step]
        condition = take(condition, row)
        x0 = student(points[step, row], t, condition, dropout=batch.dropout())
        return x0_loss(x0, end[row], t, self.weighting)


def trajectory(
    teacher: Callable, noise: Tensor, angles: Tensor, condition: Condition | None = None
) -> tuple[Tensor, Tensor]:
    """DPM-Solver++'s points (N, B, C, H, W) at angles[1:] and its end (B, C, H, W)."""
    points = []

    def recorded(x_t: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        points.append(x_t)
        return teacher(x_t, t, condition)

    end = sample(recorded, iter([noise]), SOLVER, angles, condition)
    return torch.stack(points[::-1]), end


def distill(options: Options) -> Model:
    """The mid-trained student of these options: loaded where it is finished, else trained."""
    at_least(2, options, "solver_steps", most=MOST_STEPS)
    options, teacher, dataset, out = begin(options, "midtraining")
    angles = even(teacher.schedule, options.solver_steps, teacher.card.shift)
    card = Card(
        method="midtraining",
        plans=tuple(
            plan("consistency", respace(angles, n), teacher.card.guidance)
            for n in (1, 2, 4, 8)
            if n <= options.solver_steps
        ),
        abilities=("jump",),
        training={"solver_steps": options.solver_steps, "weighting": options.weighting},
        **student_card(teacher),
    )
    student = deepcopy(teacher.denoiser).requires_grad_(True)
    objective = Midtraining(teacher.denoiser, angles.to(teacher.device), options.weighting)
    return train_model(out, one_network(student, objective), dataset, options.fit, card)


def main() -> None:
    distill(parse(PRESETS, "python -m distill.midtraining"))


if __name__ == "__main__":
    run(main)
