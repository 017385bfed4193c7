"""Progressive distillation (Salimans & Ho 2022): `python -m distill.progressive`."""

import math
from collections.abc import Mapping, Sequence
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
from diffusion.folders import check_claim, check_home
from diffusion.model import Model, load
from diffusion.plan import plan
from diffusion.runs import train_model
from diffusion.schedules import halve, respace, shifted
from diffusion.training import Average, Followers, frozen_copy, one_network
from distill.steps import STEPS, Step
from students.start import (
    StudentOptions,
    begin,
    images_spent,
    parse,
    student_card,
)
from teachers.presets import for_data


@dataclass(frozen=True)
class Options(StudentOptions):
    """Make students of a teacher that need fewer and fewer steps, down to one (Salimans & Ho 2022).

    Each round merges the sampling steps of its teacher, and its student teaches the next round."""

    start_steps: int = 1000
    """Steps that the teacher takes in the first round, at most its own 1000."""
    solver: Literal["euler", "heun"] = "euler"
    """How the teacher takes the steps of the first round. euler: DDIM's step, one call; heun: a
    step of second order, two calls, so that far fewer steps are enough."""
    rounds: tuple[int, ...] = ()
    """The students' numbers of steps, one for each round, such as 16 4 1. If left out: those that
    measured best for the data, each trained for a share of --iterations."""
    factor: int | None = None
    """In place of --rounds: how many steps each round merges into one. With --end-steps alone:
    2."""
    end_steps: int | None = None
    """In place of --rounds: the last student's steps. With --factor alone: 1."""
    round_iterations: tuple[int, ...] = ()
    """Optimizer steps of each round, one number a round, in place of --iterations for all."""
    last_rounds: float | None = None
    """How many times --iterations a round to 2 steps or to 1 trains. If left out: the share that
    measured best for the data, or 2.5 if --rounds names other numbers of steps."""
    weighting: Literal["truncated", "v"] = "truncated"
    """How much each noise level counts, as a weight of x0's squared error. truncated: max(SNR, 1);
    v: SNR + 1 (Salimans & Ho 2022, section 4)."""
    next_teacher: Literal["ema", "raw"] = "ema"
    """Which weights of a student teach the next. ema: the average, which is kept; raw: the last
    ones."""


FOLDER = FitConfig(minutes=20, batch_size=64, learning_rate=5e-4, anneal="linear", ema=0.99)
PRESETS = {
    # 16 steps of Heun teach better than 32 of DDIM; every round inherits the first one's errors
    "digits": Options(
        start_steps=16,
        solver="heun",
        fit=FitConfig(
            iterations=500, batch_size=128, learning_rate=1e-3, warmup=20, anneal="linear", ema=0.98
        ),
    ),
    "fashion-mnist": Options(
        start_steps=64,
        fit=FitConfig(iterations=2500, learning_rate=2e-4, warmup=50, anneal="linear", ema=0.99),
    ),
    "cifar10": Options(
        fit=FitConfig(
            iterations=25_000,
            batch_size=128,
            learning_rate=1e-4,
            warmup=500,
            anneal="linear",
            flip=True,
        )
    ),
    "emoji": Options(start_steps=16, solver="heun", fit=replace(FOLDER, minutes=13)),
    "folder": Options(start_steps=64, fit=FOLDER),
    "folder, GPU": Options(
        start_steps=64, fit=replace(FOLDER, minutes=60, batch_size=128, learning_rate=2e-4)
    ),
}
# The students' numbers of steps, and each round's share of --iterations; none: halve down to 1.
ROUNDS = {
    "digits": {8: 0.9, 4: 1.2, 2: 0.6, 1: 0.7},
    "fashion-mnist": {},
    "cifar10": {},
    "emoji": {8: 0.625, 4: 0.75, 2: 1.125, 1: 1.5},
    "folder": {8: 0.625, 4: 0.75, 2: 1.125, 1: 1.5},
    "folder, GPU": {8: 0.625, 4: 0.75, 2: 1.125, 1: 1.5},
}


