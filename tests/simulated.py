"""A machine whose clock, drift and memory are known."""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from eval.measure import timing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
IMAGE = torch.zeros(1, dtype=torch.uint8)


class Machine:
    """Seconds pass only in calls and in sleep. drift: how much slower it is per second passed."""

    def __init__(self, drift: float = 0.0):
        self.now, self.drift, self.runs = 0.0, drift, []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call(self, name: str, *costs: float) -> Callable[[], torch.Tensor]:
        """A call of that name that takes the costs one after the other, the last for ever."""
        left = list(costs)

        def run() -> torch.Tensor:
            self.runs.append(name)
            cost = left.pop(0) if len(left) > 1 else left[0]
            self.now += cost * (1 + self.drift * self.now)
            return IMAGE

        return run


def simulate_clock(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The clock of all timing from now on."""
    monkeypatch.setattr(timing, "time", machine := Machine())
    return machine


def simulate_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU in name: its memory in bytes, and an NVML that knows its clocks alone."""
    state = SimpleNamespace(held=0, peak=0, cached=0, uuid="12-34")

    def fresh() -> None:
        state.cached = state.held

    def reset(device) -> None:
        state.peak = state.held

    for name, value in {
        "synchronize": lambda device: None,
        "empty_cache": fresh,
        "reset_peak_memory_stats": reset,
        "memory_allocated": lambda device: state.held,
        "max_memory_allocated": lambda device: state.peak,
        "max_memory_reserved": lambda device: state.cached,
        "get_device_properties": lambda device: SimpleNamespace(uuid="12-34"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    class NVMLError(Exception):
        pass

    def by_uuid(uuid: str) -> str:
        if uuid != f"GPU-{state.uuid}":
            raise NVMLError("not found")
        return "handle"

    def clock_info(handle: str, which: int) -> int:
        return {1: 1980, 2: 2619}[which]

    pynvml = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None)
    pynvml.nvmlDeviceGetHandleByUUID, pynvml.nvmlDeviceGetClockInfo = by_uuid, clock_info
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    return state


def fails(error: Exception) -> torch.Tensor:
    raise error
