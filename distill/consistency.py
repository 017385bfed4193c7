"""Consistency distillation and training: `python -m distill.consistency --mode cd|ct|ect`."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.batches import Batch
from diffusion.checkpoint import Card
from diffusion.circle import add_noise, rotate
from diffusion.config import FitConfig
from diffusion.console import UserError, run
from diffusion.model import Model, build
from diffusion.runs import train_model
from diffusion.schedules import even
from diffusion.training import Average, frozen_copy
from students.start import StudentOptions, find_teacher, student_card
from teachers.presets import preset

Step = Callable[[Batch, Tensor, Tensor, Tensor], Tensor]  # (batch, x_t, t, s) -> x_s
Pairs = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (level, progress) -> t, s


@dataclass(frozen=True)
class Consistency:
    """f(x_t, t) = f(x_s, s), where `step` goes from x_t to x_s (Song et al. 2023, eq. 7 and 10).

    s = 0 needs no case: there f is the identity, and the target is x_s itself.
    """

    step: Step
    pairs: Pairs
    distance: Callable[[Tensor], Tensor]
    """Difference (B, C, H, W) -> (B,)."""
    weight: Callable[[Tensor, Tensor], Tensor]
    """(t, s) -> (B,)."""
    target: nn.Module | None = None
    """What judges x_s: an average of the student, or None for the student itself."""
    averages: Sequence[Average] = ()

    def __call__(self, student, batch: Batch, progress: float) -> Tensor:
        t, s = self.pairs(batch.level, progress)
        x_t = add_noise(batch.x0, batch.eps, t)
        with torch.no_grad():
            x_s = self.step(batch, x_t, t, s)
            torch.manual_seed(batch.seed)
            target = (self.target or student)(x_s, s, batch.label)
        torch.manual_seed(batch.seed)  # the same dropout mask for both passes
        loss = self.distance(student(x_t, t, batch.label) - target)
        return loss * self.weight(t, s).float()


def euler_step(teacher) -> Step:
    """One DDIM step of the teacher."""
    return lambda batch, x_t, t, s: rotate(x_t, teacher(x_t, t, batch.label), t, s)


def heun_step(teacher) -> Step:
    """One second-order step of the teacher: the trapezoid rule in cot t, diffusion.samplers.heun."""

    def step(batch: Batch, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x0 = teacher(x_t, t, batch.label)
        x0_s = teacher(rotate(x_t, x0, t, s), s, batch.label)
        return rotate(x_t, (x0 + x0_s) / 2, t, s)

    return step


def data_step(batch: Batch, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The true x0 in the teacher's place: consistency training."""
    return rotate(x_t, batch.x0, t, s)


