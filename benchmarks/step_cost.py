"""What a training step costs over its bare network passes: `python -m benchmarks.step_cost TEACHER`.

A step is an objective's loss and its gradient; its passes are those of the student with their
gradient, those of teachers and targets without, and those of forward mode. Both are run in
turn, many times, so that a drifting machine favours neither.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import tyro

from benchmarks.rounds import relative, rounds
from diffusion.batches import Batch
from diffusion.console import at_least, out, run
from diffusion.model import Model, load
from diffusion.schedules import halve, respace
from diffusion.training import Objective
from distill.consistency import MODES
from distill.progressive import Halving, steps_table
from distill.scm import derivative
from distill.shared import angles_of
from distill.steps import euler_step
from teachers.ddpm import Denoising


@dataclass(frozen=True)
class Options:
    """Say how much longer a training step of each objective takes than its bare network passes."""

    teacher: tyro.conf.Positional[Path] = Path("runs/digits/teacher")
    """A teacher's run or checkpoint."""
    batch_size: int = 256
    """Images of a network call."""
    repeats: int = 30
    """How often each side is timed."""


@dataclass(frozen=True)
class Row:
    """An objective, and what it calls networks for besides the student's pass with its gradient."""

    name: str
    objective: Objective
    without_gradient: int = 0
    forward_mode: int = 0


def rows(teacher: Model, student) -> Iterator[Row]:
    """Each made when it is asked for: scm's gives the student a parameter more."""

    def consistency(mode: str, **settings) -> Objective:
        loss = MODES[mode].Loss(**settings)
        return MODES[mode].objective(loss, teacher.denoiser, student, angles_of(teacher))

    schedule = teacher.schedule.to(teacher.device)
    angles = respace(teacher.schedule, 32)
    table = steps_table(angles, halve(angles)).to(teacher.device)
    yield Row("denoising", Denoising(schedule))
    yield Row("halving", Halving(euler_step(teacher.denoiser), table), 2)
    yield Row("cd, heun", consistency("cd"), 3)
    yield Row("cd, euler", consistency("cd", solver="euler"), 2)
    yield Row("ct", consistency("ct"), 1)
    yield Row("ict", consistency("ict"), 1)
    yield Row("ect", consistency("ect"), 1)
    yield Row("ect, heun", consistency("ect", solver="heun"), 3)
    yield Row("scm", consistency("scm"), 1, 1)
    yield Row("scm, training", consistency("scm", solver="data"), 0, 1)


def costs(
    teacher: Model, batch_size: int, repeats: int, names: Sequence[str] = ()
) -> Iterator[tuple[str, float, float]]:
    """(objective, seconds of its bare passes, the step's time over theirs), of some or of all."""
    student = deepcopy(teacher.denoiser).requires_grad_(True).train()
    device, net = teacher.device, student.net
    x0, eps, dx = torch.randn(3, batch_size, *teacher.spec.shape, device=device)
    level = (torch.arange(batch_size, device=device) + 0.5).double() / batch_size
    batch = Batch(x0, eps, level, label=None, seed=0)
    t, dt = level.float(), torch.ones_like(level, dtype=torch.float32)

    def step(row: Row) -> None:
        row.objective(student, batch, 0.5).mean().backward()

    def bare(row: Row) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                for _ in range(row.without_gradient):
                    net(eps, t, None)
            for _ in range(row.forward_mode):
                derivative(lambda x, t: net(x, t, None), (eps, t), (dx, dt))
            prediction = net(eps, t, None)
        prediction.float().backward(dx)

    for row in rows(teacher, student):
        if names and row.name not in names:
            continue
        took = rounds({"step": partial(step, row), "passes": partial(bare, row)}, repeats, device)
        yield row.name, median(took["passes"]), relative(took["step"], took["passes"])


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.step_cost")
    at_least(1, options, "batch_size", "repeats")
    teacher = load(options.teacher, "bf16")
    for name, seconds, ratio in costs(teacher, options.batch_size, options.repeats):
        out.print(f"{name:14} passes {1000 * seconds:8.2f} ms  step / passes {ratio:.3f}")


if __name__ == "__main__":
    run(main)
