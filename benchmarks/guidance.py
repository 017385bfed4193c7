"""Quality and class agreement against guidance weight: `python -m benchmarks.guidance`.

A conditional teacher of digits, the student that takes its guidance weight as an input, and that
student halved to 4 steps: trained where they are not there yet (minutes on two CPU cores), then
sampled from the same noise at each weight. Writes guidance.json and guidance.png.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import matplotlib
import torch
import tyro
from torch import Tensor

from diffusion import data
from diffusion.checkpoint import atomic_path, write_atomic
from diffusion.console import run, say
from diffusion.model import Model
from diffusion.runs import some_labels
from distill import guidance, progressive
from eval.measure.features import extractor
from eval.measure.metrics import Moments, frechet_distance
from teachers import ddpm
from teachers.presets import preset

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Sampled = tuple[Model, tuple[str, Tensor]]  # a model, and the plan to sample it with


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


def models(out: Path, share: float) -> dict[str, Sampled]:
    chosen, halving_preset = preset("digits"), progressive.PRESETS["digits"]
    net = replace(chosen.net, num_classes=10)
    training, distillation, halving = (
        replace(fit, iterations=round(share * fit.iterations))
        for fit in (chosen.teacher, guidance.PRESETS["digits"].fit, halving_preset.fit)
    )
    teacher = ddpm.train_teacher(ddpm.Options(net=net, fit=training, out=out / "teacher"))
    guided = guidance.distill(
        guidance.Options(teacher=out / "teacher", out=out / "guided", fit=distillation)
    )
    *_, halved = progressive.distill(
        progressive.Options(
            teacher=out / "guided",
            out=out / "guided-progressive",
            start_steps=halving_preset.start_steps,
            end_steps=4,
            fit=halving,
        )
    )
    return {
        "teacher, 16 steps": (teacher, teacher.plan(16, "dpm-solver++")),
        "guided student, 16 steps": (guided, guided.plan(16, "dpm-solver++")),
        "guided student, 4 steps": (halved, halved.plan(4)),
    }


def images_of(sampled: Sampled, weight: float, labels: Tensor) -> tuple[Tensor, float]:
    """Images of those classes, uint8, and the network calls that each took."""
    (model, plan), calls = sampled, 0

    def count(net, inputs, prediction: Tensor) -> None:
        nonlocal calls
        calls += len(prediction)

    hook = model.denoiser.net.register_forward_hook(count)
    indices = torch.arange(len(labels), device=model.device)
    batches = zip(indices.split(500), labels.split(500), strict=True)
    images = torch.cat([model.sample(plan, 0, i, label, weight) for i, label in batches])
    hook.remove()
    return images, calls / len(images)


def measure(options: Options) -> list[Figure]:
    """The real held-out images first, drawn with replacement; then each model at each weight."""
    chosen = models(options.out, options.share)
    model, _ = next(iter(chosen.values()))
    dataset = data.load("digits")
    judge = extractor("classifier", dataset, model.device)
    real = Moments.of(judge.extract(dataset.train.to(model.device)))

    def figure(name: str, weight: float | None, nfe: float, images: Tensor, labels: Tensor):
        features = judge.extract(images)
        distance = frechet_distance(Moments.of(features), real)
        agreement = (judge.probabilities(features).argmax(1) == labels).double().mean()
        found = Figure(name, weight, nfe, distance, float(agreement))
        told = "" if weight is None else f"w {weight:3.1f}  {nfe:4.1f} calls  "
        say(f"{name:25} {told}distance {distance:6.3f}  agreement {found.agreement:.2%}")
        return found

    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(dataset.test), (options.num_images,), generator=random)
    held_out = (dataset.test[drawn], dataset.test_labels[drawn])
    figures = [figure("held-out images", None, 0, *(part.to(model.device) for part in held_out))]
    labels = some_labels(model, options.num_images)
    for (name, sampled), weight in product(chosen.items(), options.weights):
        images, nfe = images_of(sampled, weight, labels)
        figures.append(figure(name, weight, nfe, images, labels))
    return figures


PANELS = {
    "distance": "Fréchet distance, classifier's features (lower is better)",
    "agreement": "share of images taken for the class asked for",
}


def plot(path: Path, figures: list[Figure]) -> None:
    """Both figures against the weight, one line for each model, dotted for held-out images."""
    real, *rows = figures
    drawing, axes = plt.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    for panel, (field, title) in zip(axes, PANELS.items(), strict=True):
        for name, marker in zip(dict.fromkeys(row.model for row in rows), "osD", strict=True):
            own = [row for row in rows if row.model == name]
            calls = "/".join(f"{nfe:g}" for nfe in sorted({row.nfe for row in own}))
            x, y = [row.guidance for row in own], [getattr(row, field) for row in own]
            panel.plot(x, y, marker=marker, label=f"{name} ({calls} calls)")
        panel.axhline(getattr(real, field), color="gray", linestyle=":", label=real.model)
        panel.set(xlabel="guidance weight w (1 is none)", ylabel=title)
        panel.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        drawing.savefig(part, format="png")
    plt.close(drawing)


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.guidance")
    figures = measure(options)
    rows = json.dumps([asdict(figure) for figure in figures], indent=1)
    write_atomic(options.out / "guidance.json", rows)
    plot(options.out / "guidance.png", figures)
    say(f"{options.out / 'guidance.json'}, {options.out / 'guidance.png'}")


if __name__ == "__main__":
    run(main)
