"""What our parts cost over the bare work in them: `python -m benchmarks.parts NAME`.

samplers, over their network calls; training-step, over its network passes; evaluation, over making
the images and running the extractor; frechet-distance, beside clean-fid's; checksums, beside the
same work without them.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import tyro

from benchmarks.subjects import Subject, objectives
from benchmarks.turns import Comparison, TimingOptions, compare
from diffusion import data, files
from diffusion.batches import Batch
from diffusion.console import run
from diffusion.denoiser import Denoiser
from diffusion.model import Model, load
from diffusion.plan import Plan
from distill.scm import derivative
from eval.measure.features import extractor
from eval.measure.judge import Judge
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.quality import Measured
from eval.measure.real import Real
from eval.measure.stream import indices, look

TEACHER = Path("runs/digits/teacher")


@dataclass(frozen=True)
class Samplers(TimingOptions):
    """Time samplers beside their bare network calls."""

    checkpoint: tyro.conf.Positional[Path] = TEACHER
    """A teacher's run or checkpoint."""
    steps: tuple[int, ...] = (1, 4, 16)
    """Network calls for each image, one comparison a number."""
    batch_size: int = 256
    """Images of a network call."""

    def comparisons(self) -> Iterator[Comparison]:
        model = load(self.checkpoint, "bf16")
        numbers = torch.arange(self.batch_size, device=model.device)
        x = torch.randn(self.batch_size, *model.shape, device=model.device)
        t = torch.rand(self.batch_size, device=model.device)

        @torch.no_grad()
        def network(steps: int) -> None:
            with torch.autocast(model.device.type, torch.bfloat16):
                for _ in range(steps):
                    model.denoiser.net(x, t, None)

        for steps in self.steps:
            calls = {"network": partial(network, steps)}
            for name in ("ddim", "dpm-solver++", "ancestral"):
                calls[name] = partial(model.sample, model.plan(steps, name), 0, numbers)
            yield Comparison(f"samplers, steps: {steps}", calls)


def step_calls(
    subject: Subject, teacher: Model, student: Denoiser, batch: Batch
) -> dict[str, Callable[[], None]]:
    """An objective's loss with its gradient, and the network passes alone that are in it."""
    net, dx, t = student.net, torch.randn_like(batch.x0), batch.level.float()

    def step() -> None:
        subject.objective(student, batch, 0.5).mean().backward()

    def passes() -> None:
        with torch.autocast(teacher.device.type, torch.bfloat16):
            with torch.no_grad():
                for _ in range(subject.without_gradient):
                    net(batch.eps, t, None)
            for _ in range(subject.forward_mode):
                along = (dx, torch.ones_like(t))
                derivative(lambda x, t: net(x, t, None), (batch.eps, t), along)
            prediction = net(batch.eps, t, None)
        prediction.float().backward(dx)

    return {"passes": passes, "step": step}


@dataclass(frozen=True)
class TrainingStep(TimingOptions):
    """Time a training step of each objective beside its bare network passes."""

    teacher: tyro.conf.Positional[Path] = TEACHER
    """A teacher's run or checkpoint."""
    batch_size: int = 256
    """Images of a network call."""

    def comparisons(self) -> Iterator[Comparison]:
        teacher = load(self.teacher, "bf16")
        student = deepcopy(teacher.denoiser).requires_grad_(True).train()
        x0, eps = torch.randn(2, self.batch_size, *teacher.shape, device=teacher.device)
        level = (torch.arange(self.batch_size).double() + 0.5) / self.batch_size
        batch = Batch(x0, eps, level.to(teacher.device))
        for subject in objectives(teacher, student):
            calls = step_calls(subject, teacher, student, batch)
            yield Comparison(f"training step, {subject.name}", calls)


