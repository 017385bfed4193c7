"""THE training loop. Objectives differ; everything else is here, once."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from diffusion.batches import Batch, Batches
from diffusion.checkpoint import load_tensors, save_tensors
from diffusion.config import FitConfig, check, learning_rate
from diffusion.console import Interrupted, UserError
from diffusion.data import Dataset
from diffusion.denoiser import Denoiser


class Follower(Protocol):
    """What moves on after each step, and is saved and resumed with the student."""

    module: nn.Module
    """Its state: parameters and buffers."""

    def follow(self, student: nn.Module, done: int, progress: float) -> None:
        """Move on after optimizer step number `done`, which began at this share of the training.

        Called in every process, whose states stay the same.
        """


@dataclass(frozen=True)
class Average:
    """A denoiser that follows the student: w <- decay w + (1 - decay) student, after each step."""

    module: nn.Module
    decay: Callable[[int, float], float]
    """(optimizer steps done, share of the training at the last one's start) -> decay."""
    fused: bool = True
    """A few kernels for all parameters, not one for each."""

    @torch.no_grad()
    def follow(self, student: nn.Module, done: int, progress: float = 0.0) -> None:
        kept, new = list(self.module.parameters()), list(student.parameters())
        share = 1 - self.decay(done, progress)
        if self.fused:
            torch._foreach_lerp_(kept, new, share)
            return
        for old, value in zip(kept, new, strict=True):
            old.lerp_(value, share)


class Objective(Protocol):
    averages: Sequence[Follower]
    """Averages, of the student or of its losses, that the objective reads."""

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


EARLY = 5.0  # seconds to the first line at the latest, or to the end of the step


def frozen_copy(denoiser: nn.Module) -> nn.Module:
    return deepcopy(denoiser).eval().requires_grad_(False)


def fit(
    denoiser: nn.Module,
    objective: Objective,
    dataset: Dataset,
    config: FitConfig,
    state: Path,
    fused: bool = True,
    preview: Callable[[nn.Module], None] | None = None,
) -> Iterator[Progress]:
    """Train the denoiser in place; it ends with its averaged weights.

    Resumes from the file `state` where there is one, to the same result bit for bit, and
    writes it after log lines; a loss that is not finite raises UserError before it is written.
    fused: of the optimizer and the average; what that saves, benchmarks.speed measures.
    preview: is shown the averaged denoiser early and after each save, in the first process.
    """
    check(config)
    worker = make_worker()
    batches = Batches(dataset, config, worker, denoiser.guidance)
    denoiser.to(worker.device).train()
    ramp = Average(frozen_copy(denoiser), lambda done, _: min(config.ema, done / (done + 9)), fused)
    averages = [ramp, *objective.averages]
    settings = {"betas": (0.9, 0.99), "weight_decay": config.weight_decay}
    settings |= {"fused": fused, "foreach": False}  # neither is one parameter after the other
    optimizer = torch.optim.AdamW(denoiser.parameters(), config.learning_rate, **settings)
    before = _restore(state, denoiser, averages, optimizer)
    start, spent = (before.iteration, before.seconds) if before else (0, 0.0)
    if config.compile:  # what is never called is never compiled
        for module in (denoiser, *(average.module for average in averages)):
            if isinstance(module, Denoiser):
                module.net.compile()
    student, prepared = worker.prepare(denoiser, optimizer)

    sums, counted = torch.zeros(2, device=worker.device), 0
    begun = logged = saved = time.monotonic()
    lines = 0
    if before:
        yield before  # its line in the log may not have been written
    with _stop_requests() as stop:
        for i in range(start, config.iterations):
            done = i + 1
            rate = learning_rate(config, i)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = batches.draw(i)
            loss = objective(student, batch, i / config.iterations).mean()
            worker.backward(loss)
            norm = worker.clip_grad_norm_(denoiser.parameters(), config.clip)
            prepared.step()
            prepared.zero_grad(set_to_none=True)
            for average in averages:
                average.follow(denoiser, done, i / config.iterations)
            sums += torch.stack([loss.detach(), norm])
            counted += 1
            alone = worker.num_processes == 1  # else all must agree on where to stop
            due = done % config.log_every == 0 or done == config.iterations
            if alone and not (due or lines):  # the first line comes early: it tells the pace
                due = time.monotonic() - begun > EARLY
            if not due and not (stop and alone):
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
            save = stopped or done == config.iterations or now - saved >= config.save_every
            if worker.is_main_process and save:
                _save(state, denoiser, averages, optimizer, line)
                saved = now
            if preview and worker.is_main_process and (save or not lines) and not stopped:
                preview(ramp.module)
            lines += 1
            if stopped:
                where = f"stopped at iteration {done} of {config.iterations}"
                number = stop[0] if stop else signal.SIGTERM
                raise Interrupted(f"{where}; the same command resumes", number)
            sums.zero_()
            counted, logged = 0, now
            yield line
    denoiser.load_state_dict(ramp.module.state_dict())
    denoiser.eval()


def make_worker() -> Accelerator:
    """The processes of this training, whatever accelerate's variables in the environment say of it.

    Precision is the denoiser's own affair and compiling --compile's; a plugin alone keeps
    ACCELERATE_GRADIENT_ACCUMULATION_STEPS from dividing the gradients.
    """
    return Accelerator(
        mixed_precision="no",
        cpu=not torch.cuda.is_available(),
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


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
        tensors |= {f"average{i}.{k}": v for k, v in average.module.state_dict().items()}
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
        average.module.load_state_dict(part(f"average{i}."))
    slots: dict[int, dict[str, Tensor]] = {}
    parameters = list(denoiser.parameters())
    for name, value in part("optimizer.").items():
        i, key = name.split(".")
        like = parameters[int(i)]
        if value.shape == like.shape:  # a moment: its order in memory must be its parameter's
            value = torch.empty_like(like).copy_(value)
        slots.setdefault(int(i), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    return Progress(**json.loads(metadata["line"]))
