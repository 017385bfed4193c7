"""THE training loop. Objectives differ; everything else is here, once."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion.checkpoint import load_tensors, save_tensors
from diffusion.console import Interrupted, UserError
from diffusion.data import Dataset

ANNEAL = {
    "none": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass(frozen=True)
class FitConfig:
    """How a network is trained, whatever the objective."""

    iterations: int = 2000
    """Optimizer steps."""
    batch_size: int = 256
    """Images per step, over all processes together."""
    learning_rate: float = 1e-3
    """Adam's, after warm-up."""
    warmup: int = 100
    """Steps over which the learning rate rises from 0."""
    anneal: Literal["none", "linear", "cosine"] = "cosine"
    """How the learning rate falls to 0 at the end."""
    ema: float = 0.999
    """Decay of the weights' average that is kept; it ramps up from 0. 0 keeps the raw weights."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the network's passes; weights, sums and losses stay float32."""
    compile: bool = False
    """torch.compile the network; pays after a minute or two on a GPU."""
    label_dropout: float = 0.1
    """Share of labels that a conditional model sees as its null class."""
    flip: bool = False
    """Mirror half of the images; only where that keeps their class."""
    seed: int = 0
    """Of all randomness: batch i is a function of (seed, i) alone."""
    log_every: int = 25
    """Steps between log lines; the only time that the loop waits for the device."""
    save_every: float = 30.0
    """Least seconds between saves of the state to resume from."""


LIMITS = {
    "iterations": ("at least 1", lambda n: n >= 1),
    "batch_size": ("at least 1", lambda n: n >= 1),
    "log_every": ("at least 1", lambda n: n >= 1),
    "learning_rate": ("above 0", lambda rate: rate > 0),
    "weight_decay": ("at least 0", lambda decay: decay >= 0),
    "clip": ("above 0", lambda norm: norm > 0),
    "ema": ("in [0, 1)", lambda decay: 0 <= decay < 1),
    "label_dropout": ("in [0, 1]", lambda share: 0 <= share <= 1),
}


def check(config: FitConfig) -> None:
    """UserError for a setting that cannot be trained with."""
    for name, (words, holds) in LIMITS.items():
        value = getattr(config, name)
        if not holds(value):
            raise UserError(f"--{name.replace('_', '-')} must be {words}, got {value:g}")


class Batch(NamedTuple):
    """All that is random in a training step, so that an objective is a function of its inputs."""

    x0: Tensor
    """(B, C, H, W) float32, zero mean and unit variance."""
    eps: Tensor
    """(B, C, H, W) standard normal."""
    level: Tensor
    """(B,) float64 in [0, 1), stratified over the global batch (Kingma et al. 2021, app. I.1)."""
    label: Tensor | None
    """(B,) int64."""
    seed: int
    """torch.manual_seed(seed) before a second network pass repeats the first's dropout mask."""


@dataclass(frozen=True)
class Average:
    """A denoiser that follows the student: w <- decay w + (1 - decay) student, after each step."""

    denoiser: nn.Module
    decay: Callable[[int], float]
    """Optimizer steps done -> decay."""

    @torch.no_grad()
    def follow(self, student: nn.Module, done: int) -> None:
        torch._foreach_lerp_(
            list(self.denoiser.parameters()), list(student.parameters()), 1 - self.decay(done)
        )


class Objective(Protocol):
    averages: Sequence[Average]
    """Averages of the student that the objective reads."""

    def __call__(self, student: nn.Module, batch: Batch, progress: float) -> Tensor:
        """Loss per image (B,). progress: the share of the training that is done, in [0, 1)."""


class Progress(NamedTuple):
    """One log line; loss and gradient norm are means since the last."""

    iteration: int
    iterations: int
    loss: float
    gradient_norm: float
    learning_rate: float
    images_per_second: float
    seconds: float


def frozen_copy(denoiser: nn.Module) -> nn.Module:
    return deepcopy(denoiser).eval().requires_grad_(False)


