"""Training and sampling with parts of their speed off, for benchmarks.speed and benchmarks.peer."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import count
from math import inf
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.step_cost import rows
from diffusion.batches import batch_seed
from diffusion.checkpoint import Card, require_folder
from diffusion.config import FitConfig
from diffusion.console import at_least
from diffusion.data import Dataset
from diffusion.denoiser import Denoiser
from diffusion.model import Model, build, this_device
from diffusion.networks import UNetConfig
from diffusion.schedules import cosine
from diffusion.training import Progress, fit
from teachers import ddpm

ALL = "everything on"
# A part of the speed, and what else its going takes along.
TRAINING = {
    "bf16": (),
    "channels_last": (),
    "fused updates": (),
    "resident data": (),
    "torch.compile": (),
    "one wait a line": (),
}
SAMPLING = {"bf16": (), "channels_last": (), "CUDA graphs": (), "torch.compile": ("CUDA graphs",)}
OFF_ON_CPU = {
    "channels_last": "on a CPU the denoiser is contiguous: group norm is slow in any other layout",
    "CUDA graphs": "there are none without CUDA",
    "torch.compile": "on a CPU it is off unless --compile is told",
}


def begin(options, *counts: str) -> None:
    """UserError for an option of these that is below 1, or an --out that cannot be written."""
    at_least(1, options, *counts)
    if options.out:
        require_folder(options.out.parent)


def absent(device: torch.device, compiled: bool) -> dict[str, str]:
    """The parts that this device has not, and why."""
    off = {} if device.type == "cuda" else dict(OFF_ON_CPU)
    if compiled:
        off.pop("torch.compile", None)
    return off


def variants(parts: Mapping[str, tuple[str, ...]], off: Mapping) -> dict[str, frozenset[str]]:
    """Everything on, then each part off: by name, what is on."""
    on = frozenset(parts) - off.keys()
    without = {f"without {part}": on - {part, *more} for part, more in parts.items() if part in on}
    return {ALL: on} | without


class Collated:
    """Images in the CPU's memory that a DataLoader collates and a step copies to the device.

    It has torch's default of no workers, whose batches would be made while others are timed. On
    a CPU its images are those that `Batches.draw` asks for; elsewhere as many others, for to be
    asked it would have to wait for the device.
    """

    def __init__(self, images: Tensor, config: FitConfig):
        def numbers() -> Iterator[list[int]]:
            for i in count():
                random = torch.Generator().manual_seed(batch_seed(config.seed, i))
                drawn = torch.randint(len(images), (config.batch_size,), generator=random)
                yield drawn.tolist()

        self.length, self.nbytes, self.device = len(images), images.nbytes, this_device()
        self.batches = iter(DataLoader(TensorDataset(images), batch_sampler=numbers()))

    def to(self, device: torch.device) -> "Collated":
        return self

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, which: Tensor) -> Tensor:
        return next(self.batches)[0]


def refitted(denoiser: Denoiser, on: frozenset[str]) -> Denoiser:
    """A copy in the precision and the layout of what is on."""
    layout = torch.channels_last if "channels_last" in on else torch.contiguous_format
    return Denoiser(deepcopy(denoiser.net), "bf16" if "bf16" in on else "fp32", layout)


def training(
    teacher: Model,
    objective: str,
    dataset: Dataset,
    config: FitConfig,
    on: frozenset[str],
    state: Path,
) -> tuple[Denoiser, Iterator[Progress]]:
    """A student that begins as the teacher, and the loop that trains it with these parts on.

    objective: one of step_cost's names.
    """
    own = refitted(teacher.denoiser, on).eval().requires_grad_(False)
    if "torch.compile" in on:
        own.net.compile()
    student = refitted(teacher.denoiser, on).requires_grad_(True)
    made = rows(replace(teacher, denoiser=own), student)
    aim = next(row.objective for row in made if row.name == objective)
    fused = "fused updates" in on
    aim = replace(aim, averages=[replace(average, fused=fused) for average in aim.averages])
    if "resident data" not in on:
        dataset = replace(dataset, train=Collated(dataset.train, config))
    log_every = config.log_every if "one wait a line" in on else 1
    config = replace(config, log_every=log_every, compile="torch.compile" in on)
    return student, fit(student, aim, dataset, config, state, fused)


def sampling_models(model: Model, chosen: Mapping[str, frozenset[str]]) -> dict[str, Model]:
    models = {}
    for variant, on in chosen.items():
        denoiser = refitted(model.denoiser, on).eval().requires_grad_(False)
        if "CUDA graphs" in on:
            denoiser.compile_network()
        elif "torch.compile" in on:
            denoiser.net.compile()
        models[variant] = replace(model, denoiser=denoiser)
    return models


def untrained(net: UNetConfig, dataset: Dataset, precision: str = "bf16") -> Model:
    angles = cosine()
    plans, spec = {len(angles) - 1: angles.tolist()}, asdict(dataset.spec)
    card = Card("teacher", "ancestral", plans, ddpm.SOLVERS, asdict(net), spec)
    torch.manual_seed(0)
    denoiser = build(net, precision).to(this_device()).eval().requires_grad_(False)
    return Model(denoiser, card, sha256="")


def endless(config: FitConfig) -> FitConfig:
    """A training that neither ends nor is saved while it is timed."""
    return replace(config, iterations=10**9, save_every=inf)
