"""What checksums and locks cost: `python -m benchmarks.files`.

A save and a load of a state of --mb, with its checksum and without, taken in turn; and the share
that checksums and locks have of a comparison of --num-images by a network that is fast, whose share
is the largest.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import tyro

from diffusion import files, owner
from diffusion.console import run, say
from eval import compare
from teachers import ddpm


@dataclass(frozen=True)
class Options:
    """Time a save and a load of a state, with a checksum and without; a lock; a comparison."""

    mb: int = 256
    """The state's size."""
    repeats: int = 5
    """Of each; the median counts."""
    num_images: int = 10_000
    """Images of the comparison."""


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def take(folder: Path) -> None:
    with owner.owned(folder):
        pass


def measure(options: Options, folder: Path) -> dict[str, float]:
    """Seconds of each, by name."""
    tensors = {f"weight.{i}": torch.randn(512, 512) for i in range(options.mb)}
    sealed, bare = folder / "sealed", folder / "bare"

    def resume(path: Path) -> None:  # loading only maps the file: a resumed network copies it
        for name, tensor in files.load_tensors(path)[0].items():
            tensors[name].copy_(tensor)

    calls = {
        "checksum": lambda: files._tensors_checksum(tensors, {}, "xxh3"),
        "crc32": lambda: files._tensors_checksum(tensors, {}, "crc32"),
        "save with it": lambda: files.save_tensors(sealed, tensors, {}),
        "save without": lambda: files.save_tensors(bare, tensors, {"sha256": ""}),
        "load with it": lambda: resume(sealed),
        "load without": lambda: resume(bare),
        "lock": lambda: take(folder / "run"),
    }
    times = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: median(values) for name, values in times.items()}


def share(main: Callable[[], None], words: str) -> tuple[float, float]:
    """Seconds of a whole command, and those of its checksums and locks, none counted twice."""
    parts, busy = [], False

    def counted(call: Callable, *arguments: object, **settings: object) -> object:
        nonlocal busy
        if busy:  # a checksum of a checksum
            return call(*arguments, **settings)
        busy, begun = True, time.perf_counter()
        try:
            return call(*arguments, **settings)
        finally:
            busy = False
            parts.append(time.perf_counter() - begun)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("sys.argv", ["command", *words.split()]))
        for module, name in ((files, "_tensors_checksum"), (files, "_json_checksum"),
                             (owner, "_take"), (owner, "_give_back")):  # fmt: skip
            each = partial(counted, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, each))
        whole = seconds(main)
    return whole, sum(parts)


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.files")
    with TemporaryDirectory() as folder:
        for name, value in measure(options, Path(folder)).items():
            say(f"{name:14} {value:8.4f} s  for {options.mb} MB")
        net = "--width 8 --blocks 1 --multipliers 1 --iterations 3 --warmup 0 --precision fp32"
        with mock.patch("sys.argv", ["command", *net.split(), "--out", f"{folder}/teacher"]):
            ddpm.main()
        words = f"{folder}/teacher --out {folder}/compare --steps 1 --solvers ddim --no-long"
        words += f" --no-times --features random --num-images {options.num_images} --seeds 0"
        whole, part = share(compare.main, f"{words} --likelihood 0")
    say(f"comparison     {whole:8.4f} s  of {options.num_images} images, {part / whole:.2%} of it")


if __name__ == "__main__":
    run(main)