def fit(
    denoiser: nn.Module, objective: Objective, dataset: Dataset, config: FitConfig, state: Path
) -> Iterator[Progress]:
    """Train the denoiser in place; it ends with its averaged weights.

    Resumes from the file `state` where there is one, to the same result bit for bit, and
    writes it after log lines; a loss that is not finite raises UserError before it is written.
    """
    check(config)
    # precision is the denoiser's own affair
    worker = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    batches = Batches(dataset, config, worker)
    denoiser.to(worker.device).train()
    ramp = Average(frozen_copy(denoiser), lambda done: min(config.ema, done / (done + 9)))
    averages = [ramp, *objective.averages]
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )
    before = _restore(state, denoiser, averages, optimizer)
    start, spent = (before.iteration, before.seconds) if before else (0, 0.0)
    if config.compile:
        denoiser.net.compile()
    student, prepared = worker.prepare(denoiser, optimizer)

    sums, counted = torch.zeros(2, device=worker.device), 0
    begun = logged = saved = time.monotonic()
    if before:
        yield before  # its line in the log may not have been written
    with _stop_requests() as stop:
        for i in range(start, config.iterations):
            done = i + 1
            rate = config.learning_rate * min(1.0, done / max(config.warmup, 1))
            rate *= ANNEAL[config.anneal](i / config.iterations)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = batches.draw(i)
            loss = objective(student, batch, i / config.iterations).mean()
            worker.backward(loss)
            norm = worker.clip_grad_norm_(denoiser.parameters(), config.clip)
            prepared.step()
            prepared.zero_grad(set_to_none=True)
            for average in averages:
                average.follow(denoiser, done)
            sums += torch.stack([loss.detach(), norm])
            counted += 1
            alone = worker.num_processes == 1  # else all must agree on where to stop
            if done % config.log_every and done < config.iterations and not (stop and alone):
                continue
            told = torch.cat([sums / counted, sums.new_tensor([len(stop)])])
            mean_loss, mean_norm, stopped = worker.reduce(told, "mean").tolist()
            now = time.monotonic()
            if not math.isfinite(mean_loss + mean_norm):
                raise UserError(
                    f"the loss or its gradient is not finite at iteration {done}: the state of "
                    f"the last good save is kept; try a lower --learning-rate than {config.learning_rate:g}"
                )
            seconds = spent + now - begun
            pace = counted * config.batch_size / (now - logged)
            line = Progress(done, config.iterations, mean_loss, mean_norm, rate, pace, seconds)
            due = stopped or done == config.iterations or now - saved >= config.save_every
            if worker.is_main_process and due:
                _save(state, denoiser, averages, optimizer, line)
                saved = now
            if stopped:
                message = (
                    f"stopped at iteration {done} of {config.iterations}; the same command resumes"
                )
                raise Interrupted(message, stop[0] if stop else signal.SIGTERM)
            sums.zero_()
            counted, logged = 0, now
            yield line
    denoiser.load_state_dict(ramp.denoiser.state_dict())
    denoiser.eval()


class Batches:
    """Batch i as a function of (seed, i): each process draws it whole and takes its share."""

    def __init__(self, dataset: Dataset, config: FitConfig, worker: Accelerator):
        if config.batch_size % worker.num_processes:
            raise UserError(
                f"the batch size {config.batch_size} does not divide among "
                f"{worker.num_processes} processes"
            )
        self.config, self.spec, self.device = config, dataset.spec, worker.device
        self.rank, self.world = worker.process_index, worker.num_processes
        self.generator = torch.Generator(worker.device)
        home = worker.device if _fits(dataset.train, worker.device) else torch.device("cpu")
        self.images = dataset.train.to(home)
        self.labels = None
        if dataset.spec.num_classes and dataset.train_labels is not None:
            self.labels = dataset.train_labels.to(home)

    def draw(self, i: int) -> Batch:
        size, device, share = (
            self.config.batch_size,
            self.device,
            slice(self.rank, None, self.world),
        )
        seed = (self.config.seed << 32) + i
        random = self.generator.manual_seed(seed)
        which = torch.randint(len(self.images), (size,), generator=random, device=device)[share]
        eps = torch.randn(size, *self.spec.shape, generator=random, device=device)[share]
        offset = torch.rand((), generator=random, device=device, dtype=torch.float64)
        level = (torch.arange(size, device=device, dtype=torch.float64)[share] + offset) / size
        level = level.clamp(max=1 - 2**-53)  # the last may round to 1
        mirrored = torch.rand(size, generator=random, device=device)[share] < 0.5
        which = which.to(self.images.device)
        x0 = self.spec.to_unit(self.images[which].to(device, non_blocking=True))
        if self.config.flip:
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        label = None
        if self.labels is not None:
            known = self.labels[which].to(device, non_blocking=True)
            dropped = torch.rand(size, generator=random, device=device)[share]
            label = known.where(dropped >= self.config.label_dropout, self.spec.num_classes)
        seed += self.rank << 24
        torch.manual_seed(seed)
        return Batch(x0, eps, level, label, seed)


def _fits(images: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 4


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second one is not waited for."""
    received: list[int] = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(path: Path, denoiser, averages, optimizer, line: Progress) -> None:
    tensors = {f"student.{k}": v for k, v in denoiser.state_dict().items()}
    for i, average in enumerate(averages):
        tensors |= {f"average{i}.{k}": v for k, v in average.denoiser.state_dict().items()}
    for i, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in slots.items()}
    save_tensors(path, tensors, {"line": json.dumps(line._asdict())})


def _restore(path: Path, denoiser, averages, optimizer) -> Progress | None:
    """The line of the log at which the state was saved; None where there is no state."""
    if not path.exists():
        return None
    tensors, metadata = load_tensors(path)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    denoiser.load_state_dict(part("student."))
    for i, average in enumerate(averages):
        average.denoiser.load_state_dict(part(f"average{i}."))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer.").items():
        i, key = name.split(".")
        slots.setdefault(int(i), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    return Progress(**json.loads(metadata["line"]))


def settings_of(config: FitConfig) -> dict:
    """The settings that decide the result, for a run to be recognised by when it resumes."""
    settings = asdict(config)
    for free in ("log_every", "save_every", "compile"):
        del settings[free]
    return settings
