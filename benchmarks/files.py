"""What checksums and locks cost: `python -m benchmarks.files`.

A save and a load of a state of --mb, with its checksum and without, taken in turn.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import torch
import tyro

from diffusion import files, owner
from diffusion.console import run, say


@dataclass(frozen=True)
class Options:
    """Time a save and a load of a state, with a checksum and without, and a lock."""

    mb: int = 256
    """The state's size."""
    repeats: int = 5
    """Of each; the median counts."""


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def take(folder: Path) -> None:
    with owner.owned(folder):
        pass


def measure(options: Options) -> dict[str, float]:
    """Seconds of each, by name."""
    tensors = {f"weight.{i}": torch.randn(512, 512) for i in range(options.mb)}
    folder = Path(mkdtemp())
    sealed, bare = folder / "sealed", folder / "bare"

    def read(path: Path) -> float:  # loading maps the file, so it is read to the end
        return sum(float(tensor.sum()) for tensor in files.load_tensors(path)[0].values())

    calls = {
        "checksum": lambda: files._tensors_checksum(tensors, {}, "xxh3"),
        "crc32": lambda: files._tensors_checksum(tensors, {}, "crc32"),
        "save with it": lambda: files.save_tensors(sealed, tensors, {}),
        "save without": lambda: files.save_tensors(bare, tensors, {"sha256": ""}),
        "load with it": lambda: read(sealed),
        "load without": lambda: read(bare),
        "lock": lambda: take(folder / "run"),
    }
    try:
        times = {name: [] for name in calls}
        for _ in range(options.repeats):
            for name, call in calls.items():
                times[name].append(seconds(call))
    finally:
        shutil.rmtree(folder)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.files")
    for name, value in measure(options).items():
        say(f"{name:14} {value:8.4f} s  for {options.mb} MB")


if __name__ == "__main__":
    run(main)
