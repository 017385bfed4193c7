"""Edit images with a consistency student as it is: `python -m students.edit inpaint CHECKPOINT …`.

Song et al. 2023, algorithm 4: every jump to x0 is followed by putting back what is known of the
image. What is known is always linear, so inpainting, enlarging and colouring are one function.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from diffusion import machine
from diffusion.circle import add_noise
from diffusion.console import UserError, at_least, doing, run, say
from diffusion.files import write_atomic
from diffusion.folders import check_file
from diffusion.image_file import Form, kinds, read, reason
from diffusion.model import Model, load
from diffusion.noise import Noise, check_seed
from diffusion.pictures import grid, png
from diffusion.plan import Plan
from diffusion.samplers import Noises, consistency
from students.api import Checkpoint
from students.provenance import Texts, provenance
from students.shards import Batch, Job, files_before, write_shards

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, section 2.5.1
MOST_CALLS = 8


@dataclass(frozen=True)
class Measure:
    """What is known of an image x: m = sum_i w_i x_i over each of its groups of values.

    The groups are disjoint, so x -> the nearest image that measures m is one orthogonal projection:
    each group moves along w by (m - w x) / |w|^2. Song et al. 2023, algorithm 4, has it as
    A^-1[A y (1 - mask) + A x mask] for an orthogonal A whose first row in a group is w / |w|.
    """

    weights: tuple[float, ...]
    """w, of sum 1: a measured value is a grey level as well, and any scaling of levels commutes."""
    split: Callable[[Tensor], Tensor]
    """(B, C, H, W) -> groups (B, G, len(weights))."""
    join: Callable[[Tensor], Tensor]
    """The inverse of split."""
    known: Tensor | None = None
    """(G,) bool, which groups are measured; None for all."""

    def of(self, images: Tensor) -> Tensor:
        """m (B, G) of images."""
        groups = self.split(images)
        return groups @ groups.new_tensor(self.weights)

    def keep(self, x: Tensor, measured: Tensor) -> Tensor:
        """The image nearest to x that measures so where it is known."""
        w = x.new_tensor(self.weights)
        missing = self._where_known(measured - self.of(x))
        return self.join(self.split(x) + missing[..., None] * (w / w.square().sum()))

    def settle(self, images: Tensor, measured: Tensor) -> Tensor:
        """uint8 images that measure so to the grey level, near these float ones.

        measured: (B, G) whole grey levels. The nearest images that are from 0 to 255 and measure so
        are clamp(x + k w), k found for each group by halving; rounding then passes each value's
        error on to the next of its group, the lightest last.
        """
        x, m = self.split(images.double()), measured.double()
        w = x.new_tensor(self.weights)
        reach = (x.abs().max() + 255) / w.min()  # from wherever x is, to black and to white
        low, high = torch.zeros_like(m) - reach, torch.zeros_like(m) + reach
        for _ in range(64):
            middle = (low + high) / 2
            below = (x + middle[..., None] * w).clamp(0, 255) @ w < m
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        shift = self._where_known((low + high) / 2)
        x = (x + shift[..., None] * w).clamp(0, 255)
        rounded, error = torch.empty_like(x), torch.zeros_like(m)
        for i in w.argsort(descending=True).tolist():
            rounded[..., i] = (x[..., i] + error / w[i]).round().clamp(0, 255)
            error = self._where_known(error + w[i] * (x[..., i] - rounded[..., i]))
        return self.join(rounded).to(torch.uint8)

    def difference(self, images: Tensor, measured: Tensor) -> int:
        """The largest difference of what uint8 images measure, as whole grey levels, from m."""
        now = self.of(images.double()).round()
        return int(self._where_known(now - measured).abs().max())

    def _where_known(self, values: Tensor) -> Tensor:
        return values if self.known is None else torch.where(self.known, values, 0)


def pixels(mask: Tensor, channels: int) -> Measure:
    """Every value where mask (H, W) bool is True."""
    shape = (channels, *mask.shape)
    known = mask.expand(shape).flatten()
    return Measure(
        (1.0,), lambda x: x.flatten(1)[..., None], lambda g: g.reshape(-1, *shape), known
    )


def blocks(shape: tuple[int, int, int], factor: int) -> Measure:
    """The means of squares of factor x factor pixels, channel by channel."""
    c, h, w = shape
    cut = (c, h // factor, factor, w // factor, factor)

    def split(x: Tensor) -> Tensor:
        return x.reshape(-1, *cut).transpose(3, 4).reshape(len(x), -1, factor * factor)

    def join(groups: Tensor) -> Tensor:
        parts = groups.reshape(-1, c, h // factor, w // factor, factor, factor)
        return parts.transpose(3, 4).reshape(-1, c, h, w)

    return Measure((1 / factor**2,) * factor**2, split, join)


def luma(shape: tuple[int, int, int]) -> Measure:
    """The luma of colours."""
    return Measure(
        LUMA,
        lambda x: x.flatten(2).transpose(1, 2),
        lambda groups: groups.transpose(1, 2).reshape(-1, *shape),
    )


@torch.no_grad()
def restore(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Noises,
    angles: Tensor,
    start: Tensor,
    keep: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Song et al. 2023, algorithm 4: x0 (B, C, H, W), one call for each angle above 0.

    angles: ascending from 0. start: the x0 that the first noise is added to. keep: puts back what
    is known after each jump.
    """
    x0 = start
    for t in angles[1:].flip(0):
        x0 = keep(denoise(add_noise(x0, next(noise), t), t))
    return x0


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


