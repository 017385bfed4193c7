"""Measure one plan of one model: network calls, quality, wall-clock."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffusion.model import Model
from diffusion.runs import some_labels

Plan = tuple[str, Tensor]


def count_calls(model: Model, plan: Plan) -> int:
    """Network calls that one batch takes, counted."""
    calls = []
    handle = model.denoiser.net.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        model.sample(plan, 0, _indices(model, 0, 1), labels(model, 0, 1))
    finally:
        handle.remove()
    return len(calls)


def timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The result and its seconds, with the device idle before and after."""
    _synchronise(device)
    start = time.perf_counter()
    result = call()
    _synchronise(device)
    return result, time.perf_counter() - start


def repeat(call: Callable[[], Tensor], device: torch.device, budget: float = 3.0) -> list[float]:
    """Seconds of each of at least 3 repeats, and up to 30 while they fit the budget of seconds."""
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < 30 and sum(seconds) < budget):
        seconds.append(timed(call, device)[1])
    return seconds


def single_seconds(model: Model, plan: Plan) -> list[float]:
    """From noise to uint8 at batch 1; counting the calls has warmed it up."""
    index, label = _indices(model, 0, 1), labels(model, 0, 1)
    return repeat(lambda: model.sample(plan, 0, index, label), index.device)


def batches(
    model: Model, plan: Plan, seed: int, num_images: int, batch_size: int
) -> Iterator[tuple[Tensor, float]]:
    """Images 0 to num_images of the seed, uint8 on the device, and each batch's seconds."""
    for start in range(0, num_images, batch_size):
        end = min(start + batch_size, num_images)
        indices, label = _indices(model, start, end), labels(model, start, end)
        yield timed(lambda: model.sample(plan, seed, indices, label), indices.device)  # noqa: B023


def labels(model: Model, start: int, end: int) -> Tensor | None:
    """Every class in turn by image number, for a conditional model."""
    every = some_labels(model, end)
    return None if every is None else every[start:]


def _indices(model: Model, start: int, end: int) -> Tensor:
    return torch.arange(start, end, device=model.device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
