"""What a training step costs over its bare network passes: `python -m benchmarks.step_cost TEACHER`.

A step is an objective's loss and its gradient; its passes are those of the student with their
gradient, those of teachers and targets without, and those of forward mode. Both are run in
turn, many times, so that a drifting machine favours neither.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import tyro

from diffusion.batches import Batch
from diffusion.console import out, run
from diffusion.model import Model, load
from diffusion.schedules import halve, respace
from diffusion.training import Objective
from distill.consistency import MODES, settings
from distill.consistency import Options as Settings
from distill.continuous import derivative
from distill.progressive import Halving, steps_table
from eval.timing import timed
from teachers.ddpm import Denoising


@dataclass(frozen=True)
class Options:
    """Interleave the steps of every objective with their bare network passes."""

    teacher: tyro.conf.Positional[Path] = Path("runs/digits/teacher")
    """A teacher's run or checkpoint."""
    batch_size: int = 256
    repeats: int = 30


@dataclass(frozen=True)
class Row:
    """An objective, and what it calls networks for besides the student's pass with its gradient."""

    name: str
    objective: Objective
    without_gradient: int = 0
    forward_mode: int = 0


def rows(teacher: Model, student) -> list[Row]:
    def consistency(mode: str, **told) -> Objective:
        options = Settings(mode=mode, **told)
        options = replace(options, **settings(options))
        return MODES[mode].objective(options, teacher, student)

    schedule = teacher.schedule.to(teacher.device)
    angles = respace(teacher.schedule, 32)
    table = steps_table(angles, halve(angles)).to(teacher.device)
    return [
        Row("denoising", Denoising(schedule)),
        Row("halving", Halving(teacher.denoiser, table), 2),
        Row("cd, heun", consistency("cd"), 3),
        Row("cd, euler", consistency("cd", solver="euler"), 2),
        Row("ct", consistency("ct"), 1),
        Row("ict", consistency("ict"), 1),
        Row("ect", consistency("ect"), 1),
        Row("ect, heun", consistency("ect", solver="heun"), 3),
        Row("scm", consistency("scm"), 1, 1),
        Row("scm, training", consistency("scm", solver="data"), 0, 1),
    ]


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.step_cost")
    teacher = load(options.teacher, "bf16")
    student = deepcopy(teacher.denoiser).requires_grad_(True).train()
    device, net = teacher.device, student.net
    x0, eps, dx = torch.randn(3, options.batch_size, *teacher.spec.shape, device=device)
    level = (torch.arange(options.batch_size, device=device) + 0.5).double() / options.batch_size
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
        ours, network = partial(step, row), partial(bare, row)
        ours(), network()
        ratios, seconds = [], []
        for i in range(options.repeats):
            first, second = (ours, network) if i % 2 else (network, ours)
            took = {first: timed(first, device)[1], second: timed(second, device)[1]}
            ratios.append(took[ours] / took[network])
            seconds.append(took[network])
        out.print(
            f"{row.name:14} passes {1000 * median(seconds):8.2f} ms  "
            f"step / passes {median(ratios):.3f}"
        )


if __name__ == "__main__":
    run(main)
