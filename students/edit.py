"""Edit images with a consistency student as it is: `python -m students.edit inpaint CHECKPOINT …`.

What is known of an image is always linear, so inpainting, enlarging and colouring are one function.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from tyro.conf import OmitArgPrefixes, Positional

from diffusion import machine
from diffusion.circle import add_noise
from diffusion.console import UserError, at_least, doing, run, say
from diffusion.folders import check_file
from diffusion.image_file import Form, read, reason
from diffusion.image_folder import pictures_in
from diffusion.model import Model, load
from diffusion.noise import Noise, check_seed
from diffusion.pictures import save_grid
from diffusion.plan import Plan
from diffusion.samplers import Noises, consistency
from students.api import BATCH, Checkpoint
from students.provenance import provenance
from students.restore import Measure, blocks, luma, pixels, restore
from students.shards import Batch, Job, files_before, write_shards


@dataclass(frozen=True)
class Settings:
    """How to edit."""

    steps: int = 4
    """Network calls for each image, from 1 to 8. More change finer things."""
    label: int | None = None
    """The class to make, for a conditional model. If left out: every class in turn."""
    guidance: float | None = None
    """How strongly images are pushed towards their class. If left out: the checkpoint's own."""
    seed: int = 0
    """Seed of the noise, from 0 to 2^63 - 1."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the network. auto: the faster one on this machine."""
    out: Path = Path("edited.png")
    """Where the images go: a .png (one grid: in each row an input and what was made of it), or a
    folder (one PNG each)."""
    metadata: bool = True
    """Files say how they were made."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What every edit is given."""

    checkpoint: Positional[Path]
    """A consistency student: its run's folder or .safetensors file."""
    settings: Settings = Settings()


@dataclass(frozen=True, kw_only=True)
class Inpaint(Edit):
    """Paint what a mask covers, and leave every other pixel as it is."""

    images: Positional[Path]
    """A picture of the model's size, or a folder of them."""
    mask: Positional[Path]
    """A picture of the same size: white where to paint, black what stays."""
    num: int = 1
    """How many ways to paint each picture."""


@dataclass(frozen=True, kw_only=True)
class Upscale(Edit):
    """Enlarge pictures: each square of pixels has the input's pixel as its mean."""

    images: Positional[Path]
    """A picture, or a folder of them. One of another size than the model's by --factor is brought
    to that size first."""
    factor: int = 2
    """How many times as wide and as high; it divides the model's size."""
    num: int = 1
    """How many ways to enlarge each picture."""


@dataclass(frozen=True, kw_only=True)
class Colourise(Edit):
    """Colour grey pictures, with a model of colour images; every pixel keeps its luma."""

    images: Positional[Path]
    """A picture of the model's size, or a folder of them. Of colours the luma is taken."""
    num: int = 1
    """How many ways to colour each picture."""


@dataclass(frozen=True, kw_only=True)
class Sketch(Edit):
    """Make a sketch or coarse strokes into an image of the model's kind (SDEdit, Meng et al. 2022).

    Noise of --angle is added to the sketch and taken away again by the model."""

    images: Positional[Path]
    """A picture of the model's size, or a folder of them."""
    angle: float = 1.0
    """How much noise, in radians above 0 and below 1.57: little keeps the sketch, much makes the
    image good."""
    num: int = 1
    """How many images to make of each sketch."""


@dataclass(frozen=True, kw_only=True)
class Interpolate(Edit):
    """Go from one image of a seed to another in equal turns of the noise between them."""

    first: int = 0
    """The number of the image to begin with."""
    last: int = 1
    """The number of the image to end with."""
    num: int = 8
    """How many images, both ends among them."""


Options = Inpaint | Upscale | Colourise | Sketch | Interpolate


