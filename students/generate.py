"""Make images with any checkpoint: `python -m students.generate CHECKPOINT --num 64`."""

import io
import math
import os
import re
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from diffusion import machine
from diffusion.console import UserError, at_least, doing, run, say, track
from diffusion.files import write_atomic
from diffusion.folders import (
    MARK,
    SIGN,
    check_claim,
    check_file,
    claim,
    read_mark,
    strangers,
    write_mark,
)
from diffusion.model import Model, load
from diffusion.noise import check_seed
from diffusion.owner import owned
from diffusion.pictures import png, save_grid
from diffusion.plan import MOST_STEPS, Plan
from diffusion.samplers import SOLVERS
from students.api import Checkpoint


@dataclass(frozen=True)
class Options:
    """Make images with any checkpoint: a teacher or a student.

    The checkpoint knows its own sampler and numbers of steps. Image i of a seed is the same
    whatever the batch size and however many are made.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The model: a run's folder, a .safetensors file, or another maker's, as diffusers:PATH."""
    num: int = 64
    """How many images to make."""
    steps: int | None = None
    """Network calls for each image (guidance may double them). If left out: the checkpoint's own
    number, or 50 by another --sampler."""
    # the choices are whatever solvers are registered, which a type cannot say
    sampler: Literal[tuple(SOLVERS)] | None = None  # ty: ignore[invalid-type-form]
    """How to go from noise to an image. If left out: the checkpoint's own way, or ddim at other
    --steps."""
    angles: tuple[float, ...] | None = None
    """In place of --steps: the noise levels to call the network at, as angles in radians from noise
    to image, for instance 1.56 1.0 for a consistency student."""
    shift: float | None = None
    """Where a solver's steps are: above 1, more of them where noise is heavy. If left out: as the
    teacher has it."""
    label: int | None = None
    """The class to make, for a conditional model. If left out: every class in turn."""
    guidance: float | None = None
    """How strongly images are pushed towards their class, for a conditional model; 1: not at all. A
    step of a teacher then takes 2 network calls, of a guided student 1. If left out: the
    checkpoint's own weight."""
    seed: int = 0
    """Seed of the noise, from 0 to 2^63 - 1."""
    batch_size: int = 256
    """Images that the network makes at a time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the network. auto: the faster one on this machine."""
    out: Path = Path("grid.png")
    """Where the images go: a .png (one grid), an .npz (uint8 `images`, N x H x W x C), or a folder
    (one PNG each). What an earlier call made there is replaced; anything else is refused."""


def plan_of(model: Model, options: Options) -> Plan:
    """The plan that the options ask for."""
    if options.angles is None:
        return model.plan(options.steps, options.sampler, options.shift, options.guidance)
    if options.shift is not None:
        raise UserError("--shift and --angles both say where the steps are: leave one of them out")
    angles = (0.0, *reversed(options.angles))
    top = float(model.schedule[-1])
    falling = all(s < t for s, t in pairwise(angles))
    if len(angles) < 2 or not falling or angles[-1] > top + 1e-4:
        raise UserError(
            f"--angles must be one or more numbers that fall, from at most {top:.4f} to above 0, "
            f"got {options.angles}"
        )
    if options.steps not in (None, len(options.angles)):
        raise UserError(
            f"--steps {options.steps} does not fit {len(options.angles)} --angles: leave --steps "
            "out"
        )
    sampler = options.sampler or model.card.sampler
    if sampler not in model.solvers:
        raise UserError(
            f"this {model.card.method} model runs at its own angles only: leave --angles out"
        )
    return replace(model.plan(1, sampler, guidance=options.guidance), angles=angles)


def generate(model: Model, options: Options) -> Iterator[Tensor]:
    """Batches of images, (B, C, H, W) uint8, in order of their numbers.

    Raises UserError for images that are not finite, which as uint8 would be black.
    """
    maker = Checkpoint(model, str(options.checkpoint))
    condition = maker.labels(options.label, options.num)
    numbers, plan = range(options.num), plan_of(model, options)
    yield from maker.batches(plan, options.seed, numbers, condition, options.batch_size)


