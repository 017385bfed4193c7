"""What this machine is good at, asked of it once: device, precision, layout, compiler, workers.

How its threads wait is set in `diffusion/__init__.py`, before torch is loaded.
"""

import hashlib
import math
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from diffusion.console import UserError, say
from diffusion.files import Damaged, Unwritable, read_json, write_json


def _cache() -> Path:
    """Where the environment says, or in the home; a user without one has a place of temporaries."""
    if place := os.environ.get("FEWSTEP_CACHE"):
        return Path(place)
    try:
        return Path.home() / ".cache" / "fewstep"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"fewstep-{os.getuid()}"


CACHE = _cache()
WORTH_IT = 0.8  # bf16 must take at most this share of fp32's time to be chosen
PATIENCE = 3.0  # times fp32's time, beyond which one pass in bf16 says enough


def this_device() -> torch.device:
    """This process's GPU where there is CUDA, else the CPU: angles are float64, which MPS lacks."""
    end_with_launcher()
    device = PartialState(cpu=not torch.cuda.is_available()).device
    assert device
    return device


@cache
def end_with_launcher(seconds: float = 10.0) -> None:
    """A process of several is asked to stop once its launcher is gone, and killed if it does not.

    A killed launcher asks nobody to stop: its processes would train on beside those of a restart.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    launcher, pid = os.getppid(), os.getpid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(pid, signal.SIGTERM)  # a training saves, where the others still answer
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def layout() -> torch.memory_format:
    """The fast order of images in memory: channels last on GPUs with tensor cores.

    On CPUs group norm makes it the slow one (1.3 times at 8x8).
    """
    return torch.channels_last if torch.cuda.is_available() else torch.contiguous_format


def workers() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> float:
    """Bytes of memory that may be asked for: this machine's, this container's, and no more than
    the environment's FEWSTEP_MEMORY, such as 2GB."""
    free = [_allowed()]
    with suppress(OSError, ValueError, LookupError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    with suppress(OSError, ValueError):
        most, used = (
            int((Path("/sys/fs/cgroup") / f"memory.{name}").read_text())
            for name in ("max", "current")
        )
        free.append(most - used)
    return min(free)


def _allowed() -> float:
    """What FEWSTEP_MEMORY says. UserError where that is no number of bytes."""
    text = os.environ.get("FEWSTEP_MEMORY", "inf")
    number = text.upper().removesuffix("B")
    unit = next((unit for unit in "kMGT" if number.endswith(unit.upper())), "")
    try:
        size = float(number.removesuffix(unit.upper())) * 1000 ** " kMGT".index(unit or " ")
    except ValueError:
        size = math.nan
    if not size > 0:
        raise UserError(
            f"FEWSTEP_MEMORY must be a number of bytes such as 500MB or 8GB, got {text!r}"
        )
    return size


def require_memory(flag: str, value: int, size: float) -> None:
    """UserError where so many bytes, which an option's value takes at least, are not free."""
    if size > (free := free_memory()):
        raise UserError(
            f"{flag} {value} would take {in_bytes(size)} of memory, and {in_bytes(free)} are free: "
            f"give a lower {flag}"
        )


def in_bytes(size: float) -> str:
    """Such as 3.2 GB."""
    power = next((power for power in range(6) if abs(size) < 1000 ** (power + 1)), 6)
    return f"{size / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}B"


def compiler() -> str | None:
    """Why torch.compile cannot work here; None where it can."""
    if torch.cuda.is_available():
        if not find_spec("triton"):
            return "it needs triton on a GPU, and there is none"
        # triton builds what launches its kernels by a C compiler, and fails without in step one
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        if any(map(shutil.which, names)):
            return None
        return f"it needs a C compiler on a GPU, and {' or '.join(names)} was not found"
    name = os.environ.get("CXX", "g++")  # as torch.compile has it
    if shutil.which(name):
        return None
    return f"it needs a C++ compiler on a CPU, and {name} was not found"


def precision(asked: str = "auto") -> str:
    """The network's precision: "fp32" or "bf16" as asked, or for "auto" the faster one here.

    Whoever asks for bf16 where it is the slower one gets it, and a line that says what it costs.
    Every process of several takes the first one's.
    """
    this_device()  # before anything asks PartialState
    if asked == "auto" or (asked == "bf16" and not torch.cuda.is_available()):
        share = bf16_share()
        if asked == "auto":
            return "bf16" if share <= WORTH_IT else "fp32"
        _say_once(share)
    return asked


@cache
def _say_once(share: float) -> None:
    if share > 1:
        say(
            f"bf16 takes {share:.1f} times as long as fp32 on this processor: --precision auto "
            "takes the faster one"
        )


@cache
def bf16_share() -> float:
    """The time of a training step in bf16, as a share of its time in fp32.

    Processors' names and features mislead: AVX512 without bf16 claims support and takes 10 times
    as long, AVX512-BF16 without AMX gains less than the casts cost. So a CPU is measured once, in
    0.15 s with bf16 units or without, and the result is kept in the cache.
    """
    this_device()
    if torch.cuda.is_available():
        return 0.5 if torch.cuda.is_bf16_supported(including_emulation=False) else 2.0
    path = CACHE / "machine" / f"{_identity()}.json"
    try:
        share = float(read_json(path)["bf16_share"])
    except (OSError, Damaged, ValueError, KeyError, TypeError):
        share = _measured_share()
        with suppress(Unwritable):  # a cache that cannot be written is no reason to stop
            write_json(path, {"processor": processor(), "bf16_share": share})
    if PartialState().num_processes > 1:
        share = broadcast_object_list([share])[0]
    return share


def _identity() -> str:
    """The processor as torch sees it: its name, its instructions, torch's version and threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    parts = (processor(), capability, limit, torch.__version__, str(torch.get_num_threads()))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def processor() -> str:
    """The processor's name, as the system tells it."""
    return next(iter(cpuinfo("model name")), platform.processor() or platform.machine())


def cpuinfo(name: str) -> list[str]:
    """That field of every core; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(name)]


def _measured_share(channels: int = 32, size: int = 8, batch: int = 64, repeats: int = 5) -> float:
    """The ratio of the least times of a small residual block's passes forward and back."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        norm, x = nn.GroupNorm(4, channels), torch.randn(batch, channels, size, size)

    def seconds(bf16: bool) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = second(F.silu(norm(first(x))))
        y.float().square().mean().backward()
        return time.perf_counter() - start

    seconds(False)  # oneDNN prepares its kernels in the first call
    single = min(seconds(False) for _ in range(repeats))
    half = seconds(True)
    if half > PATIENCE * single:
        half = seconds(True)
    if half <= PATIENCE * single:
        for _ in range(repeats):
            single, half = min(single, seconds(False)), min(half, seconds(True))
    return half / single
