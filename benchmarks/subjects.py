"""What is timed: an untrained network of a dataset's shape, made-up images, every objective.

No time depends on what weights and images hold.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import inf

import torch
import torch.nn.functional as F
from torch import nn

from diffusion.checkpoint import Card
from diffusion.config import FitConfig
from diffusion.data import Dataset, ImageSpec
from diffusion.machine import this_device
from diffusion.model import Model, build
from diffusion.networks import UNetConfig
from diffusion.schedules import cosine, halve, respace
from diffusion.training import Objective
from distill.consistency import MODES, settings
from distill.consistency import Options as Settings
from distill.progressive import Halving, steps_table
from distill.steps import euler_step
from teachers import ddpm
from teachers.ddpm import Denoising


def made_up(channels: int, size: int, count: int = 11_000) -> Dataset:
    """Smooth random images, an eleventh of them held out."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 4, 4, generator=random)
    images = F.interpolate(coarse, size=size, mode="bilinear").mul(255).round()
    spec = ImageSpec("made-up", channels, size, 0, float(images.mean()), float(images.std()))
    train, test = images.to(torch.uint8).split([count - count // 11, count // 11])
    return Dataset(spec, train, None, test, None)


def untrained(net: UNetConfig, spec: ImageSpec, precision: str = "bf16") -> Model:
    """A teacher of random weights, those too that a training starts from zero."""
    angles = cosine()
    plans = {len(angles) - 1: angles.tolist()}
    card = Card("teacher", "ancestral", plans, ddpm.SOLVERS, asdict(net), asdict(spec))
    torch.manual_seed(0)
    denoiser = build(net, precision).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for weight in denoiser.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.copy_(torch.randn(weight.shape, generator=random) / weight[0].numel() ** 0.5)
    return Model(denoiser.to(this_device()), card, sha256="")


def endless(config: FitConfig) -> FitConfig:
    """A training that neither ends nor is saved while it is timed."""
    return replace(config, iterations=10**9, save_every=inf)


@dataclass(frozen=True)
class Subject:
    """An objective, and the network passes of its step besides the student's with gradient."""

    name: str
    objective: Objective
    without_gradient: int = 0
    forward_mode: int = 0


def objectives(teacher: Model, student: nn.Module) -> Iterator[Subject]:
    """Every objective, made when it is asked for: that of scm gives the student a parameter."""

    def consistency(mode: str, **changes) -> Objective:
        options = Settings(mode=mode, **changes)
        options = replace(options, **settings(options))
        return MODES[mode].objective(options, teacher, student)

    schedule = teacher.schedule.to(teacher.device)
    angles = respace(teacher.schedule, min(32, len(teacher.schedule) - 1))
    table = steps_table(angles, halve(angles)).to(teacher.device)
    yield Subject("denoising", Denoising(schedule))
    yield Subject("halving", Halving(euler_step(teacher.denoiser), table), 2)
    yield Subject("cd, heun", consistency("cd"), 3)
    yield Subject("cd, euler", consistency("cd", solver="euler"), 2)
    yield Subject("ct", consistency("ct"), 1)
    yield Subject("ict", consistency("ict"), 1)
    yield Subject("ect", consistency("ect"), 1)
    yield Subject("ect, heun", consistency("ect", solver="heun"), 3)
    yield Subject("scm", consistency("scm"), 1, 1)
    yield Subject("scm, training", consistency("scm", solver="data"), 0, 1)