@dataclass(frozen=True)
class Halving:
    """The student's one rotation over some steps of the teacher's list = the teacher's own."""

    step: Step
    """The teacher's, from one angle of its list to the next."""
    table: Tensor
    """(n, k + 1) float64 from steps_table: the teacher's angles in each student step."""
    weighting: str = "truncated"
    followers: Followers = field(default_factory=dict)

    def __call__(self, student: nn.Module, batch: Batch, progress: float) -> Tensor:
        row = (batch.level * len(self.table)).long()
        angles = list(self.table[row].unbind(1))
        t = angles[0]
        x_t = add_noise(batch.x0, batch.eps, t)
        with torch.no_grad():
            target = merged_target(self.step, batch, x_t, angles)
        return x0_loss(
            student(x_t, t, batch.condition, dropout=batch.dropout()), target, t, self.weighting
        )


def merged_target(step: Step, batch: Batch, x_t: Tensor, angles: list[Tensor]) -> Tensor:
    """The x0 whose rotation angles[0] -> angles[-1] arrives where the teacher's steps do."""
    predictions = []
    for t, s in pairwise(angles):
        predictions.append(step(batch, x_t, t, s))
        x_t = rotate(x_t, predictions[-1], t, s)
    return merge_steps(predictions, angles)


def merged(angles: Tensor, num_steps: int) -> Tensor:
    """A student's list of `num_steps` out of its teacher's.

    Every k-th angle, as halve keeps them, where that makes so many; else evenly spread ones.
    """
    kept = halve(angles, math.ceil((len(angles) - 1) / num_steps))
    return kept if len(kept) - 1 == num_steps else respace(angles, num_steps)


def steps_table(angles: Tensor, kept: Tensor) -> Tensor:
    """(n, k + 1): the angles, descending, that each step of `kept`, a part of the list, spans.

    k is the most steps that one of them merges. A shorter one is filled up with steps of length
    zero at its noisy side, which weigh nothing.
    """
    at = torch.searchsorted(angles, kept)
    start, end = at[1:, None], at[:-1, None]
    within = torch.arange(int((start - end).max()), -1, -1)
    return angles[torch.minimum(start, end + within)]


def counts(options: Options, usual: Sequence[int] = ()) -> list[int]:
    """The students' numbers of steps, round by round. usual: where no option says any."""
    start, end, factor = options.start_steps, options.end_steps or 1, options.factor or 2
    if factor < 2:
        raise UserError(f"--factor must be at least 2, got {factor}")
    if options.end_steps is not None and options.end_steps < 1:
        raise UserError(f"--end-steps must be at least 1, got {options.end_steps}")
    chained = (options.factor, options.end_steps) != (None, None)
    if options.rounds and chained:
        raise UserError("--rounds names every round: leave out --factor and --end-steps")
    if options.rounds:
        chain = (start, *options.rounds)
        if not all(n > m >= 1 for n, m in pairwise(chain)):
            raise UserError(
                f"--rounds must be numbers that fall, from below --start-steps {start} to 1 or "
                f"more, such as 16 4 1, got {' '.join(map(str, options.rounds))}"
            )
        return list(options.rounds)
    if start <= end:
        raise UserError(
            f"--start-steps {start} must be above --end-steps {end}: start from more steps or end "
            "at fewer"
        )
    if usual and not chained:
        return [num_steps for num_steps in usual if num_steps < start]
    chain = [start]
    while chain[-1] > end:
        chain.append(math.ceil(chain[-1] / factor))
    return chain[1:]


