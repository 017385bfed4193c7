"""What each part of the speed is worth: `python -m benchmarks.speed [TEACHER]`.

Training is `fit` itself, as the teacher, a progressive and a consistency student take it; sampling
is from noise to uint8. Each is timed with everything on, then with one part off at a time, all in
turn and in an order that is reversed every other round, so that a drifting machine favours none.
Without a checkpoint the network is untrained, of the shape that is told: its times are the same.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import tyro
from rich.table import Table
from torch import Tensor

from benchmarks.parts import (
    ALL,
    SAMPLING,
    TRAINING,
    absent,
    begin,
    endless,
    sampling_models,
    training,
    untrained,
    variants,
)
from benchmarks.rounds import relative, rounds
from benchmarks.step_cost import costs
from diffusion import data as datasets
from diffusion.checkpoint import write_atomic
from diffusion.config import FitConfig
from diffusion.console import out, run, say, track
from diffusion.data import Dataset
from diffusion.model import Model, load
from diffusion.networks import UNetConfig
from diffusion.samplers import SOLVERS
from eval.measure import machine, stream
from eval.measure.race import Lap, sweep
from eval.measure.timing import Timing
from teachers import ddpm
from teachers.presets import preset

OBJECTIVES = {"teacher": "denoising", "progressive": "halving", "consistency": "cd, heun"}
SAMPLERS = {"teacher, progressive": "ddim", "consistency": "consistency"}
Cells = dict[str, dict[str, float | int | list[float]]]  # by variant


def time_training(
    teacher: Model,
    name: str,
    dataset: Dataset,
    config: FitConfig,
    options: "Options",
    chosen: Mapping[str, frozenset[str]] | None = None,
) -> Cells:
    """Variant -> images/s, and that over what it is with everything on.

    chosen: the variants, ALL among them; an option left out turns every part off in turn.
    """
    calls, chosen = {}, chosen or variants(TRAINING, absent(teacher.device, options.compile))
    with ExitStack() as stack:
        state = Path(stack.enter_context(TemporaryDirectory()), "state")
        for variant, on in chosen.items():
            made = training(teacher, OBJECTIVES[name], dataset, config, on, state)
            loop = stack.enter_context(closing(made[1]))
            lines = 1 if "one wait a line" in on else config.log_every
            calls[variant] = lambda loop=loop, lines=lines: [*islice(loop, lines)]
        seconds = rounds(calls, options.repeats, teacher.device)
    images = config.log_every * config.batch_size
    return {
        variant: {
            "images_per_second": images / median(took),
            "ratio": relative(seconds[ALL], took),
            "seconds": took,
        }
        for variant, took in seconds.items()
    }


def time_sampling(
    models: dict[str, Model], sampler: str, steps: int, budget: float
) -> tuple[Cells, Cells]:
    """Variant -> its times, at batch 1 and at the batch size that is best for it."""
    first = models[ALL]
    plan = (sampler, SOLVERS[sampler].angles(first.schedule, steps))

    def images(model: Model, size: int) -> Tensor:
        return model.sample(plan, 0, *stream.indices(model, 0, size))

    calls = {variant: partial(images, model) for variant, model in models.items()}
    found: dict[str, dict[int, Timing]] = {variant: {} for variant in calls}
    laps = sweep(calls, first.device, budget=budget)
    for lap in track(laps, f"{sampler} {steps}", Lap.progress):
        if lap.timing.seconds:
            found[lap.key][lap.timing.batch_size] = lap.timing

    def cells(chosen: dict[str, Timing]) -> Cells:
        most = chosen[ALL].images_per_second
        return {
            variant: {
                "batch_size": timing.batch_size,
                "images_per_second": timing.images_per_second,
                "ratio": timing.images_per_second / most,
                "seconds": list(timing.seconds),
            }
            for variant, timing in chosen.items()
        }

    best = {v: max(t.values(), key=lambda t: t.images_per_second) for v, t in found.items()}
    return cells({variant: timings[1] for variant, timings in found.items()}), cells(best)


def table(title: str, parts: Mapping, off: Mapping[str, str], columns: dict[str, Cells]) -> Table:
    """Images/s and their ratio to everything on; "-" for what this device has not."""
    shown = Table(title=f"{title}: images/s, and over everything on", title_justify="left")
    shown.add_column("")
    for column in columns:
        shown.add_column(column, justify="right")
    for variant in [ALL, *(f"without {part}" for part in parts)]:
        cells = [found.get(variant) for found in columns.values()]
        shown.add_row(variant, *(cell_text(cell) if cell else "-" for cell in cells))
    shown.caption = "\n".join(f"- {part}: {off[part]}" for part in parts if part in off) or None
    shown.caption_justify = "left"
    return shown


def cell_text(cell: dict) -> str:
    size = f" @{cell['batch_size']}" if cell.get("batch_size", 1) > 1 else ""
    return f"{cell['images_per_second']:,.0f}{size} {cell['ratio']:.2f}"


@dataclass(frozen=True)
class Options:
    """Say what each part of the speed is worth: time training and sampling with each part off in
    turn."""

    teacher: tyro.conf.Positional[Path | None] = None
    """A teacher's run or checkpoint. If left out: an untrained network of the shape below."""
    data: str = "fashion-mnist"
    """Images for the untrained network: digits, fashion-mnist, cifar10, or a folder of images."""
    net: UNetConfig = field(default_factory=UNetConfig)
    batch_size: int = 256
    """Images of a training step."""
    log_every: int = 25
    """Training steps of a repeat and of a log line."""
    repeats: int = 10
    """How often each variant of training is timed."""
    steps: tuple[int, ...] = (1, 4)
    """Steps of the samplers, one comparison a number."""
    budget: float = 1.0
    """Seconds for which each variant of sampling is repeated, at each batch size."""
    compile: bool = False
    """Use torch.compile on a CPU too. On a GPU it is always one of the parts."""
    out: Path | None = None
    """A .json file to write all figures to."""