def neighbours(angles: Tensor) -> Pairs:
    """Neighbouring angles of one list, uniformly (Song et al. 2023, algorithm 2)."""

    def pairs(level: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        i = (level * (len(angles) - 1)).long()
        return angles[i + 1], angles[i]

    return pairs


def growing(lists: list[Tensor]) -> Pairs:
    """Neighbouring angles of ever longer lists, each for an equal share of the training."""

    def pairs(level: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        return neighbours(lists[int(progress * len(lists))])(level, progress)

    return pairs


def tightening(top: float, stages: int, mean: float = -0.4, std: float = 2.0) -> Pairs:
    """Geng et al. 2024, section 4: tan t log-normal, s approaching t stage by stage.

    tan s / tan t = 1 - n(t) / 2^stage, at least 0, stage = 1, 2, ..., with
    n(t) = 1 + 8 sigmoid(-tan t / 2) (their sigma is tan t / 2). The first stage has s = 0
    wherever tan t < 3.9: there it is diffusion training.
    """

    def pairs(level: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        ratio = (mean + std * math.sqrt(2) * torch.erfinv(2 * level - 1)).exp()
        ratio = ratio.clamp(1e-3, math.tan(top))
        gap = (1 + 8 * torch.sigmoid(-ratio / 2)) / 2 ** int(1 + progress * stages)
        return ratio.atan(), (ratio * (1 - gap).clamp(min=0)).atan()

    return pairs


def _pseudo_huber(difference: Tensor) -> Tensor:
    """sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(dimensions) (Song & Dhariwal 2023, section 3.3)."""
    flat = difference.flatten(1)
    c = 0.00054 * math.sqrt(flat.shape[1])
    return (flat.square().sum(1) + c * c).sqrt() - c


DISTANCES = {
    "l2": lambda difference: (difference.flatten(1).square().sum(1) + 1e-12).sqrt(),
    "pseudo-huber": _pseudo_huber,
    "squared": lambda difference: difference.flatten(1).square().mean(1),
}
WEIGHTS = {
    "one": lambda t, s: torch.ones_like(t),
    "gap": lambda t, s: 1 / (t - s),  # Song & Dhariwal 2023, section 3.5, in angles
    "sigma-gap": lambda t, s: 1 / (t.tan() - s.tan()),  # theirs, light where noise is heavy
}


@dataclass(frozen=True)
class Options(StudentOptions):
    """Distil a teacher into a model that maps any noise level straight to x0, or train one."""

    mode: Literal["cd", "ct", "ect"] = "cd"
    """cd: against the teacher's ODE steps. ct: from scratch, against the data. ect: from the
    teacher's weights, against the data, in stages."""
    solver: Literal["heun", "euler"] = "heun"
    """cd: the teacher's step."""
    num_angles: int = 16
    """cd: equal steps of the discretisation. ct: of its last stage, after 10, 20, 40, ..."""
    target_ema: float | None = None
    """Decay of the student's average that gives the target; 0 for the student itself.
    0.95 for cd, else 0, unless told."""
    distance: Literal["l2", "pseudo-huber", "squared"] | None = None
    """l2 for cd, pseudo-huber else, unless told."""
    weight: Literal["one", "gap", "sigma-gap"] | None = None
    """Of a pair's loss: 1, 1 / (t - s) or 1 / (tan t - tan s); one for cd, gap for ct, sigma-gap
    for ect, unless told."""
    stages: int = 4
    """ect: stages of equal length; the gap between t and s halves from each to the next."""
    fit: FitConfig = field(default_factory=FitConfig)

    @staticmethod
    def default(data: str) -> "Options":
        return Options(fit=preset(data).consistency)


@dataclass(frozen=True)
class Mode:
    """What a mode fills in: where its student begins, its steps and pairs, its measured defaults."""

    from_teacher: bool
    step: Callable[[Options, nn.Module], Step]
    pairs: Callable[[Options, Tensor], Pairs]
    target_ema: float
    distance: str
    weight: str


STEPS = {"euler": euler_step, "heun": heun_step}


def _doubling(options: Options, schedule: Tensor) -> Pairs:
    counts = [min(10, options.num_angles)]
    while counts[-1] < options.num_angles:
        counts.append(min(2 * counts[-1], options.num_angles))
    return growing([even(schedule, count) for count in counts])


MODES = {
    "cd": Mode(
        from_teacher=True,
        step=lambda options, teacher: STEPS[options.solver](teacher),
        pairs=lambda options, schedule: neighbours(even(schedule, options.num_angles)),
        target_ema=0.95,
        distance="l2",
        weight="one",
    ),
    "ct": Mode(
        from_teacher=False,
        step=lambda options, teacher: data_step,
        pairs=_doubling,
        target_ema=0.0,
        distance="pseudo-huber",
        weight="gap",
    ),
    "ect": Mode(
        from_teacher=True,
        step=lambda options, teacher: data_step,
        pairs=lambda options, schedule: tightening(float(schedule[-1]), options.stages),
        target_ema=0.0,
        distance="pseudo-huber",
        weight="sigma-gap",
    ),
}


def objective(options: Options, teacher: Model, student: nn.Module) -> Consistency:
    """The objective of these options; what the mode measured best fills in what they leave open."""
    mode = MODES[options.mode]
    decay = mode.target_ema if options.target_ema is None else options.target_ema
    # in training mode, so that its dropout mask is the student's
    target = frozen_copy(student).to(teacher.device).train() if decay else None
    return Consistency(
        step=mode.step(options, teacher.denoiser),
        pairs=mode.pairs(options, teacher.schedule.to(teacher.device)),
        distance=DISTANCES[options.distance or mode.distance],
        weight=WEIGHTS[options.weight or mode.weight],
        target=target,
        averages=(Average(target, lambda done: decay),) if target else (),
    )


def distill(options: Options) -> Model:
    """The consistency student of these options: loaded where it is finished, else trained."""
    if options.num_angles < 2:
        raise UserError(f"--num-angles must be at least 2, got {options.num_angles}")
    if not 0 <= (options.target_ema or 0) < 1:
        raise UserError(f"--target-ema must be in [0, 1), got {options.target_ema}")
    teacher, dataset, out = find_teacher(options, "consistency", options.fit)
    plans = {n: even(teacher.schedule, n).tolist() for n in (1, 2, 4, 8)}
    chosen = ("mode", "solver", "num_angles", "target_ema", "distance", "weight", "stages")
    card = Card(
        method=f"consistency-{options.mode}",
        sampler="consistency",
        plans=plans,
        solvers=("consistency",),
        training={name: getattr(options, name) for name in chosen},
        **student_card(teacher),
    )
    if MODES[options.mode].from_teacher:
        student = deepcopy(teacher.denoiser).requires_grad_(True)
    else:
        torch.manual_seed(options.fit.seed)
        student = build(teacher.card.net, options.fit.precision)
    aim = objective(options, teacher, student)
    return train_model(out, student, aim, dataset, options.fit, card)


def main() -> None:
    distill(StudentOptions.parse(Options, "python -m distill.consistency"))


if __name__ == "__main__":
    run(main)
