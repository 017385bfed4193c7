"""What each part of the speed is worth: `python -m benchmarks.speed [TEACHER]`.

Training is `fit` itself, as the teacher, a halved and a consistency student take it; sampling is
from noise to uint8. Each is timed with everything on, then with one part off at a time.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import tyro
from torch import Tensor

from benchmarks.subjects import copied, endless, made_up, objectives, untrained
from benchmarks.turns import Comparison, TimingOptions, compare
from diffusion.config import FitConfig
from diffusion.console import run, say
from diffusion.data import Dataset
from diffusion.denoiser import Denoiser
from diffusion.images import InMemory, Rows, some
from diffusion.model import Model, load
from diffusion.plan import plan
from diffusion.samplers import SOLVERS
from diffusion.training import Average, Progress, fit, one_network
from eval.measure import stream
from teachers.presets import preset

ALL = "everything on"
# A part of the speed -> the parts that go with it.
TRAINING: dict[str, tuple[str, ...]] = {
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
    "torch.compile": "on a CPU it is off without --compile",
}
OBJECTIVES = ("denoising", "halving", "cd, heun")
Variants = Mapping[str, frozenset[str]]  # by name, the parts that are on; ALL is the first


def absent(device: torch.device, compiled: bool) -> dict[str, str]:
    """The parts that this device has not, and why."""
    off = {} if device.type == "cuda" else dict(OFF_ON_CPU)
    if compiled:
        off.pop("torch.compile", None)
    return off


def variants(parts: Mapping[str, tuple[str, ...]], off: Mapping[str, str]) -> Variants:
    """Everything on, then each part off."""
    on = frozenset(parts) - off.keys()
    without = {f"without {part}": on - {part, *more} for part, more in parts.items() if part in on}
    return {ALL: on} | without


class Collated(InMemory):
    """Images in the CPU's memory, collated one by one, as by torch's DataLoader without workers.

    With workers, batches would be made while others are timed.
    """

    def take(self, indices: Tensor) -> Rows:
        return Rows(torch.stack([self.images[i] for i in indices.tolist()]), {})

    def near(self, device: torch.device) -> "Collated":
        return self


def refitted(model: Model, on: frozenset[str]) -> Model:
    """The model in the precision and the layout of the parts that are on."""
    layout = torch.channels_last if "channels_last" in on else torch.contiguous_format
    precision = "bf16" if "bf16" in on else "fp32"
    return replace(model, denoiser=copied(model.denoiser, precision, layout))


def training(
    teacher: Model,
    name: str,
    dataset: Dataset,
    config: FitConfig,
    on: frozenset[str],
    state: Path,
) -> tuple[Denoiser, Generator[Progress]]:
    """A student that begins as the teacher, and the loop that trains it with these parts on.

    name: of one of benchmarks.subjects.objectives.
    """
    guide, student = refitted(teacher, on), refitted(teacher, on).denoiser.requires_grad_(True)
    if "torch.compile" in on:
        guide.denoiser.net.compile()
    objective = next(s.objective for s in objectives(guide, student) if s.name == name)
    fused = "fused updates" in on
    followers = {
        name: replace(each, fused=fused) if isinstance(each, Average) else each
        for name, each in objective.followers.items()
    }
    method = one_network(student, replace(objective, followers=followers))
    if "resident data" not in on:
        images = some(dataset.train, len(dataset.train)).images
        dataset = replace(dataset, train=Collated(images))
    log_every = config.log_every if "one wait a line" in on else 1
    config = replace(config, log_every=log_every, compile="torch.compile" in on)
    return student, fit(method, dataset, config, state, fused)


def lap(loop: Iterator[Progress], steps: int) -> Progress:
    """Train to the next multiple of so many steps."""
    return next(line for line in loop if line.iteration % steps == 0)


def trainings(
    teacher: Model, name: str, dataset: Dataset, config: FitConfig, chosen: Variants
) -> Iterator[Comparison]:
    """One comparison of `training` in these variants, log_every steps a call."""
    with ExitStack() as stack:
        state, calls = Path(stack.enter_context(TemporaryDirectory()), "state"), {}
        for variant, on in chosen.items():
            _, loop = training(teacher, name, dataset, config, on, state)
            calls[variant] = partial(lap, stack.enter_context(closing(loop)), config.log_every)
        yield Comparison(f"training, {name}", calls, config.log_every * config.batch_size)


def sampling_models(model: Model, chosen: Variants) -> dict[str, Model]:
    models = {variant: refitted(model, on) for variant, on in chosen.items()}
    for variant, on in chosen.items():
        if "CUDA graphs" in on:
            models[variant].denoiser.compile_network()
        elif "torch.compile" in on:
            models[variant].denoiser.net.compile()
    return models


def images(model: Model, sampler: str, num_steps: int, size: int) -> Tensor:
    """That many images from noise, as uint8."""
    angles = SOLVERS[sampler].angles(model.schedule, num_steps)
    return model.sample(plan(sampler, angles), 0, stream.indices(model, 0, size))


def samplings(
    models: Mapping[str, Model], sampler: str, num_steps: int, sizes: tuple[int, ...]
) -> Iterator[Comparison]:
    for size in sizes:
        calls = {name: partial(images, m, sampler, num_steps, size) for name, m in models.items()}
        yield Comparison(f"{sampler}, steps: {num_steps}, batch: {size}", calls, size)


@dataclass(frozen=True)
class Options(TimingOptions):
    """Say what each part of the speed is worth: time training and sampling with each part off in
    turn."""

    teacher: tyro.conf.Positional[Path | None] = None
    """A teacher's run or checkpoint. If left out: an untrained network of the data's preset."""
    data: Literal["digits", "fashion-mnist", "cifar10"] = "fashion-mnist"
    """The data whose preset the untrained network has. The images are made up."""
    batch_size: int = 256
    """Images of a training step, and of a sampler's call beside calls of one image."""
    training_steps: int = 25
    """Training steps of each repeat, and of a log line."""
    steps: tuple[int, ...] = (1, 4)
    """Steps of the samplers, one comparison a number."""
    compile: bool = False
    """Use torch.compile on a CPU too. On a GPU it is always one of the parts."""
    repeats: int = 10
    """How often each variant is timed."""


def comparisons(options: Options) -> Iterator[Comparison]:
    # variants of one network, which past the usual 8 would be eager
    torch._dynamo.config.cache_size_limit = 64
    if options.teacher:
        model = load(options.teacher, "bf16")
        dataset, config = made_up(*model.spec.shape[:2]), preset(model.spec.name).teacher
    else:
        chosen = preset(options.data)
        dataset, config = made_up(chosen.net.channels, chosen.net.size), chosen.teacher
        model = untrained(chosen.net, dataset)
    off = absent(model.device, options.compile)
    say(f"{sum(p.numel() for p in model.denoiser.parameters()):,} parameters")
    for part in dict.fromkeys([*TRAINING, *SAMPLING]):
        if part in off:
            say(f"not timed: {part}: {off[part]}")
    config = replace(config, batch_size=options.batch_size, log_every=options.training_steps)
    for name in OBJECTIVES:
        yield from trainings(model, name, dataset, endless(config), variants(TRAINING, off))
    models = sampling_models(model, variants(SAMPLING, off))
    for sampler in ("ddim", "consistency"):
        for num_steps in options.steps:
            yield from samplings(models, sampler, num_steps, (1, options.batch_size))


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m benchmarks.speed", config=config)
    compare(options, comparisons(options), compiled=options.compile)


if __name__ == "__main__":
    run(main)
