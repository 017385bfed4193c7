"""What a sampler costs over its bare network calls: `python -m benchmarks.overhead CHECKPOINT`.

Both are run in turn, many times, so that a drifting machine favours neither.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import tyro

from benchmarks.rounds import relative, rounds
from diffusion.console import at_least, out, run
from diffusion.model import load


@dataclass(frozen=True)
class Options:
    """Say how much longer a sampler takes than its bare network calls."""

    checkpoint: tyro.conf.Positional[Path] = Path("runs/digits/teacher")
    """A teacher's run or checkpoint."""
    steps: tuple[int, ...] = (1, 4, 16)
    """Network calls for each image, one comparison a number."""
    batch_size: int = 256
    """Images of a network call."""
    repeats: int = 30
    """How often each side is timed."""


@torch.no_grad()
def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.overhead")
    at_least(1, options, "steps", "batch_size", "repeats")
    model = load(options.checkpoint, "bf16")
    device = model.device
    indices = torch.arange(options.batch_size, device=device)
    x = torch.randn(options.batch_size, *model.spec.shape, device=device)
    t = torch.rand(options.batch_size, device=device)
    net, precision = model.denoiser.net, torch.bfloat16

    def bare(steps: int) -> None:
        with torch.autocast(device.type, precision):
            for _ in range(steps):
                net(x, t, None)

    for steps in options.steps:
        for sampler in ("ddim", "dpm-solver++", "ancestral"):
            plan = model.plan(steps, sampler)
            calls = {"network": partial(bare, steps)}
            calls["sampler"] = partial(model.sample, plan, 0, indices)
            took = rounds(calls, options.repeats, device)
            out.print(
                f"{sampler:13} {steps:3} steps  network {1000 * median(took['network']):8.2f} ms  "
                f"sampler / network {relative(took['sampler'], took['network']):.3f}"
            )


if __name__ == "__main__":
    run(main)
