"""Seconds and memory of one call: its first run apart, then synchronised repeats."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from diffusion.console import out_of_memory
from eval.results.records import FOR_P90, Timing

MOST = 50  # repeats
SHARP = 0.01  # of the median: the half-width of its notch at which repeats may stop
LONG = 1.0  # seconds; a call beyond them is repeated twice, not three times
IN_PASSING = 3.0  # seconds; a batch beyond them is timed while its images are made, and not again
OUT_OF_MEMORY = "out of memory"
T = TypeVar("T")


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result and its seconds, with the device idle before and after."""
    _synchronise(device)
    start = time.perf_counter()
    result = call()
    _synchronise(device)
    return result, time.perf_counter() - start


def begin(call: Callable[[], Tensor], batch_size: int, device: torch.device) -> Timing:
    """Its first run, and a second that warms it up and shows the peak of its memory.

    A first run may be long for being compiled or for being itself. A long second run that takes no
    less than half of it is the latter and already warm, so it is kept as a repeat.
    """
    _fresh(device)
    first = _attempt(call, device)
    held = _fresh(device)  # what compilation and the search for kernels took is given back
    second = None if first is None else _attempt(call, device)
    if first is None or second is None:
        return Timing(batch_size, failed=OUT_OF_MEMORY)
    warm = second > max(LONG, first / 2)
    timing = Timing(batch_size, first, (second,) if warm else ())
    return _with_peaks(timing, held, device)


def again(call: Callable[[], Tensor], timing: Timing, device: torch.device) -> Timing:
    """With one more repeat."""
    took = _attempt(call, device)
    if took is None:
        return Timing(timing.batch_size, failed=OUT_OF_MEMORY)
    return replace(timing, seconds=(*timing.seconds, took))


def settled(timing: Timing, budget: float) -> bool:
    """Whether it has been repeated enough: until its median is known, or its budget used up.

    Known is a median whose notch, median +- 1.57 IQR / sqrt(n), reaches no further than 1 %, from
    as many repeats as a 90th percentile needs: notches that do not overlap tell two medians apart
    at about the 95 % level (McGill, Tukey & Larsen 1978), so calls that differ by 2 % are.
    Never fewer than 3 repeats, or 2 of more than 1 s; never more than 50.
    """
    count = len(timing.seconds)
    if timing.failed or count >= MOST:
        return True
    if count < 2 or (count < 3 and timing.median <= LONG):
        return False
    low, high = timing.iqr
    sharp = 1.57 * (high - low) / count**0.5 <= SHARP * timing.median
    return sum(timing.seconds) >= budget or (count >= FOR_P90 and sharp)


@dataclass
class InPassing:
    """Times a row's whole batches while its images are made, so that no long call is made again.

    It stops looking once a warm batch shows that they are short: those are timed in a race.
    """

    batch_size: int
    device: torch.device
    compiled: bool
    timing: Timing | None = None
    """The first batch apart, then each that was timed."""

    def __call__(self, call: Callable[[], Tensor], size: int) -> Tensor:
        """The result of a call that makes so many images."""
        short = self.timing and self.timing.seconds and self.timing.median <= IN_PASSING
        if size != self.batch_size or short:
            return call()
        held = _fresh(self.device)
        result, took = timed(call, self.device)
        if self.timing is None:
            self.timing = Timing(size, first=took)
            return result
        timing = replace(self.timing, seconds=(*self.timing.seconds, took))
        self.timing = _with_peaks(timing, held, self.device)
        return result

    @property
    def result(self) -> Timing | None:
        """The timing of a row of long batches; of others the first batch's alone, for a race.

        Of one batch alone its only run is the repeat, unless compilation is in it.
        """
        timing = self.timing
        if timing is None:
            return None
        if not timing.seconds and not self.compiled:
            timing = replace(timing, seconds=(timing.first,))
        long = timing.seconds and timing.median > IN_PASSING
        return timing if long else Timing(timing.batch_size, first=timing.first)


def _attempt(call: Callable[[], Tensor], device: torch.device) -> float | None:
    """Its seconds; None where it ran out of memory."""
    try:
        return timed(call, device)[1]
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    _fresh(device)  # only here, where no traceback holds the call's tensors any more
    return None


def _fresh(device: torch.device) -> int | None:
    """Empty the allocator's cache and its peaks: the bytes still held; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _with_peaks(timing: Timing, held: int | None, device: torch.device) -> Timing:
    """With the peaks of memory since `_fresh` gave what was held; as it is on a CPU."""
    if held is None:
        return timing
    allocated = torch.cuda.max_memory_allocated(device) - held
    return replace(timing, allocated=allocated, reserved=torch.cuda.max_memory_reserved(device))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
