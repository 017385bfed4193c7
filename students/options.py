"""What students.generate is asked for: its options, and the plan and the prompts they mean."""

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import tyro
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from diffusion.console import UserError, say
from diffusion.model import Model
from diffusion.plan import Plan
from diffusion.samplers import SOLVERS
from students import budget
from students.prompts import Prompts, encode, from_file
from students.shards import FORMATS


@dataclass(frozen=True)
class Options:
    """Make images with any checkpoint: a teacher or a student.

    The checkpoint knows its own sampler and numbers of steps. Image i of a seed is the same
    whatever the batch size and however many are made.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The model: a run's folder, a .safetensors file, or another maker's: diffusers:PATH,
    or edm:PACKAGE.MODULE:FUNCTION."""
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
    time_budget: str | None = None
    """In place of --steps: how long all the images may take, such as 20ms or 1.5s, without what
    comes before them. The best sampler and number of steps within it are chosen."""
    quality: str | None = None
    """In place of --steps: how many times the best teacher's distance is good enough, such as 1.2x.
    The quickest sampler and number of steps of that quality are chosen from --table."""
    table: Path | None = None
    """The results.jsonl of eval.compare that says how good each number of steps is. If left out:
    compare/results.jsonl in the folder of runs that the checkpoint is in."""
    tolerance: float | None = None
    """An image is left as it is once a call changes it by less than so many grey levels (root mean
    square): it gets fewer calls than --steps. The calls of each image are counted."""
    label: int | None = None
    """The class to make, for a conditional model. If left out: every class in turn."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What images shall show, for a model of captions. Given several times: the images take the
    prompts in turn. If left out: anything."""
    prompts: Path | None = None
    """A file with a prompt in each line, which follow those of --prompt."""
    negative_prompt: str | None = None
    """What images shall not show: --guidance leads away from it."""
    text_encoder: Path | None = None
    """The folder that the model's text encoder is in now, if it has moved."""
    guidance: float | None = None
    """How strongly images are pushed towards their class or prompt, for a conditional model; 1: not
    at all. A step of a teacher then takes 2 network calls, of a guided student 1. If left out: the
    checkpoint's own weight."""
    then: tuple[Path, ...] = ()
    """Models that refine the images, each those of the one before: what teachers.ddpm --from-size
    made, and students of it. The smaller images are written first, as grid-16.png beside
    grid.png."""
    then_steps: tuple[int, ...] = ()
    """Network calls of each --then model for each image. If left out: each one's own number."""
    seed: int = 0
    """Seed of the noise, from 0 to 2^63 - 1."""
    batch_size: int = 256
    """Images that the network makes at a time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the network. auto: the faster one on this machine."""
    autoencoder: Path | None = None
    """Where the autoencoder of a model in latents is now, if it has moved: a run of
    teachers.autoencoder, or diffusers:FOLDER."""
    out: Path = Path("grid.png")
    """Where the images go: a .png (one grid), an .npz (uint8 `images`, N x H x W x C), or a folder.
    What an earlier call made there is replaced; anything else is refused."""
    format: Literal[tuple(FORMATS)] = "png"  # ty: ignore[invalid-type-form]
    """What a folder holds: one PNG an image, or npz or WebDataset files of --shard images each."""
    shard: int = 10_000
    """Images of one shard of a folder. A stopped call goes on from the shards that are whole."""
    filter: str | None = None
    """What scores every image: an ONNX classifier's file, or module:package.module:function. Images
    of --filter-threshold and above are replaced by plain grey ones, and counted."""
    filter_threshold: float = 0.5
    """The score from which an image is blocked."""
    watermark: bool = False
    """Put a mark in the images that is not seen and that students.watermark finds again: colours of
    256 x 256 pixels and more."""
    metadata: bool = True
    """Files say how they were made: the model's sha256, seed, number, sampler and steps."""
    trust: bool = False
    """Load a model as edm:FILE.pt2. Such a file can run any code of its maker on this machine, as a
    program can: trust one only if you made it or know who did."""


def plan_of(model: Model, options: Options) -> Plan:
    """The plan that the options ask for."""
    if options.time_budget or options.quality:
        return _chosen(model, options)
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


def _chosen(model: Model, options: Options) -> Plan:
    for name in ("steps", "sampler", "angles", "shift"):
        if getattr(options, name) is not None:
            raise UserError(f"--time-budget and --quality choose the steps: leave --{name} out")
    choice = None
    if PartialState().is_main_process:
        limits = (options.num, options.batch_size, options.time_budget, options.quality)
        table = options.table or budget.table_of(options.checkpoint)
        choice = budget.choose(model, *limits, table, options.guidance)
    (choice,) = broadcast_object_list([choice])  # what one process measured, for all
    say(choice.words)
    return choice.way.plan


def prompts_of(model: Model, plan: Plan, options: Options) -> Prompts | None:
    """The prompts that the options give, encoded; None for none."""
    texts = options.prompt + (from_file(options.prompts) if options.prompts else ())
    if len(texts) > options.num:
        raise UserError(f"--num {options.num} leaves out some of {len(texts)} prompts: raise it")
    if not texts and options.negative_prompt is None:
        if options.text_encoder:
            raise UserError("--text-encoder encodes prompts: give a --prompt, or leave it out")
        return None
    return encode(model, plan, texts or ("",), options.negative_prompt, options.text_encoder)


def one_file(options: Options) -> str:
    """The suffix of the file that --out names; "" for a folder."""
    suffix = re.sub(r"^\.\d+$", "", options.out.suffix)  # run_v1.5 is a folder's name
    if suffix not in ("", ".png", ".npz"):
        raise UserError(f"--out must be a .png or .npz file or a folder, got {options.out}")
    if suffix and options.format != "png":
        raise UserError(f"--format {options.format} is a folder's: got --out {options.out}")
    return suffix
