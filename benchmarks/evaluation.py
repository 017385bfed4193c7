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

from diffusion import data
from diffusion.console import at_least, out, run
from diffusion.model import load
from eval.features import extractor
from eval.quality import Judge, Seen
from eval.stream import indices, look
from eval.timing import timed


@dataclass(frozen=True)
class Options:
    """Interleave N images through the evaluation with N images through the bare extractor."""

    checkpoint: tyro.conf.Positional[Path] = Path("runs/digits/teacher")
    """A teacher's run or checkpoint."""
    steps: tuple[int, ...] = (1, 4)
    """Network calls of each comparison."""
    num_images: int = 10_000
    batch_size: int = 256
    features: str = "classifier"
    """As in eval.compare."""
    repeats: int = 5


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.evaluation")
    at_least(1, options, "steps", "num_images", "batch_size", "repeats")
    model = load(options.checkpoint, "bf16")
    device, spec = model.device, model.spec
    dataset = data.load(spec.name, None, spec.size, spec.channels)
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
        calls = [bare, distance, everything]
        seconds: dict = {call: [] for call in calls}
        for i in range(options.repeats + 1):
            took = {
                call: timed(partial(call, plan), device)[1]
                for call in (calls if i % 2 else calls[::-1])
            }
            for call in calls if i else ():  # the first round warms up
                seconds[call].append(took[call])
        ratios = [median(a / b for a, b in zip(seconds[call], seconds[bare])) for call in calls[1:]]
        out.print(
            f"{steps:3} calls  generate + extract {1000 * median(seconds[bare]):8.1f} ms  "
            f"+ distance {ratios[0]:.3f}  + every figure {ratios[1]:.3f}"
        )


if __name__ == "__main__":
    run(main)