@dataclass(frozen=True)
class Inpaint:
    """Paint what a mask covers, and leave every other pixel as it is."""

    checkpoint: Positional[Path]
    """A consistency student: its run's folder or .safetensors file."""
    images: Positional[Path]
    """A picture of the model's size, or a folder of them."""
    mask: Positional[Path]
    """A picture of the same size: white where to paint, black what stays."""
    num: int = 1
    """How many ways to paint each picture."""
    settings: Settings = Settings()


@dataclass(frozen=True)
class Upscale:
    """Enlarge pictures: each square of pixels has the input's pixel as its mean."""

    checkpoint: Positional[Path]
    """A consistency student: its run's folder or .safetensors file."""
    images: Positional[Path]
    """A picture, or a folder of them. One of another size than the model's by --factor is brought
    to that size first."""
    factor: int = 2
    """How many times as wide and as high; it divides the model's size."""
    num: int = 1
    """How many ways to enlarge each picture."""
    settings: Settings = Settings()


@dataclass(frozen=True)
class Colourise:
    """Colour grey pictures, with a model of colour images; every pixel keeps its luma."""

    checkpoint: Positional[Path]
    """A consistency student: its run's folder or .safetensors file."""
    images: Positional[Path]
    """A picture of the model's size, or a folder of them. Of colours the luma is taken."""
    num: int = 1
    """How many ways to colour each picture."""
    settings: Settings = Settings()


@dataclass(frozen=True)
class Sketch:
    """Make a sketch or coarse strokes into an image of the model's kind (SDEdit, Meng et al. 2022).

    Noise of --angle is added to the sketch and taken away again by the model."""

    checkpoint: Positional[Path]
    """A consistency student: its run's folder or .safetensors file."""
    images: Positional[Path]
    """A picture of the model's size, or a folder of them."""
    angle: float = 1.0
    """How much noise, in radians above 0 and below 1.57: little keeps the sketch, much makes the
    image good."""
    num: int = 1
    """How many images to make of each sketch."""
    settings: Settings = Settings()


@dataclass(frozen=True)
class Interpolate:
    """Go from one image of a seed to another in equal turns of the noise between them."""

    checkpoint: Positional[Path]
    """A consistency student: its run's folder or .safetensors file."""
    first: int = 0
    """The number of the image to begin with."""
    last: int = 1
    """The number of the image to end with."""
    num: int = 8
    """How many images, both ends among them."""
    settings: Settings = Settings()


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
        condition = self.model.told(self.plan, numbers, given)
        return lambda x_t, t: self.model.denoiser(x_t, t, condition)

    def restored(self, measure: Measure, levels: Tensor, numbers: Tensor) -> Tensor:
        """Images (B, C, H, W) uint8 of these numbers (B,) that measure so: levels (B, G), whole."""
        scale = self.model.codec.grey_levels
        if scale is None:
            raise UserError("this edit needs a model of pixels: this one's values are none")
        mean, std = scale
        known = (levels.float() - mean) / std
        x0 = restore(
            self.denoise(numbers),
            Noise(self.settings.seed, numbers, self.model.shape),
            self.plan.on(numbers.device),
            measure.keep(torch.zeros(len(numbers), *self.model.shape).to(known), known),
            lambda x: measure.keep(x, known),
        )
        return measure.settle(x0.double() * std + mean, levels)

    def sketched(self, images: Tensor, angle: float, numbers: Tensor) -> Tensor:
        """Images (B, C, H, W) uint8 from sketches (B, C, H, W) uint8 and noise of that angle."""
        angles = self.plan.on(numbers.device)
        noise = Noise(self.settings.seed, numbers, self.model.shape)
        start = self.model.codec.encode(images)
        x0 = restore(self.denoise(numbers), noise, angles * (angle / angles[-1]), start)
        return self.model.codec.decode(x0)

    def interpolated(self, first: int, last: int, num: int) -> Tensor:
        """Images (num, C, H, W) uint8 from one number of the seed to another."""
        model, device = self.model, self.model.device
        ends = (torch.tensor([number], device=device) for number in (first, last))
        start, end = (Noise(self.settings.seed, number, model.shape) for number in ends)
        noise = between(start, end, torch.linspace(0, 1, num, dtype=torch.float64, device=device))
        class_of_first = torch.full((num,), first, device=device)
        angles = self.plan.on(device)
        return model.codec.decode(consistency(self.denoise(class_of_first), noise, angles))


