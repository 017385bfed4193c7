"""A training's log in a tracker too, through accelerate: TensorBoard or Weights & Biases."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusion.console import UserError
from diffusion.training import Progress

FIGURES = ("loss", "gradient_norm", "learning_rate", "images_per_second")


def check_tracker(name: str) -> None:
    """UserError where the tracker's package is not installed."""
    if name != "none" and not find_spec(name):
        raise UserError(f"--track {name} needs the package {name}: pip install {name}")


def tracked(
    lines: Iterator[Progress], name: str, run: Path, settings: Mapping[str, Any]
) -> Iterator[Progress]:
    """Pass a training's lines on; the first process logs each, by its iteration.

    TensorBoard's files go to run/tensorboard; Weights & Biases has a project "fewstep" and asks its
    own environment who you are.
    """
    if name == "none":
        yield from lines
        return
    cpu = not torch.cuda.is_available()
    worker = Accelerator(  # otherwise as training.make_worker has it
        cpu=cpu, mixed_precision="no", dynamo_backend="no", log_with=name, project_dir=run
    )
    plain = {k: v for k, v in settings.items() if isinstance(v, int | float | str)}
    named = {"wandb": {"name": str(run)}} if name == "wandb" else {}
    project = "tensorboard" if name == "tensorboard" else "fewstep"
    worker.init_trackers(project, plain, named)
    try:
        for line in lines:
            worker.log({each: getattr(line, each) for each in FIGURES}, step=line.iteration)
            yield line
    finally:
        for tracker in worker.trackers:
            tracker.finish()
