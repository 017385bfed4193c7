"""Images from Python: `from students import load; images = load("runs/digits/consistency")(64)`.

One object for whatever makes images: a checkpoint or a run's folder, and what students.export made
of one. students.generate makes its images by the same code, so that a command and a program that
ask for the same seed get the same bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from diffusion import machine
from diffusion import model as models
from diffusion.condition import Condition, Kinds, Label, take
from diffusion.console import UserError
from diffusion.data import ImageSpec
from diffusion.model import Model
from diffusion.noise import check_seed
from diffusion.plan import Plan
from students import budget, filters
from students.filters import Filter
from students.prompts import Prompts, encode

Images = NDArray[np.uint8]
"""N x H x W x C, from 0 to 255; one channel or three."""
BATCH = 256


class ImageModel(ABC):
    """What makes images: call it with a number of images.

    Image i of a seed is the same image, whatever the batch size and however many are made; only the
    rounding of batches below eight can differ, by a grey level in some pixel of 30,000.
    """

    name: str
    """Where it was loaded from."""
    spec: ImageSpec
    """The name and the shape of the images that it was trained on."""
    kinds: Kinds
    """The conditions that it takes, such as a label, by name."""
    device: torch.device
    method: str
    """How it was made, such as consistency-cd."""
    sha256: str
    """Identity of its weights."""
    screen: Filter | None = None
    """What scores every image that a call or a stream gives, and blocks some."""
    blocked: int = 0
    """Images that were blocked so far: plain grey ones are in their places."""

    @abstractmethod
    def plan(
        self, steps: int | None = None, sampler: str | None = None, guidance: float | None = None
    ) -> Plan:
        """How it would make images in so many steps: sampler, angles and guidance, with its own
        for all that is left out. UserError for what it cannot do."""

    @abstractmethod
    def make(self, plan: Plan, seed: int | Tensor, numbers: Tensor, condition: Condition) -> Tensor:
        """Images of these numbers (B,) of the seed, as one batch: (B, C, H, W) uint8.

        seed: one for all, or each image's (B,).
        condition: rows (B, ...) by name; what it lacks is as usual for images of these numbers.
        """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        channels, height, width = self.spec.shape
        return height, width, channels

    @property
    def num_classes(self) -> int:
        """How many classes `label` may ask for; 0 for a model without classes."""
        label = self.kinds.get("label")
        return label.num_classes if isinstance(label, Label) else 0

    def __call__(
        self,
        num: int,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        label: int | Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        time_budget: str | None = None,
        quality: str | None = None,
        seed: int = 0,
        batch_size: int = BATCH,
    ) -> Images:
        """So many images, N x H x W x C uint8, on the CPU.

        steps: network calls for each image; the model's own number if left out. sampler: how to go
        from noise to image, one of diffusion.samplers.SOLVERS. label: the class of all images, or
        of each; every class in turn if left out. prompt: what images show, of a model of captions;
        of several, images take one after the other. negative_prompt: what guidance leads away
        from. guidance: how strongly images are pushed towards their class or prompt. time_budget,
        quality: in place of steps, such as "20ms" and "1.2x": students.budget.choose. batch_size:
        images that the network makes at a time.
        Raises UserError for what the model cannot do.
        """
        _require_count("num", num)
        _require_count("batch_size", batch_size)
        height, width, channels = self.shape
        machine.require_memory("num", num, num * height * width * channels)
        if time_budget or quality:
            if steps is not None or sampler is not None:
                raise UserError("time_budget and quality choose the steps: leave steps out")
            plan = self.within(num, batch_size, time_budget, quality, guidance)
        else:
            plan = self.plan(steps, sampler, guidance)
        condition = self.labels(label, num)
        prompts = self.prompts(prompt, negative_prompt, plan)
        batches = self.batches(plan, seed, range(num), condition, batch_size, prompts)
        return np.concatenate([self._screened(images) for images in batches])

    def stream(
        self,
        num: int | None = None,
        *,
        first: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        label: int | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = BATCH,
    ) -> Iterator[Images]:
        """Batches of images, each B x H x W x C uint8, as they are made; without num, without end.

        first: the number of the first image, from which a stream that was left goes on. The other
        arguments are those of a call.
        """
        if num is not None:
            _require_count("num", num)
        _require_count("batch_size", batch_size)
        _require_count("first", first, least=0)
        plan = self.plan(steps, sampler, guidance)
        self.labels(label, 1)  # a wrong one is an error now, not at the first batch
        check_seed(seed, "seed")
        prompts = self.prompts(prompt, negative_prompt, plan)
        starts = count(first, batch_size) if num is None else range(first, first + num, batch_size)

        def batches() -> Iterator[Images]:
            for start in starts:
                end = start + batch_size if num is None else min(start + batch_size, first + num)
                condition, numbers = self.labels(label, end - start), range(start, end)
                for images in self.batches(plan, seed, numbers, condition, batch_size, prompts):
                    yield self._screened(images)

        return batches()

    def _screened(self, images: Tensor) -> Images:
        if self.screen:
            images, blocked = self.screen(images)
            self.blocked += int(blocked.sum())
        return to_numpy(images)

    def within(
        self,
        num: int,
        batch_size: int,
        time_budget: str | None,
        quality: str | None,
        guidance: float | None = None,
    ) -> Plan:
        """The plan that students.budget.choose takes. UserError where there is no choice."""
        raise UserError(f"{self.name} makes images in one way: leave time_budget and quality out")

    def prompts(
        self, prompt: str | Sequence[str] | None, negative: str | None, plan: Plan
    ) -> Prompts | None:
        """The prompts, encoded; None for none. UserError where the model takes none."""
        if prompt is None and negative is None:
            return None
        raise UserError(f"{self.name} takes no prompts: load a checkpoint of a model of captions")

    def labels(self, label: int | Sequence[int] | None, num: int) -> dict[str, Tensor]:
        """The condition of so many images of that class, or of these classes."""
        if label is None:
            return {}
        if not self.num_classes:
            raise UserError(
                f"--label {label} needs a model with classes, and this one has none: leave it out"
            )
        labels = [label] * num if isinstance(label, int) else [int(each) for each in label]
        if len(labels) != num:
            raise UserError(f"label must be one class, or {num}, got {len(labels)}")
        if wrong := [each for each in labels if not 0 <= each < self.num_classes]:
            raise UserError(
                f"--label must be below the model's {self.num_classes} classes, got {wrong[0]}"
            )
        return {"label": torch.tensor(labels, device=self.device)}

    def batches(
        self,
        plan: Plan,
        seed: int,
        numbers: range,
        condition: Condition | None = None,
        batch_size: int = BATCH,
        prompts: Prompts | None = None,
    ) -> Iterator[Tensor]:
        """The images of these numbers, batch by batch: (B, C, H, W) uint8 on the CPU.

        condition: rows (len(numbers), ...) by name. prompts: which images take in turn.
        """
        check_seed(seed, "seed")
        for start in range(0, len(numbers), batch_size):
            rows = slice(start, start + batch_size)
            part = torch.tensor(numbers[rows], device=self.device)
            given = {
                **(take(condition, rows) or {}),
                **(prompts.condition(part) if prompts else {}),
            }
            yield self.make(plan, seed, part, given).cpu()


class Checkpoint(ImageModel):
    """A teacher or a student as training left it: a Model of diffusion.model."""

    def __init__(self, model: Model, name: str):
        self.model, self.name = model, name
        self.spec, self.kinds, self.device = model.spec, model.kinds, model.device
        self.method, self.sha256 = model.card.method, model.sha256

    def plan(
        self, steps: int | None = None, sampler: str | None = None, guidance: float | None = None
    ) -> Plan:
        return self.model.plan(steps, sampler, guidance=guidance)

    def within(
        self,
        num: int,
        batch_size: int,
        time_budget: str | None,
        quality: str | None,
        guidance: float | None = None,
    ) -> Plan:
        table = budget.table_of(Path(self.name))
        choice = budget.choose(self.model, num, batch_size, time_budget, quality, table, guidance)
        return choice.way.plan

    def prompts(
        self, prompt: str | Sequence[str] | None, negative: str | None, plan: Plan
    ) -> Prompts | None:
        if prompt is None and negative is None:
            return None
        texts = [prompt] if isinstance(prompt, str) else list(prompt or [""])
        return encode(self.model, plan, texts, negative)

    def make(self, plan: Plan, seed: int | Tensor, numbers: Tensor, condition: Condition) -> Tensor:
        """Raises UserError for images that are not finite, which as uint8 would be black."""
        x0 = self.x0(plan, seed, numbers, condition)
        if not x0.isfinite().all():
            raise UserError(
                f"{self.name} makes images that are not finite (NaN or infinite): its training "
                "failed, or its angles are none that it was trained at; train it again with a "
                "lower --learning-rate, or give other --steps"
            )
        return self.model.codec.decode(x0)

    def x0(self, plan: Plan, seed: int | Tensor, numbers: Tensor, condition: Condition) -> Tensor:
        """The images that `make` returns, before they become pixels."""
        return self.model.x0(plan, seed, numbers, condition)


def load(
    path: str | Path | Model,
    *,
    device: str | torch.device | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    autoencoder: str | Path | None = None,
    filter: str | Callable[[Images], ArrayLike] | None = None,
    filter_threshold: float = 0.5,
    trust: bool = False,
) -> ImageModel:
    """What makes images: a run's folder or a checkpoint, what students.export wrote (a folder, or
    the .onnx, .pt2 or .safetensors file in it), another maker's model as diffusers:PATH, or a Model
    that was just trained.

    device: such as "cuda:1"; the first GPU if left out, or the CPU. precision: the network's number
    format; auto is the faster one on this machine. A graph has its own. autoencoder: where that of
    a model in latents is now, if it has moved. filter: what scores every image of a call or a
    stream: an ONNX classifier's file, module:package.module:function, or a function of images
    N x H x W x C uint8; those of filter_threshold and above are replaced by plain grey ones, and
    counted in `blocked`. trust: load a .pt2 file, which can run code of its maker.
    Raises UserError for what is no model.
    """
    made = _load(path, device, precision, autoencoder, trust)
    if filter is not None:
        made.screen = filters.load(filter, filter_threshold)
    return made


def _load(
    path: str | Path | Model,
    device: str | torch.device | None,
    precision: str,
    autoencoder: str | Path | None,
    trust: bool,
) -> ImageModel:
    if isinstance(path, Model):
        return Checkpoint(path, path.card.method)
    where = torch.device(device) if device is not None else machine.this_device()
    if where.type not in ("cpu", "cuda"):
        raise UserError(f"device must be cpu or cuda, whose numbers have 64 bits, got {device}")
    from students import exported  # torch.export is slow to import

    chosen, apart = machine.precision(precision), Path(autoencoder) if autoencoder else None
    if made := exported.load(Path(path), where, chosen, trust):
        return made
    return Checkpoint(models.load(Path(path), chosen, where, apart, trust=trust), str(path))


def to_numpy(images: Tensor) -> Images:
    """(N, C, H, W) uint8 as N x H x W x C."""
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def to_tensor(images: Images) -> Tensor:
    """N x H x W x C uint8 as a tensor (N, C, H, W) uint8."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_pil(images: Images) -> list[Image.Image]:
    """N x H x W x C uint8 as pictures of Pillow: grey of one channel, RGB of three."""
    return [Image.fromarray(each[:, :, 0] if each.shape[2] == 1 else each) for each in images]


def _require_count(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")
