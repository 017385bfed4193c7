"""How fast a training goes on this machine: a budget in minutes, and a word before a long one."""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from diffusion.config import FitConfig
from diffusion.console import say
from diffusion.data import Dataset
from diffusion.training import Method, Progress, fit

WARM = 2  # first iterations, in which kernels are prepared and code is compiled
LEAST = 3  # iterations that are timed
TRIAL = 5.0  # seconds of them, or a twentieth of the budget where that is less
SPARE = 0.03  # of the time: what saves, pictures and the end take
LONG = 3600.0  # seconds of training, beyond which a word is said first
T = TypeVar("T")


def in_minutes(method: Method, dataset: Dataset, config: FitConfig) -> FitConfig:
    """The config with as many iterations as config.minutes pay for here, and a warm-up that fits.

    Copies of the networks are trained for some seconds, so that the training itself is the same
    as that of a command that was given this number of iterations.
    """
    assert config.minutes
    begun, budget = time.monotonic(), config.minutes * 60
    enough = min(TRIAL, budget / 20)
    seconds = _seconds_per_iteration(deepcopy(method), dataset, config, enough)
    left = budget * (1 - SPARE) - (time.monotonic() - begun)
    iterations = max(1, int(left / seconds))
    pace = config.batch_size / seconds
    say(f"{config.minutes:g} minutes at {pace:,.0f} images/s: {iterations} iterations")
    return replace(config, iterations=iterations, warmup=min(config.warmup, iterations // 10))


def _seconds_per_iteration(
    method: Method, dataset: Dataset, config: FitConfig, enough: float
) -> float:
    """The time of an iteration, over at least `enough` seconds of them."""
    endless = replace(config, iterations=2**31, log_every=1, save_every=float("inf"))
    ends = []
    with TemporaryDirectory() as folder:
        lines = fit(method, dataset, endless, Path(folder) / "state")
        for _ in lines:
            ends.append(time.monotonic())
            timed = len(ends) - WARM
            if _agreed(timed >= LEAST and ends[-1] - ends[WARM - 1] >= enough):
                break
        lines.close()
    return _agreed((ends[-1] - ends[WARM - 1]) / (len(ends) - WARM))


def _agreed(value: T) -> T:
    """The first process's value, in every process: all must stop and go on together."""
    if PartialState().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def with_warning(
    lines: Iterator[Progress], config: FitConfig, advice: Callable[[], str] | None
) -> Iterator[Progress]:
    """Pass the lines on; at the first that tells the pace, say so if more than an hour is left.

    advice: what would be faster, as further words; it is asked for only where it is needed.
    """
    user_knows = bool(config.minutes)
    skipped = 1 if config.compile else 0  # the first line's pace is the compiler's
    for number, line in enumerate(lines):
        if not user_knows and number >= skipped and line.images_per_second:
            user_knows = True
            left = line.iterations - line.iteration
            seconds = left * config.batch_size / line.images_per_second
            if seconds > LONG:
                words = [f"at {line.images_per_second:,.0f} images/s this takes {hours(seconds)}"]
                words += ["--minutes 60 fits an hour", advice() if advice else ""]
                say("; ".join(filter(None, words)))
        yield line


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.0f} hours" if seconds >= 36_000 else f"{seconds / 3600:.1f} hours"


def passes_per_second(denoiser: nn.Module, shape: tuple[int, ...], batch_size: int = 16) -> float:
    """Images that a network takes forward and back in a second, by three passes after one."""
    parameter = next(denoiser.parameters())
    device = parameter.device
    x, t = torch.randn(batch_size, *shape, device=device), torch.ones(batch_size, device=device)

    def once() -> float:
        start = time.perf_counter()
        loss = denoiser(x, t.double()).square().mean()
        loss.backward()
        float(parameter.detach().sum())  # waits for a GPU
        return time.perf_counter() - start

    once()
    return batch_size / min(once() for _ in range(3))
