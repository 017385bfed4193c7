"""What evaluating images costs over making them and running the extractor alone.

`python -m benchmarks.evaluation CHECKPOINT`. Both are run in turn, many times, so that a drifting
machine favours neither.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import tyro

from benchmarks.rounds import relative, rounds
from diffusion import data
from diffusion.console import at_least, out, run
from diffusion.model import load
from eval.measure.features import extractor
from eval.measure.quality import Judge, Seen
from eval.measure.stream import indices, look


@dataclass(frozen=True)
class Options:
    """Say how much longer evaluating images takes than making them and running the extractor
    alone."""

    checkpoint: tyro.conf.Positional[Path] = Path("runs/digits/teacher")
    """A teacher's run or checkpoint."""
    steps: tuple[int, ...] = (1, 4)
    """Network calls for each image, one comparison a number."""
    num_images: int = 10_000
    """Images that are made and evaluated each time."""
    batch_size: int = 256
    """Images of a network call."""
    features: str = "classifier"
    """The extractor, as in eval.compare."""
    repeats: int = 5
    """How often each side is timed."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.evaluation")
    at_least(1, options, "steps", "num_images", "batch_size", "repeats")
    model = load(options.checkpoint, "bf16")
    device, spec = model.device, model.spec
    dataset = data.reload(spec)
    own = extractor(options.features, dataset, device)
    judge = Judge.of(dataset, own, extractor("random", dataset, device), device)
    part = Path(tempfile.mkdtemp()) / "part"
    starts = range(0, options.num_images, options.batch_size)

    def bare(plan) -> None:
        for start in starts:
            end = min(start + options.batch_size, options.num_images)
            own.extract(model.sample(plan, 0, *indices(model, start, end)))

    def distance(plan) -> Seen:
        *_, (_, seen) = look(judge, model, plan, 0, options.num_images, options.batch_size, part)
        judge.distance(seen)
        return seen

    def everything(plan) -> None:
        judge.others(distance(plan))

    for steps in options.steps:
        plan = model.plan(steps)
        calls = {call: partial(call, plan) for call in (bare, distance, everything)}
        took = rounds(calls, options.repeats, device)
        out.print(
            f"{steps:3} calls  generate + extract {1000 * median(took[bare]):8.1f} ms  "
            f"+ distance {relative(took[distance], took[bare]):.3f}  "
            f"+ every figure {relative(took[everything], took[bare]):.3f}"
        )


if __name__ == "__main__":
    run(main)