def pictures(path: Path, form: Form) -> Tensor:
    """The pictures of a file or a folder, in order of their names: (N, C, size, size) uint8."""
    paths = [path]
    if path.is_dir():
        paths = sorted(each for each in path.iterdir() if each.suffix.lower() in kinds()[1])
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
    channels, size, _ = shape = editor.model.spec.shape
    device = editor.model.device
    if isinstance(options, Interpolate):
        made = editor.interpolated(options.first, options.last, options.num)
        return made[:0].cpu(), made.cpu()
    if isinstance(options, Upscale):
        if not 2 <= options.factor <= size or size % options.factor:
            raise UserError(
                f"--factor must divide the model's size {size}, from 2, got {options.factor}"
            )
        size //= options.factor
    images = pictures(options.images, Form(size, channels)).to(device)
    numbers = torch.arange(len(images) * options.num, device=device)
    repeated = images.repeat_interleave(options.num, 0)
    match options:
        case Sketch():
            parts = zip(repeated.split(BATCH), numbers.split(BATCH), strict=True)
            made = [editor.sketched(part, options.angle, rows) for part, rows in parts]
            return images.cpu(), torch.cat(made).cpu()
        case Inpaint():
            mask = _picture(options.mask, Form(size, 1)).to(device)[0] < 128
            measure, levels = pixels(mask, channels), repeated.flatten(1).double()
            shown = torch.where(mask, images, 128)
        case Upscale():
            measure, levels = blocks(shape, options.factor), repeated.flatten(1).double()
            each = options.factor
            shown = images.repeat_interleave(each, 2).repeat_interleave(each, 3)
        case Colourise():
            if channels != 3:
                raise UserError("colourise needs a model of colour images, and this one's are grey")
            measure = luma(shape)
            levels = measure.of(repeated.double()).round()
            shown = levels[:: options.num].reshape(-1, 1, size, size).expand(-1, 3, -1, -1)
    parts = zip(levels.split(BATCH), numbers.split(BATCH), strict=True)
    made = torch.cat([editor.restored(measure, part, rows) for part, rows in parts])
    difference = measure.difference(made, levels)
    say(f"what was known is kept: the largest difference is {difference} grey levels")
    return shown.to(torch.uint8).cpu(), made.cpu()


BATCH = 256


def write(editor: Editor, options: Options, begun: Tensor, made: Tensor, texts: Texts) -> None:
    """One grid, each row an input and what was made of it; or a folder of PNGs."""
    settings = editor.settings
    if settings.out.suffix:
        rows = made.unflatten(0, (-1, options.num))
        if len(begun):
            rows = torch.cat([begun[:, None], rows], 1)
        write_atomic(settings.out, png(grid(rows.flatten(0, 1), rows.shape[1]), texts))
        return
    sha256 = hashlib.sha256(made.numpy().tobytes()).hexdigest()
    job = Job(len(made), len(made), "png", {"made": sha256, "texts": texts})
    write_shards(settings.out, job, lambda _: iter([Batch(0, made, {}, texts)]))


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m students.edit", config=config)
    settings = options.settings
    at_least(1, options, "num")
    at_least(1, settings, "steps", most=MOST_CALLS)
    check_seed(settings.seed)
    if isinstance(options, Sketch) and not 0 < options.angle < 1.57:
        raise UserError(f"--angle must be above 0 and below 1.57, got {options.angle:g}")
    if isinstance(options, Interpolate):
        at_least(0, options, "first", "last")
        at_least(2, options, "num")
    if settings.out.suffix not in ("", ".png"):
        raise UserError(f"--out must be a .png file or a folder, got {settings.out}")
    if settings.out.suffix:
        check_file(settings.out)
    else:
        files_before(settings.out)
    editor = editor_of(load(options.checkpoint, machine.precision(settings.precision)), settings)
    name = type(options).__name__.lower()
    with doing(f"making {name}", f"{settings.out} is as it was"):
        begun, made = edit(editor, options)
        model, plan = editor.model, editor.plan
        texts = {}
        if settings.metadata:
            method = model.card.method
            texts = provenance(model.sha256, method, plan, settings.seed, edit=name)
        write(editor, options, begun, made, texts)
    say(f"{name}: {len(made)} images in {plan.num_steps} calls: {settings.out}")


def editor_of(model: Model, settings: Settings) -> Editor:
    """UserError for a model that is no consistency student."""
    if "consistency" not in model.solvers:
        raise UserError(
            f"editing needs a model that jumps from noise to image, which this {model.card.method} "
            "model does not: make one by distill.consistency"
        )
    Checkpoint(model, "").labels(settings.label, 1)
    return Editor(
        model, model.plan(settings.steps, "consistency", None, settings.guidance), settings
    )


if __name__ == "__main__":
    run(main)
