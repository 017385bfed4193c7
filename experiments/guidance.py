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

import matplotlib
import torch
import tyro
from torch import Tensor

from diffusion import data
from diffusion.checkpoint import atomic_path, write_atomic
from diffusion.console import at_least, run, say
from diffusion.model import Model
from diffusion.runs import some_labels
from distill import guidance, progressive
from eval.measure.features import extractor
from eval.measure.metrics import Moments, frechet_distance
from teachers import ddpm
from teachers.presets import preset

matplotlib.use("Agg")
from matplotlib import pyplot as plt


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
    nfe: float
    """Network calls per image, counted."""
    distance: float
    """Fréchet distance to the training images, in the classifier's features."""
    agreement: float
    """Share of images that the classifier takes for the class that was asked for."""


def models(out: Path, share: float) -> Iterator[tuple[str, Model, tuple[str, Tensor]]]:
    """(name, model, plan) of the teacher and its two students, trained where they are not yet."""
    chosen = preset("digits")
    training, distillation, halving = (
        replace(fit, iterations=round(share * fit.iterations))
        for fit in (chosen.teacher, chosen.consistency, chosen.halving)
    )
    net, runs = replace(chosen.net, num_classes=10), {"teacher": out / "teacher"}
    teacher = ddpm.train_teacher(ddpm.Options(net=net, fit=training, out=runs["teacher"]))
    yield "teacher, 16 steps", teacher, teacher.plan(16, "dpm-solver++")
    guided = guidance.distill(guidance.Options(**runs, out=out / "guided", fit=distillation))
    yield "guided student, 16 steps", guided, guided.plan(16, "dpm-solver++")
    runs = {"teacher": out / "guided", "out": out / "guided-progressive"}
    steps = {"start_steps": chosen.start_steps, "end_steps": 4}
    *_, halved = progressive.distill(progressive.Options(**runs, **steps, fit=halving))
    yield "guided student, 4 steps", halved, halved.plan(4)


def images_of(
    model: Model, plan: tuple[str, Tensor], weight: float, labels: Tensor
) -> tuple[Tensor, float]:
    """Images of those classes, uint8, and the network calls that each took."""
    calls = []
    hook = model.denoiser.net.register_forward_hook(
        lambda net, _, output: calls.append(len(output))
    )
    indices = torch.arange(len(labels), device=model.device)
    batches = zip(indices.split(500), labels.split(500), strict=True)
    images = torch.cat([model.sample(plan, 0, i, label, weight) for i, label in batches])
    hook.remove()
    return images, sum(calls) / len(images)


def measure(options: Options) -> Iterator[Figure]:
    """The real held-out images first, drawn with replacement; then each model at each weight."""
    chosen = list(models(options.out, options.share))
    device, dataset = chosen[0][1].device, data.load("digits")
    judge = extractor("classifier", dataset, device)
    real = Moments.of(judge.extract(dataset.train.to(device)))

    def judged(images: Tensor, labels: Tensor) -> tuple[float, float]:
        features = judge.extract(images.to(device))
        agree = judge.probabilities(features).argmax(1) == labels.to(device)
        return frechet_distance(Moments.of(features), real), float(agree.double().mean())

    random = torch.Generator().manual_seed(0)
    rows = torch.randint(len(dataset.test), (options.num_images,), generator=random)
    held_out = judged(dataset.test[rows], dataset.test_labels[rows])
    yield Figure("held-out images", None, 0, *held_out)
    for name, model, plan in chosen:
        labels = some_labels(model, options.num_images)
        for weight in options.weights:
            images, nfe = images_of(model, plan, weight, labels)
            yield Figure(name, weight, nfe, *judged(images, labels))


def plot(path: Path, figures: list[Figure]) -> None:
    """Both figures against the weight, one line for each model, dotted for held-out images."""
    held_out, *rows = figures
    drawing, axes = plt.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    titles = {
        "distance": "Fréchet distance, classifier's features (lower is better)",
        "agreement": "share of images taken for the class asked for",
    }
    for panel, (field, title) in zip(axes, titles.items(), strict=True):
        for name, group in groupby(rows, key=lambda row: row.model):
            points = [(row.guidance, getattr(row, field)) for row in group]
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
            f"{figure.model:25} weight {weight:>4}  calls {figure.nfe:4.1f}  "
            f"distance {figure.distance:6.3f}  agreement {figure.agreement:.2%}"
        )
    rows = json.dumps([asdict(figure) for figure in figures], indent=1)
    write_atomic(options.out / "guidance.json", rows)
    plot(options.out / "guidance.png", figures)
    say(f"{options.out / 'guidance.json'}, {options.out / 'guidance.png'}")


if __name__ == "__main__":
    run(main)
