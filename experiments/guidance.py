"""Quality and class agreement against the guidance weight: `python -m experiments.guidance`.

A conditional teacher of digits, the student that takes its guidance weight as an input, and that
student halved to 4 steps: trained where they are not there yet (minutes on two CPU cores), then
sampled from the same noise at each weight. Writes guidance.json and guidance.png.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import matplotlib
import torch
import tyro
from torch import Tensor

from diffusion import data
from diffusion.console import at_least, run, say
from diffusion.files import atomic_path, write_atomic
from diffusion.model import Model
from diffusion.plan import Plan
from distill import guidance, progressive
from eval.measure.features import extractor
from eval.measure.judge import reference
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.nfe import count_calls
from eval.measure.real import Real
from teachers import ddpm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcdefaults()  # whatever a user's own file asks for

T = TypeVar("T", bound=ddpm.TrainingOptions)


@dataclass(frozen=True)
class Options:
    """Train a teacher of digits and guided students of it, and measure them at each guidance
    weight."""

    out: Path = Path("runs/digits-classes")
    """The folder for the runs and the results."""
    weights: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """Guidance weights to measure at, from 1 to 4."""
    num_images: int = 2000
    """Images for each figure."""
    share: float = 1.0
    """Share of the presets' iterations to train: less than 1 for a quicker look."""


@dataclass(frozen=True)
class Figure:
    model: str
    guidance: float | None
    nfe: int
    """Network calls per image, counted."""
    distance: float
    """Fréchet distance to the training images, in the classifier's features."""
    agreement: float
    """Share of images that the classifier takes for the class that was asked for."""


def rows(options: Options) -> Iterator[tuple[str, Model, Plan]]:
    """(name, model, plan) of the teacher and its two students at each weight.

    They are trained where they are not yet.
    """

    def short(training: T) -> T:
        iterations = round(options.share * training.fit.iterations)
        return replace(training, fit=replace(training.fit, iterations=iterations))

    def guided(
        name: str, model: Model, num_steps: int, sampler: str | None = None
    ) -> Iterator[tuple[str, Model, Plan]]:
        for weight in options.weights:
            yield name, model, model.plan(num_steps, sampler, guidance=weight)

    first, second, third = (options.out / n for n in ("teacher", "guided", "guided-progressive"))
    training = replace(ddpm.Options.default("digits"), num_classes=10, out=first)
    teacher = ddpm.train_teacher(short(training))
    yield from guided("teacher, 16 steps", teacher, 16, "dpm-solver++")
    training = replace(guidance.PRESETS["digits"], teacher=first, out=second)
    student = guidance.distill(short(training))
    yield from guided("guided student, 16 steps", student, 16, "dpm-solver++")
    training = replace(progressive.PRESETS["digits"], teacher=second, out=third)
    *_, halved = progressive.distill(short(replace(training, solver="euler", end_steps=4)))
    yield from guided("guided student, 4 steps", halved, 4)


def measure(options: Options) -> Iterator[Figure]:
    """The real held-out images first, drawn with replacement; then each row."""
    chosen = list(rows(options))
    device, digits = chosen[0][1].device, Real.sample(data.load("digits"))
    judge = extractor("classifier", digits, device)
    real = Moments.of(reference(digits.train, judge, device))

    probabilities = judge.probabilities
    assert probabilities  # a classifier has them

    def figures(images: Tensor, labels: Tensor) -> tuple[float, float]:
        features = judge.extract(images.to(device))
        agree = probabilities(features).argmax(1) == labels.to(device)
        return frechet_distance(Moments.of(features), real), float(agree.double().mean())

    numbers = torch.arange(options.num_images, device=device)
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(digits.test), numbers.shape, generator=random)
    held_out = figures(digits.test[drawn], digits.test_condition["label"][drawn])
    yield Figure("held-out images", None, 0, *held_out)
    for name, model, plan in chosen:
        images = torch.cat([model.sample(plan, 0, batch) for batch in numbers.split(500)])
        measured = figures(images, model.conditions(numbers)["label"])
        yield Figure(name, plan.guidance, count_calls(model, plan), *measured)


def plot(path: Path, figures: list[Figure]) -> None:
    """Both figures against the weight, one line for each model, dotted for held-out images."""
    held_out, *measured = figures
    drawing, axes = plt.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    titles = {
        "distance": "Fréchet distance, classifier's features (lower is better)",
        "agreement": "share of images taken for the class asked for",
    }
    for panel, (field, title) in zip(axes, titles.items(), strict=True):
        for name, group in groupby(measured, key=lambda figure: figure.model):
            points = [(figure.guidance, getattr(figure, field)) for figure in group]
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.axhline(getattr(held_out, field), color="gray", linestyle=":", label=held_out.model)
        panel.set(xlabel="guidance weight w (1 is none)", ylabel=title)
        panel.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    drawing.tight_layout()
    with atomic_path(path) as part:
        drawing.savefig(part, format="png")
    plt.close(drawing)


def main() -> None:
    options = tyro.cli(Options, prog="python -m experiments.guidance")
    at_least(2, options, "num_images")
    at_least(1, options, "weights")
    figures = []
    for figure in measure(options):
        figures.append(figure)
        weight = "-" if figure.guidance is None else f"{figure.guidance:g}"
        say(
            f"{figure.model:25} weight {weight:>4}  calls {figure.nfe:2}  "
            f"distance {figure.distance:6.3f}  agreement {figure.agreement:.2%}"
        )
    rows = json.dumps([asdict(figure) for figure in figures], indent=1)
    write_atomic(options.out / "guidance.json", rows)
    plot(options.out / "guidance.png", figures)
    say(f"{options.out / 'guidance.json'}, {options.out / 'guidance.png'}")


if __name__ == "__main__":
    run(main)
