"""What is timed: an untrained network of a dataset's shape, made-up images, every objective.

No time depends on what weights and images hold.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from math import inf
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import codec, networks
from diffusion.checkpoint import Card
from diffusion.codec import Scale
from diffusion.config import FitConfig
from diffusion.data import Dataset, ImageSpec
from diffusion.denoiser import Denoiser, DenoiserConfig
from diffusion.images import InMemory
from diffusion.machine import this_device
from diffusion.model import Model, build
from diffusion.networks import NetworkConfig
from diffusion.plan import plan
from diffusion.registry import Entry
from diffusion.schedules import cosine, halve, respace
from diffusion.training import Objective
from distill import cd, ct, ect, ict, scm
from distill.progressive import Halving, steps_table
from distill.shared import angles_of
from distill.steps import euler_step
from teachers.ddpm import Denoising


def made_up(channels: int, size: int, count: int = 11_000) -> Dataset:
    """Smooth random images, an eleventh of them held out."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 4, 4, generator=random)
    images = F.interpolate(coarse, size=size, mode="bilinear").mul(255).round()
    train, test = images.to(torch.uint8).split([count - count // 11, count // 11])
    spec = ImageSpec("made-up", channels, size)
    return Dataset(spec, InMemory(train), InMemory(test), Scale.fitted([train]))


def untrained(net: NetworkConfig, dataset: Dataset, precision: str = "bf16") -> Model:
    """A teacher of random weights, those too that a training starts from zero."""
    card = Card(
        method="teacher",
        plans=(plan("ancestral", cosine()),),
        abilities=("denoise",),
        net=networks.to_json(net),
        denoiser=DenoiserConfig().to_json(),
        condition={},
        codec=codec.to_json(dataset.codec),
        data=asdict(dataset.spec),
    )
    torch.manual_seed(0)
    denoiser = build(net, DenoiserConfig(), {}, precision).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for weight in denoiser.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.copy_(torch.randn(weight.shape, generator=random) / weight[0].numel() ** 0.5)
    return Model(denoiser.to(this_device()), card, sha256="")


def copied(
    denoiser: Denoiser,
    precision: str,
    layout: torch.memory_format,
    device: torch.device | None = None,
) -> Denoiser:
    """A copy without gradients, in that precision and order of memory."""
    net = deepcopy(denoiser.net).to(device)
    copy = Denoiser(net, precision, layout, denoiser.config, denoiser.kinds)
    return copy.eval().requires_grad_(False)


def endless(config: FitConfig) -> FitConfig:
    """A training that neither ends nor is saved while it is timed."""
    return replace(config, iterations=10**9, save_every=inf)


class FrozenObjective(Objective, Entry, Protocol):
    """An objective that is a frozen dataclass, as all of ours are."""


@dataclass(frozen=True)
class Subject:
    """An objective, and the network passes of its step besides the student's with gradient."""

    name: str
    objective: FrozenObjective
    without_gradient: int = 0
    forward_mode: int = 0


def objectives(teacher: Model, student: nn.Module) -> Iterator[Subject]:
    """Every objective; those of scm with the weight that a training has as its second player."""

    def consistency(mode: ModuleType, **settings: str) -> FrozenObjective:
        loss = mode.Loss(**settings)
        return mode.objective(loss, teacher.denoiser, student, angles_of(teacher))

    def weighted(objective: FrozenObjective) -> FrozenObjective:
        return replace(objective, log_weight=scm.LogWeight().to(teacher.device))

    schedule = teacher.schedule.to(teacher.device)
    angles = respace(teacher.schedule, min(32, len(teacher.schedule) - 1))
    table = steps_table(angles, halve(angles)).to(teacher.device)
    yield Subject("denoising", Denoising(schedule))
    yield Subject("halving", Halving(euler_step(teacher.denoiser), table), 2)
    yield Subject("cd, heun", consistency(cd), 3)
    yield Subject("cd, euler", consistency(cd, solver="euler"), 2)
    yield Subject("ct", consistency(ct), 1)
    yield Subject("ict", consistency(ict), 1)
    yield Subject("ect", consistency(ect), 1)
    yield Subject("ect, heun", consistency(ect, solver="heun"), 3)
    yield Subject("scm", weighted(consistency(scm)), 1, 1)
    yield Subject("scm, training", weighted(consistency(scm, solver="data")), 0, 1)
