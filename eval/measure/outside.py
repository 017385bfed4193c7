"""Images that others made: a folder, an .npz, or an ONNX file that makes them from noise."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.codec import Scale
from diffusion.condition import Condition, Kinds
from diffusion.console import UserError, printable
from diffusion.data import ImageSpec
from diffusion.image_file import Form, kinds, read, reason, unlimited
from diffusion.image_folder import pictures_in
from diffusion.noise import Noise
from eval.measure import custom
from eval.measure.inception import file_sha256
from eval.measure.npz import read_npz
from eval.measure.real import fingerprint
from students import ImageModel, exported

ARRAYS = ("images", "arr_0")  # names of an .npz's images; the second is numpy's own
LEVELS = Scale(0.0, 1.0)  # of images that are grey levels already
SCORED = (".npz", ".onnx")


@dataclass(frozen=True, eq=False)
class Outside:
    """A row whose images another program makes or made; itself a key, like a Row."""

    path: Path
    sampler: str
    """Where they come from: folder, npz or onnx."""
    sha256: str
    codec: Scale
    device: torch.device
    make: Callable[[int, Tensor], Tensor]
    """(seed, numbers of images) -> x0 (B, C, H, W) on the device."""
    plan = None
    long = False
    kinds: ClassVar[Kinds] = {}

    @property
    def title(self) -> str:
        return f"{self.path.stem}, {self.sampler}"

    @property
    def method(self) -> str:
        """What its row is called."""
        return printable(self.path.stem if self.path.suffix in SCORED else self.path.name)

    def x0(self, plan: None, seed: int, indices: Tensor, given: Condition | None = None) -> Tensor:
        """As a Model's; it is told nothing."""
        return self.make(seed, indices)


def is_outside(path: Path) -> bool:
    """Whether it is no run: a file of images or a generator, or a folder of images without a
    checkpoint in it."""
    if path.suffix in SCORED or not path.is_dir():
        return path.suffix in SCORED
    return bool(pictures_in(path)) and not next(path.rglob("model.safetensors"), None)


def form_of(path: Path) -> Form:
    """The size and the channels that images of that place have: a folder's, those of its first."""
    if path.suffix == ".npz":
        _, height, width, channels = npz(path).permute(0, 2, 3, 1).shape
    elif path.suffix == ".onnx":
        images, _ = _generator(path)(0, torch.arange(2))
        channels, height, width = images.shape[1:]
    else:
        with unlimited(), Image.open(pictures_in(path)[0], formats=kinds()[0]) as image:
            height = width = min(image.size)
            channels = 1 if image.mode in ("1", "L", "LA") else 3
    if height != width:
        raise UserError(f"{path}: expected square images, got {height} x {width}")
    return Form(height, channels)


def row(
    path: Path,
    spec: ImageSpec,
    num_images: int,
    seeds: tuple[int, ...],
    limits: tuple[float, float],
    device: torch.device,
) -> Outside:
    """The images of that place as a row. UserError where they are too few or of another shape.

    Of a file or a folder, in a random order that is always the same, each seed has the next
    num_images. limits: what an ONNX generator's floats have for black and for white.
    """
    if path.suffix == ".onnx":
        make, sha256, codec = _from_noise(path, spec, limits)
        made = Outside(path, "onnx", sha256, codec, device, lambda *x: make(*x).to(device))
        made.make(seeds[0], torch.arange(2))  # a wrong shape comes before the work
        return made
    images = npz(path) if path.suffix == ".npz" else folder(path, spec.form)
    _require_shape(path, tuple(images.shape[1:]), spec)
    needed = num_images * len(seeds)
    if len(images) < needed:
        each = f" for each of {len(seeds)} seeds" if len(seeds) > 1 else ""
        raise UserError(
            f"{path} holds {len(images):,} images, and the table's rows have {num_images:,}{each}: "
            f"give --num-images {len(images) // len(seeds)}, or more images"
        )
    # in random order, for files may be sorted by class
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    images = images[:needed]
    first = {seed: num_images * i for i, seed in enumerate(seeds)}

    def stored(seed: int, numbers: Tensor) -> Tensor:
        return images[numbers.cpu() + first[seed]].to(device).float()

    kind = "npz" if path.suffix == ".npz" else "folder"
    return Outside(path, kind, fingerprint(images), LEVELS, device, stored)