def budgets(
    options: Options, counts: Sequence[int], usual: Mapping[int, float] | None = None
) -> list[int]:
    """Optimizer steps of each round. usual: shares of --iterations, where no option says any."""
    given, last = options.round_iterations, options.last_rounds
    if given and options.fit.minutes:
        raise UserError("--round-iterations says how long each round takes: leave --minutes out")
    if given and (len(given) != len(counts) or not 1 <= min(given) <= max(given) <= 10**12):
        raise UserError(
            f"--round-iterations must be a number from 1 to 10^12 for each of the {len(counts)} "
            f"rounds, to {' '.join(map(str, counts))} steps, got {' '.join(map(str, given))}"
        )
    if last is not None and not 0 < last <= 1000:
        raise UserError(f"--last-rounds must be above 0 and at most 1000, got {last:g}")
    shares = {num_steps: (last or 2.5) if num_steps <= 2 else 1.0 for num_steps in counts}
    if usual and last is None and set(counts) <= set(usual):
        shares = usual
    return list(given) or [max(1, round(options.fit.iterations * shares[n])) for n in counts]


def round_fits(
    options: Options, counts: Sequence[int], usual: Mapping[int, float] | None = None
) -> list[FitConfig]:
    """Each round's training: its iterations, or its part of --minutes by what its iterations cost.

    An iteration costs about three network passes, and one for each of the teacher's steps.
    """
    iterations, fit = budgets(options, counts, usual), options.fit
    if fit.minutes is None:
        return [replace(fit, iterations=number) for number in iterations]
    steps = [math.ceil(n / m) for n, m in pairwise([options.start_steps, *counts])]
    steps[0] *= 2 if options.solver == "heun" else 1
    costs = [number * (3 + calls) for number, calls in zip(iterations, steps, strict=True)]
    return [replace(fit, minutes=fit.minutes * cost / sum(costs)) for cost in costs]


def distill(options: Options) -> list[Model]:
    """One student per round, each in its own folder and usable on its own."""
    counts(options)  # a mistake is an error before a teacher is trained
    options, teacher, dataset, out = begin(options, "progressive", check_home)
    usual = for_data(ROUNDS, teacher.spec.name)
    rounds = counts(options, [*usual])
    for num_steps in rounds:
        check_claim(out / f"{num_steps:04d}")
    fits = round_fits(options, rounds, usual)
    angles = respace(teacher.schedule, options.start_steps)
    if not teacher.card.shifted:
        angles = shifted(angles, teacher.card.shift)
    students = []
    for i, (num_steps, fit) in enumerate(zip(rounds, fits, strict=True)):
        before, kept = len(angles) - 1, merged(angles, num_steps)
        budget = f"{fit.minutes:.1f} minutes" if fit.minutes else f"{fit.iterations} iterations"
        say(f"round: {num_steps} steps from the teacher's {before}, {budget}")
        solver = "euler" if i else options.solver
        card = Card(
            method="progressive",
            plans=(plan("ddim", kept, teacher.card.guidance),),
            abilities=(),
            training={
                "teacher_steps": before,
                "solver": solver,
                "weighting": options.weighting,
                "next_teacher": options.next_teacher,
                "earlier_images": images_spent(teacher),
            },
            **student_card(teacher),
        )
        student = deepcopy(teacher.denoiser).requires_grad_(True)
        last = frozen_copy(student) if options.next_teacher == "raw" else None
        # an average without memory: the student itself
        followers = {"raw": Average(last, lambda done, progress: 0.0)} if last else {}
        table = steps_table(angles, kept).to(teacher.device)
        step = STEPS[solver](teacher.denoiser)
        objective = Halving(step, table, options.weighting, followers)
        folder = out / f"{num_steps:04d}"
        method, raw = one_network(student, objective), folder / "raw.safetensors"
        beside = {raw.name: last} if last else {}
        teacher = train_model(folder, method, dataset, fit, card, beside=beside)
        students.append(teacher)
        angles = kept
        if last and not raw.exists():
            raise UserError(
                f"{folder} lacks {raw.name}, the weights that teach the next round: delete it, "
                "and this round is trained again"
            )
        if last:
            teacher = load(raw, fit.precision)
        if fit.compile:
            teacher.denoiser.net.compile()
    return students


def main() -> None:
    distill(parse(PRESETS, "python -m distill.progressive"))


if __name__ == "__main__":
    run(main)