def between(start: Noises, end: Noises, shares: Tensor) -> Iterator[Tensor]:
    """Noises (B, C, H, W) on the quarter circle from start (1, ...) at share 0 to end at share 1.

    cos^2 + sin^2 = 1: each is standard normal again. shares: (B,).
    """
    turn = shares * (torch.pi / 2)
    for a, b in zip(start, end, strict=False):
        yield add_noise(a.expand(len(shares), *a.shape[1:]), b.expand_as(a), turn)


@dataclass(frozen=True)
class Editor:
    """A consistency student, how it is called, and the options that all edits have."""

    model: Model
    plan: Plan
    settings: Settings

    def denoise(self, numbers: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The jump of images of these numbers (B,)."""
        label = self.settings.label
        given = None if label is None else {"label": torch.full_like(numbers, label)}
        condition = self.model.inputs(self.plan, numbers, given)
        return lambda x_t, t: self.model.denoiser(x_t, t, condition)

    def noise(self, numbers: Tensor) -> Noise:
        return Noise(self.settings.seed, numbers, self.model.shape)

    def restored(self, measure: Measure, levels: Tensor, numbers: Tensor) -> Tensor:
        """Images (B, C, H, W) uint8 of these numbers (B,) that measure so: levels (B, G), whole."""
        if (scale := self.model.codec.grey_levels) is None:
            raise UserError("this edit needs a model of pixels: this one's values are none")
        mean, std = scale
        known = (levels.float() - mean) / std
        keep = partial(measure.keep, measured=known)
        start = keep(torch.zeros(len(numbers), *self.model.shape).to(known))
        angles = self.plan.on(numbers.device)
        x0 = restore(self.denoise(numbers), self.noise(numbers), angles, start, keep)
        return measure.settle(x0.double() * std + mean, levels)

    def sketched(self, angle: float, images: Tensor, numbers: Tensor) -> Tensor:
        """Images (B, C, H, W) uint8 from sketches (B, C, H, W) uint8 and noise of that angle."""
        angles, codec = self.plan.on(numbers.device), self.model.codec
        angles = angles * (angle / angles[-1])
        start = codec.encode(images)
        return codec.decode(restore(self.denoise(numbers), self.noise(numbers), angles, start))

    def interpolated(self, first: int, last: int, num: int) -> Tensor:
        """Images (num, C, H, W) uint8 from one number of the seed to another."""
        device = self.model.device
        ends = (self.noise(torch.tensor([number], device=device)) for number in (first, last))
        noise = between(*ends, torch.linspace(0, 1, num, dtype=torch.float64, device=device))
        class_of_first = torch.full((num,), first, device=device)
        x0 = consistency(self.denoise(class_of_first), noise, self.plan.on(device))
        return self.model.codec.decode(x0)


def pictures(path: Path, form: Form) -> Tensor:
    """The pictures of a file or a folder, in order of their names: (N, C, size, size) uint8."""
    paths = pictures_in(path) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"{path} holds no pictures: expected PNGs or the like")
    return torch.stack([_picture(each, form) for each in paths])


def _picture(path: Path, form: Form) -> Tensor:
    try:
        return read(path, form).pixels
    except FileNotFoundError:
        raise UserError(f"no picture at {path}: expected a file or a folder of them") from None
    except Exception as error:  # decoders raise anything
        raise UserError(f"{path} cannot be read as a picture: {reason(error)}") from error


def edit(editor: Editor, options: Options) -> tuple[Tensor, Tensor]:
    """What an edit begins with, (N, C, H, W) uint8, and the (N num, C, H, W) uint8 made of it.

    An interpolation begins with nothing, N = 0.
    """
    shape, device = editor.model.spec.shape, editor.model.device
    channels, size, _ = shape
    if isinstance(options, Interpolate):
        made = editor.interpolated(options.first, options.last, options.num)
        return made[:0].cpu(), made.cpu()
    factor = options.factor if isinstance(options, Upscale) else 1
    if isinstance(options, Upscale) and (not 2 <= factor <= size or size % factor):
        raise UserError(f"--factor must divide the model's size {size}, from 2, got {factor}")
    images = pictures(options.images, Form(size // factor, channels)).to(device)
    begun = images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    repeated = images.repeat_interleave(options.num, 0)
    match options:
        case Sketch():
            return begun.cpu(), _batches(partial(editor.sketched, options.angle), repeated).cpu()
        case Inpaint():
            mask = _picture(options.mask, Form(size, 1)).to(device)[0] < 128
            measure, begun = pixels(mask, channels), torch.where(mask, images, 128)
        case Upscale():
            measure = blocks(shape, factor)
        case Colourise():
            if channels != 3:
                raise UserError("colourise needs a model of colour images, and this one's are grey")
            measure = luma(shape)
            grey = measure.of(images.double()).round().to(torch.uint8)
            begun = grey.reshape(-1, 1, size, size).expand(-1, 3, -1, -1)
    levels = measure.of(repeated.double()).round()
    made = _batches(partial(editor.restored, measure), levels)
    difference = measure.difference(made, levels)
    say(f"what was known is kept: the largest difference is {difference} grey levels")
    return begun.cpu(), made.cpu()


def _batches(make: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
    """make(rows, their numbers), a batch at a time."""
    numbers = torch.arange(len(rows), device=rows.device)
    parts = zip(rows.split(BATCH), numbers.split(BATCH), strict=True)
    return torch.cat([make(*part) for part in parts])


def write(editor: Editor, options: Options, begun: Tensor, made: Tensor) -> None:
    """One grid, each row an input and what was made of it; or a folder of PNGs."""
    settings, model, texts = editor.settings, editor.model, {}
    if settings.metadata:
        name, method = type(options).__name__.lower(), model.card.method
        texts = provenance(model.sha256, method, editor.plan, settings.seed, edit=name)
    if settings.out.suffix:
        rows = made.unflatten(0, (-1, options.num))
        if len(begun):
            rows = torch.cat([begun[:, None], rows], 1)
        save_grid(settings.out, rows.flatten(0, 1), texts, rows.shape[1])
        return
    sha256 = hashlib.sha256(made.numpy().tobytes()).hexdigest()
    job = Job(len(made), len(made), "png", {"made": sha256, "texts": texts})
    write_shards(settings.out, job, lambda _: iter([Batch(0, made, {}, texts)]))


def editor_of(model: Model, settings: Settings) -> Editor:
    """UserError for a model that is no consistency student."""
    if "consistency" not in model.solvers:
        raise UserError(
            f"editing needs a model that jumps from noise to image, which this {model.card.method} "
            "model does not: make one by distill.consistency"
        )
    Checkpoint(model, "").labels(settings.label, 1)
    plan = model.plan(settings.steps, "consistency", None, settings.guidance)
    return Editor(model, plan, settings)


def main() -> None:
    options = tyro.cli(Options, prog="python -m students.edit", config=(OmitArgPrefixes,))
    settings, name = options.settings, type(options).__name__.lower()
    at_least(1, options, "num")
    at_least(1, settings, "steps", most=8)
    check_seed(settings.seed)
    if isinstance(options, Sketch) and not 0 < options.angle < 1.57:
        raise UserError(f"--angle must be above 0 and below 1.57, got {options.angle:g}")
    if isinstance(options, Interpolate):
        at_least(0, options, "first", "last")
        at_least(2, options, "num")
    if settings.out.suffix not in ("", ".png"):
        raise UserError(f"--out must be a .png file or a folder, got {settings.out}")
    (check_file if settings.out.suffix else files_before)(settings.out)
    editor = editor_of(load(options.checkpoint, machine.precision(settings.precision)), settings)
    with doing(f"making {name}", f"{settings.out} is as it was"):
        begun, made = edit(editor, options)
        write(editor, options, begun, made)
    say(f"{name}: {len(made)} images in {editor.plan.num_steps} calls: {settings.out}")


if __name__ == "__main__":
    run(main)