def _tracked(model: Model, options: Options) -> Iterator[tuple[int, Tensor]]:
    """(number of the batch's first image, images), shown as they come."""

    def counted() -> Iterator[tuple[int, Tensor]]:
        done = 0
        for images in generate(model, options):
            yield done, images
            done += len(images)

    yield from track(
        counted(), "generate", lambda item: (item[0] + len(item[1]), options.num, "images")
    )


PART = ".part"  # within a folder of pictures: those under way


def picture(number: int) -> str:
    return f"{number:06d}.png"


def pictures_before(folder: Path) -> list[Path]:
    """The pictures that an earlier call made. UserError where the folder holds anything else."""
    check_claim(folder, "pictures")
    made = [picture(i) for i in range(read_mark(folder).get("pictures", 0))]
    if others := strangers(folder, {*made, PART}):
        raise UserError(
            f"{folder} holds {others[0]}, which students.generate did not make: expected a new or "
            "empty folder, or one of its pictures alone; give another --out"
        )
    return [folder / name for name in made if (folder / name).exists()]


@contextmanager
def new_pictures(folder: Path, count: int) -> Generator[Path]:
    """A folder to write so many pictures to, which then take the place of those made before.

    A failure leaves everything as it was.
    """
    before, marked = pictures_before(folder), (folder / MARK).exists()
    with owned(folder):
        claim(folder, "pictures")
        part, done = folder / PART, False
        part.mkdir(exist_ok=True)
        try:
            yield part
            if before:
                say(f"{folder}: the {len(before)} pictures of an earlier call are replaced")
            write_mark(folder, "pictures", max(count, read_mark(folder).get("pictures", 0)))
            done = True  # from here on all that is there is known as ours
            for path in before:
                path.unlink()
            for i in range(count):
                os.replace(part / picture(i), folder / picture(i))
            write_mark(folder, "pictures", count)
        finally:
            with suppress(FileNotFoundError):  # the folder was deleted meanwhile
                for path in part.iterdir():
                    path.unlink()
                part.rmdir()
                if not (done or marked):
                    (folder / MARK).unlink()


def write_folder(folder: Path, model: Model, options: Options) -> None:
    """One PNG an image, 000000.png onwards."""
    with new_pictures(folder, options.num) as part:
        for start, images in _tracked(model, options):
            for i, image in enumerate(images, start):
                write_atomic(part / picture(i), png(image))


def write_npz(path: Path, model: Model, options: Options) -> None:
    images = torch.cat([images for _, images in _tracked(model, options)])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.permute(0, 2, 3, 1).numpy())
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = SIGN.encode()
    write_atomic(path, buffer.getvalue())


def write_grid(path: Path, model: Model, options: Options) -> None:
    save_grid(path, torch.cat([images for _, images in _tracked(model, options)]))


COPIES = 32  # bytes that a batch takes at least for each number: noise in float64, x_t, x0
WRITERS = {".png": write_grid, ".npz": write_npz, "": write_folder}


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m students.generate", config=config)
    at_least(1, options, "num", "batch_size")
    at_least(1, options, "steps", most=MOST_STEPS)
    check_seed(options.seed)
    suffix = re.sub(r"^\.\d+$", "", options.out.suffix)  # run_v1.5 is a folder's name
    if suffix not in WRITERS:
        raise UserError(f"--out must be a .png or .npz file or a folder, got {options.out}")
    if suffix:
        check_file(options.out)
    else:
        pictures_before(options.out)
    model = load(options.checkpoint, machine.precision(options.precision))
    plan = plan_of(model, options)
    pixels = math.prod(model.spec.shape)
    # a folder's pictures go to the disk batch by batch, of which only the numbers are held
    machine.require_memory("--num", options.num, options.num * (3 * pixels if suffix else 8))
    batch = min(options.batch_size, options.num)
    machine.require_memory("--batch-size", batch, batch * COPIES * math.prod(model.shape))
    with doing(f"making {options.num} images", f"{options.out} is as it was"):
        WRITERS[suffix](options.out, model, options)
    steps = f"{plan.num_steps} steps"
    if model.calls_per_step(plan) == 2:
        steps += " of 2 network calls"
    say(f"{options.num} images by {plan.sampler} in {steps}: {options.out}")


if __name__ == "__main__":
    run(main)