def npz(path: Path) -> Tensor:
    """(N, C, H, W) uint8 of an .npz that holds N x H x W x C, as `images` or `arr_0`."""
    arrays = read_npz(path, ARRAYS, "an .npz file with `images` or `arr_0`")
    images = next(iter(arrays.values()))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"{path}: expected uint8 images, N x H x W x 1 or 3, got {images.dtype} {images.shape}"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def folder(path: Path, form: Form) -> Tensor:
    """(N, C, size, size) uint8 of the images in a folder, in the order of their names: each cut
    and resized to the form, which changes none that has it. UserError names a file that is none."""

    def image(file: Path) -> Tensor:
        try:
            return read(file, form).pixels
        except Exception as error:  # decoders raise anything
            raise UserError(f"{file} cannot be read: it is {reason(error)}") from error

    with unlimited(), ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(image, pictures_in(path))))


def _require_shape(path: Path, shape: tuple[int, ...], spec: ImageSpec) -> None:
    if shape != spec.shape:
        raise UserError(
            f"{path} has images of shape {shape} (channels, height, width), and those that they "
            f"are compared with have {spec.shape}: make them alike first"
        )


def _from_noise(
    path: Path, spec: ImageSpec, limits: tuple[float, float]
) -> tuple[Callable[[int, Tensor], Tensor], str, Scale]:
    """What makes x0 by an ONNX file, the identity of both, and the codec of its x0."""
    low, high = limits
    generate = _generator(path)
    whole = generate(0, torch.arange(2))[1]
    std = 255 / (high - low)
    codec = LEVELS if whole else Scale(-low * std, std)

    def make(seed: int, numbers: Tensor) -> Tensor:
        images, _ = generate(seed, numbers.cpu())
        _require_shape(path, tuple(images.shape[1:]), spec)
        return images

    sha256 = file_sha256(path)
    return make, sha256, codec


def _of_ours(model: ImageModel) -> Callable[[int, Tensor], tuple[Tensor, bool]]:
    """The same of a file that students.export wrote: the images of its checkpoint's noise, and as
    usual where it takes a label or a guidance weight."""
    plan = model.plan()
    return lambda seed, numbers: (model.make(plan, seed, numbers, {}).float(), True)


def _generator(path: Path) -> Callable[[int, Tensor], tuple[Tensor, bool]]:
    """(seed, numbers of images) -> the file's output as float images (B, C, H, W), and whether it
    is of uint8. The file takes one input, normal noise (B, ...), and may be of a fixed batch, or
    students.export wrote it."""
    session = custom.session(path, "a generator")
    if exported.says(session):
        return _of_ours(exported.load_onnx(path, torch.device("cpu")))
    inputs = session.get_inputs()
    sizes = inputs[0].shape[1:] if inputs else []
    if (
        len(inputs) != 1
        or inputs[0].type != "tensor(float)"
        or not all(isinstance(size, int) for size in sizes)
    ):
        got = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        raise UserError(
            f"{path}: expected one input, float noise (B, ...) of fixed sizes but B, got {got}"
        )
    name, batch = inputs[0].name, inputs[0].shape[0]

    def call(noise: Tensor) -> np.ndarray:
        try:
            return np.asarray(session.run(None, {name: noise.numpy()})[0])
        except Exception as error:
            raise UserError(
                f"{path} fails on noise {tuple(noise.shape)} ({error!s:.200})"
            ) from error

    def generate(seed: int, numbers: Tensor) -> tuple[Tensor, bool]:
        noise = next(iter(Noise(seed, numbers, tuple(sizes))))
        if isinstance(batch, int):  # of that size alone: the last one is filled up
            count = ceil(len(noise) / batch) * batch
            parts = noise[torch.arange(count) % len(noise)].split(batch)
        else:
            parts = (noise,)
        images = np.concatenate([call(part) for part in parts])[: len(noise)]
        if images.ndim != 4 or {*images.shape[1::2]}.isdisjoint({1, 3}):
            raise UserError(f"{path}: expected images (B, C, H, W) or (B, H, W, C) with 1 or 3 "
                            f"channels, got {images.shape}")  # fmt: skip
        made = torch.from_numpy(images)
        if images.shape[1] not in (1, 3):
            made = made.permute(0, 3, 1, 2)
        return made.float(), images.dtype == np.uint8

    return generate
