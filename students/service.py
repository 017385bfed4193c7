"""What a service is asked for, and what makes it: a model behind a batcher."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import BaseModel, ConfigDict, Field

from diffusion.condition import Condition, usual
from diffusion.console import UserError
from diffusion.pictures import grid, png
from diffusion.plan import MOST_STEPS, Plan
from students.api import Checkpoint, ImageModel
from students.batcher import Batcher
from students.filters import Filter
from students.prompts import encode
from students.provenance import provenance
from students.shards import Batch, npz

if TYPE_CHECKING:
    from students.serve import Options

LARGE = 1 << 16  # pixels
SIZES = tuple(2**i for i in range(11))
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Asked(BaseModel):
    """Which images to make."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    num: Annotated[int, Field(ge=1)] = 1
    """How many images."""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """Network calls for each image; the model's own number if left out."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of the noise."""
    first: Annotated[int, Field(ge=0, lt=1 << 53)] = 0
    """The number of the first image of the seed."""
    label: Annotated[int, Field(ge=0)] | None = None
    """The class to make; every class in turn if left out."""
    prompt: Annotated[str, Field(max_length=1000)] | None = None
    """What images shall show, for a model of captions."""
    guidance: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """How strongly images are pushed towards their class; the model's own weight if left out."""
    format: Literal["png", "npz"] = "png"
    """png: one picture, of several images a grid. npz: their pixels, N x H x W x C uint8."""


class Described(BaseModel):
    """What the service makes images with."""

    method: str
    sha256: str
    data: str
    shape: tuple[int, int, int]
    """Height, width and channels."""
    num_classes: int
    """0 for a model without classes."""
    steps: list[int]
    """The numbers of steps that a request may ask for."""
    usual_steps: int
    max_images: int
    batch_size: int


@dataclass
class Service:
    """A model behind a batcher, and what is counted."""

    maker: ImageModel
    options: "Options"
    size: int
    screen: Filter | None = None
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    """The one thread that calls PyTorch. OpenMP keeps threads for each that calls it, and lets all
    of them sleep between two calls once there are more than processors."""

    def __post_init__(self):
        maker, options = self.maker, self.options
        self.batcher = Batcher(
            maker, self.size, options.queue, self.screen, self._seen, options.exact, self.thread
        )
        self.registry = registry = CollectorRegistry()
        count = partial(Counter, registry=registry)
        spread = partial(Histogram, registry=registry)
        self.requests = count("fewstep_requests", "Requests answered", ["status"])
        words = "Seconds from a request for images to its answer"
        self.seconds = spread("fewstep_request_seconds", words, buckets=SECONDS)
        self.made = count("fewstep_images", "Images made")
        self.blocked = count("fewstep_blocked", "Images that were blocked")
        self.batches = spread("fewstep_batch_images", "Images of a batch", buckets=SIZES)
        waiting = Gauge("fewstep_waiting_images", "Images that wait", registry=registry)
        waiting.set_function(lambda: self.batcher.waiting)
        self.steps: list[int] = []
        for steps in range(1, options.max_steps + 1):
            with suppress(UserError):
                maker.plan(steps)
                self.steps.append(steps)
        if not self.steps:
            raise UserError(
                f"this model makes no images in --max-steps {options.max_steps}: raise it"
            )

    def _seen(self, images: int, blocked: int) -> None:
        self.made.inc(images)
        self.blocked.inc(blocked)
        self.batches.observe(images)

    @property
    def usual(self) -> int:
        """The steps of a request that names none: the model's own, or as many as it may ask for."""
        return min(self.maker.plan().num_steps, self.steps[-1])

    def described(self) -> Described:
        maker = self.maker
        return Described(
            method=maker.method,
            sha256=maker.sha256,
            data=maker.spec.name,
            shape=maker.shape,
            num_classes=maker.num_classes,
            steps=self.steps,
            usual_steps=self.usual,
            max_images=self.options.max_images,
            batch_size=self.size,
        )

    def _prompt(self, prompt: str, plan: Plan, rows: torch.Tensor) -> Condition:
        if not isinstance(self.maker, Checkpoint):
            raise UserError("prompt needs a model of captions: leave it out")
        return encode(self.maker.model, plan, [prompt]).condition(rows)

    async def images(self, asked: Asked) -> tuple[bytes, dict[str, str]]:
        """A request's file, and headers that say how it was made. UserError, Full."""
        maker, options, begun = self.maker, self.options, time.perf_counter()
        for name, most in (("num", options.max_images), ("steps", options.max_steps)):
            if (value := getattr(asked, name) or 1) > most:
                raise UserError(f"{name} must be at most {most}, got {value}")
        plan = maker.plan(asked.steps or self.usual, guidance=asked.guidance)
        numbers = range(asked.first, asked.first + asked.num)
        given = maker.labels(asked.label, asked.num)
        rows = torch.tensor(numbers, device=maker.device)
        if asked.prompt is not None:
            loop = asyncio.get_running_loop()
            given |= await loop.run_in_executor(self.thread, self._prompt, asked.prompt, plan, rows)
        condition = usual(maker.kinds, rows, given)
        images, blocked = await self.batcher.images(plan, asked.seed, numbers, condition)
        texts = {}
        if options.metadata:
            which = asked.model_dump(include={"first", "label", "prompt"})
            texts = provenance(maker.sha256, maker.method, plan, asked.seed, **which)
        batch = Batch(asked.first, images, {"blocked": blocked} if self.screen else {}, texts)
        if images.numel() > LARGE:  # what is small is packed before a thread would wake
            content = await asyncio.to_thread(_file, batch, asked.format)
        else:
            content = _file(batch, asked.format)
        return content, {
            "X-Steps": str(plan.num_steps),
            "X-Sampler": plan.sampler,
            "X-Blocked": str(int(blocked.sum())),
            "X-Seconds": f"{time.perf_counter() - begun:.4f}",
        }


def _file(batch: Batch, form: str) -> bytes:
    if form == "npz":
        return npz([batch])
    if len(batch.images) == 1:
        return png(batch.images[0], batch.texts_of(0))
    return png(grid(batch.images), batch.texts)