def subject(options: Options) -> tuple[Model, Dataset]:
    if options.teacher is None:
        asked = ddpm.Options(data=options.data, net=options.net)
        dataset = ddpm.load_data(asked)
        model = untrained(options.net, dataset)
    else:
        model = load(options.teacher, "bf16")
        spec = model.spec
        dataset = replace(datasets.reload(spec), spec=spec)
    return model, replace(dataset, train_labels=None)  # whose pictures are whose is no matter here


def main() -> None:
    default = Options(net=preset(ddpm.peek("--data", "fashion-mnist")).net)
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m benchmarks.speed", default=default, config=config)
    begin(options, "batch_size", "log_every", "repeats")
    # variants of one network, which past the usual 8 would be eager
    torch._dynamo.config.cache_size_limit = 64
    model, dataset = subject(options)
    device, size = model.device, options.batch_size
    environment = machine.environment(device, "bf16", options.compile or device.type == "cuda")
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    say(f"{parameters:,} parameters, {environment['device']}")

    step = {}
    for name, seconds, ratio in costs(model, size, options.repeats, [*OBJECTIVES.values()]):
        say(f"{name:10} passes {1000 * seconds:8.2f} ms  step / passes {ratio:.3f}")
        step[name] = {"passes": seconds, "ratio": ratio}
    told = replace(preset(model.spec.name).teacher, batch_size=size, log_every=options.log_every)
    fits = {
        name: time_training(model, name, dataset, endless(told), options) for name in OBJECTIVES
    }
    off = absent(device, options.compile)
    out.print(table("training", TRAINING, off, fits))

    models, sampled = sampling_models(model, variants(SAMPLING, off)), {}
    for name, sampler in SAMPLERS.items():
        columns: dict[str, Cells] = {}
        for steps in options.steps:
            one, best = time_sampling(models, sampler, steps, options.budget)
            noun = "1 step" if steps == 1 else f"{steps} steps"
            columns |= {f"{noun}, batch 1": one, f"{noun}, best batch": best}
        out.print(table(f"sampling, {name} ({sampler})", SAMPLING, off, columns))
        sampled[sampler] = columns
    if options.out:
        found = {"environment": environment, "conditions": machine.conditions(device)}
        found |= {"parameters": parameters, "step": step, "training": fits, "sampling": sampled}
        write_atomic(options.out, json.dumps(found, indent=1))
        say(str(options.out))


if __name__ == "__main__":
    run(main)
