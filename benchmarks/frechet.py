"""Our Fréchet distance beside clean-fid's: `python -m benchmarks.frechet`.

Both take the same means and covariances, of features of real images. They run in turn, the order
alternating, so that a drifting machine favours neither.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
import tyro
from cleanfid import fid
from scipy import linalg

from diffusion import data
from diffusion.console import at_least, out, run
from eval.measure.metrics import Moments, frechet_distance

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Compare our Fréchet distance with clean-fid's: how far apart the two are, and the time of
    each."""

    dims: tuple[int, ...] = (64, 512, 2048)
    """Dimensions of the features, random functions of noisy digits."""
    repeats: int = 3
    """How often each is timed."""
    singular: bool = False
    """Take fewer images than dimensions on one side, so that its covariance is singular."""


def features(count: int, dim: int, noise: float) -> torch.Tensor:
    """Features of digits drawn anew, with noise of that many grey levels."""
    random = torch.Generator().manual_seed(0)
    directions = 0.1 * torch.randn(64, dim, generator=random)
    phases = 2 * torch.pi * torch.rand(dim, generator=random)
    images = data.load("digits").train
    images = images[torch.randint(len(images), (count,), generator=random)].float()
    images += noise * torch.randn(images.shape, generator=random)
    return torch.cos((images.round().clamp(0, 255).flatten(1) / 127.5 - 1) @ directions + phases)


def timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def clean_fids(a: Moments, b: Moments) -> float:
    gaussians = [part.numpy() for m in (a, b) for part in (m.mean, m.covariance)]
    return fid.frechet_distance(*gaussians)


def compare(a: Moments, reference: Moments, repeats: int) -> str:
    fresh = reference
    calls = {
        "clean-fid": lambda: clean_fids(a, fresh),
        "first": lambda: frechet_distance(a, fresh),
        "again": lambda: frechet_distance(a, fresh),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, float] = {}
    for i in range(repeats):
        fresh = Moments.from_tensors(reference.tensors())  # its root is not known yet
        for name in ("first", "again", "clean-fid") if i % 2 else calls:
            took, found[name] = timed(calls[name])
            seconds[name].append(took)
    theirs, first, again = (median(times) for times in seconds.values())
    return (
        f"distance {found['first']:8.4f}  "
        f"relative difference {found['first'] / found['clean-fid'] - 1:8.1e}  "
        f"clean-fid {theirs:8.4f} s  ours {first:7.4f} s ({theirs / first:.1f}x faster)  "
        f"to the same reference again {again:7.4f} s ({theirs / again:.1f}x)"
    )


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.frechet")
    at_least(1, options, "dims", "repeats")
    sqrtm = linalg.sqrtm
    # clean-fid 0.1.35 asks for a second result by an argument that SciPy 1.18 does not take
    fid.linalg.sqrtm = lambda x, disp=True: sqrtm(x) if disp else (sqrtm(x), 0)
    warnings.filterwarnings("ignore", "Matrix is singular")
    for dim in options.dims:
        a = Moments.of(features(dim // 2 if options.singular else 2 * dim, dim, 40))
        reference = Moments.of(features(2 * dim, dim, 30))
        out.print(f"D {dim:4}  {compare(a, reference, options.repeats)}")


if __name__ == "__main__":
    run(main)