@dataclass(frozen=True)
class Evaluation(TimingOptions):
    """Time evaluating images beside making them and running the extractor alone."""

    checkpoint: tyro.conf.Positional[Path] = TEACHER
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
    """How often each alternative is timed."""

    def comparisons(self) -> Iterator[Comparison]:
        model = load(self.checkpoint, "bf16")
        dataset, device = Real.sample(data.reload(model.spec)), model.device
        features = extractor(self.features, dataset, device)
        judge = Judge.of(dataset, features, extractor("random", dataset, device), device)

        def bare(plan: Plan) -> None:
            for start in range(0, self.num_images, self.batch_size):
                end = min(start + self.batch_size, self.num_images)
                features.extract(model.sample(plan, 0, indices(model, start, end)))

        def measured(plan: Plan) -> Measured:
            with TemporaryDirectory() as folder:
                part = Path(folder, "part")
                *_, (_, seen) = look(judge, model, plan, 0, self.num_images, self.batch_size, part)
            return Measured(judge, seen)

        def distance(plan: Plan) -> float:
            return measured(plan).distance

        def every_figure(plan: Plan) -> tuple:
            one = measured(plan)
            return one.distance, one.uncertainty, one.others, one.errors

        for steps in self.steps:
            plan = model.plan(steps)
            calls = {
                "generate and extract": partial(bare, plan),
                "with the distance": partial(distance, plan),
                "with every figure": partial(every_figure, plan),
            }
            yield Comparison(f"evaluation, steps: {steps}", calls)


@dataclass(frozen=True)
class FrechetDistance(TimingOptions):
    """Time our Fréchet distance beside clean-fid's, of random features."""

    dims: tuple[int, ...] = (64, 512, 2048)
    """Dimensions of the features, one comparison a number."""
    repeats: int = 3
    """How often each alternative is timed."""

    def comparisons(self) -> Iterator[Comparison]:
        from cleanfid import fid
        from scipy import linalg

        sqrtm = linalg.sqrtm
        # clean-fid 0.1.35 asks for a second result by an argument that SciPy 1.18 does not take
        vars(fid.linalg)["sqrtm"] = lambda x, disp=True: sqrtm(x) if disp else (sqrtm(x), 0)
        for dim in self.dims:
            images, reference = (Moments.of(torch.randn(2 * dim, dim)) for _ in range(2))
            gaussians = [
                part.numpy() for m in (images, reference) for part in (m.mean, m.covariance)
            ]

            def ours(images: Moments = images, reference: Moments = reference) -> float:
                again = Moments.from_tensors(reference.tensors())  # which forgets its root
                return frechet_distance(images, again)

            calls = {
                "clean-fid": partial(fid.frechet_distance, *gaussians),
                "ours": ours,
                "ours, reference known": partial(frechet_distance, images, reference),
            }
            yield Comparison(f"Fréchet distance, dimensions: {dim}", calls)


def unchecked(call: Callable[[], object]) -> object:
    """The call's result where checksums take no time."""
    none = mock.Mock(return_value="0" * 8)
    with mock.patch.multiple(files, _tensors_checksum=none, _json_checksum=none):
        return call()


@dataclass(frozen=True)
class Checksums(TimingOptions):
    """Time saving and loading a state, and evaluating images, with checksums and without."""

    checkpoint: tyro.conf.Positional[Path] = TEACHER
    """A teacher's run or checkpoint."""
    megabytes: int = 256
    """The state's size."""
    num_images: int = 10_000
    """Images that are evaluated each time."""
    repeats: int = 10
    """How often each alternative is timed."""

    def comparisons(self) -> Iterator[Comparison]:
        tensors = {f"weight.{i}": torch.randn(512, 512) for i in range(self.megabytes)}

        def save(path: Path) -> None:
            files.save_tensors(path, tensors, {})

        def load(path: Path) -> None:  # as a resumed training does; the file is only mapped before
            for name, tensor in files.load_tensors(path)[0].items():
                tensors[name].copy_(tensor)

        with TemporaryDirectory() as folder:
            bare, checked = Path(folder, "bare"), Path(folder, "checked")
            for work in (save, load):
                calls = {"without": partial(unchecked, partial(work, bare)),
                         "with checksums": partial(work, checked)}  # fmt: skip
                yield Comparison(f"{work.__name__}, megabytes: {self.megabytes}", calls)
        evaluation = Evaluation(
            checkpoint=self.checkpoint, steps=(1,), num_images=self.num_images, features="random"
        )
        for each in evaluation.comparisons():
            evaluate = each.calls["with every figure"]
            calls = {"without": partial(unchecked, evaluate), "with checksums": evaluate}
            yield Comparison(each.title, calls)


def main() -> None:
    parts = Samplers | TrainingStep | Evaluation | FrechetDistance | Checksums
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    options = tyro.cli(parts, prog="python -m benchmarks.parts", config=config)
    compare(options, options.comparisons())


if __name__ == "__main__":
    run(main)
