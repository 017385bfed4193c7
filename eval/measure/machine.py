"""The machine: what a time depends on, and what it was like when the time was taken."""

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import mean

import torch
from accelerate import PartialState

from diffusion.machine import cpuinfo, processor
from eval.results.records import Conditions, Environment

SM_CLOCK, MEMORY_CLOCK, CORE_TEMPERATURE = 1, 2, 0  # NVML's numbers of them


def environment(device: torch.device, precision: str, compiled: bool) -> Environment:
    """What may move a time or an image; the same whenever it is asked for. JSON's types alone."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "type": device.type,
        "precision": precision,
        "compile": compiled,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "torchvision": version("torchvision"),
        "accelerate": version("accelerate"),
        "numpy": version("numpy"),
    }


def conditions(device: torch.device) -> Conditions:
    """When, by how many processes at once, and at which clocks, heat and power; null if unknown."""
    milliwatts = nvml(device, "PowerUsage")
    clock = nvml(device, "ClockInfo", SM_CLOCK) if device.type == "cuda" else _processor_mhz()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": PartialState().num_processes,
        "clock_mhz": clock,
        "memory_clock_mhz": nvml(device, "ClockInfo", MEMORY_CLOCK),
        "celsius": nvml(device, "Temperature", CORE_TEMPERATURE),
        "watts": None if milliwatts is None else milliwatts / 1000,
    }


@contextmanager
def full_float32() -> Generator[None]:
    """float32 in convolutions, too, wherever they run.

    On GPUs torch lets cuDNN round their inputs to TF32's 10 bits of mantissa unless told, though
    not those of products of matrices. That is good enough to train and to sample with, but what
    measures them would differ from a CPU's figures in the third digit.
    """
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def nvml(device: torch.device, name: str, *arguments: int) -> int | None:
    """What NVML's nvmlDeviceGet<name> says of the GPU; None where it cannot, and of a CPU.

    Found by its UUID alone: CUDA's index is not NVML's, and another device's figure is worse than
    none. A slice of a GPU (MIG) has none.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return getattr(pynvml, f"nvmlDeviceGet{name}")(handle, *arguments)
    except (pynvml.NVMLError, AttributeError):  # an older pynvml or torch lacks the name
        return None


def _processor_mhz() -> int | None:
    """The mean of all cores now."""
    clocks = [float(mhz) for mhz in cpuinfo("cpu MHz")]
    return round(mean(clocks)) if clocks else None
