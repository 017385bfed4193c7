"""The stages of benchmarks.gpu: each yields rows of checks against the CPU, and of times."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import speed
from benchmarks.subjects import copied, endless, made_up, objectives, untrained
from benchmarks.turns import Comparison, take_turns
from diffusion.batches import Batch, Batches, batch_seed
from diffusion.config import FitConfig
from diffusion.console import Interrupted, first_line
from diffusion.files import write_atomic
from diffusion.images import InMemory
from diffusion.machine import compiler, layout, this_device
from diffusion.model import Model
from diffusion.networks import UNetConfig
from diffusion.noise import Noise
from diffusion.plan import plan
from diffusion.samplers import SOLVERS
from diffusion.schedules import even
from diffusion.training import Average, fit, one_network
from distill.frechet import Frechet, sums
from distill.scm import derivative
from eval.measure import features, machine, metrics, quality, sets, stream
from eval.measure.judge import Judge
from eval.measure.real import Real
from eval.results.store import Store
from teachers.ddpm import Denoising
from teachers.presets import preset

CPU = torch.device("cpu")
# What is checked: the most that it may differ from what is expected, and why so much.
LARGEST = {  # the largest difference of any element
    "noise": (1e-6, "float64's logarithm may end otherwise: one unit of a float32"),
    "pinned batch": (1e-6, "the same images; a GPU divides by multiplying by the reciprocal"),
    "resident batch": (1e-6, "the same images; a GPU divides by multiplying by the reciprocal"),
    "sampler": (1e-3, "standard deviations, after 6 steps in float32"),
    "images kept over later calls": (0.0, "a CUDA graph's next call must overwrite none of them"),
    "KID": (1e-4, "absolute; float32 products that cancel"),
    "a whole line": (100.0, "any finite figure: these trainings are too short for good ones"),
}
# On a CPU with its sums in another order (channels last, oneDNN off) Fashion-MNIST's network
# differs by 1e-6 in x0, 4e-6 in gradients, forward mode and samples, and in bf16 by 6e-3, 9e-3 and
# 1.5e-2: the bounds leave 5 to 100 times that for cuDNN's kernels, and a fault moves far more.
RELATIVE = {  # |a - b| / |b| over all elements
    "network, fp32": (1e-4, "relative; float32 sums in another order"),
    "gradient, fp32": (5e-4, "relative; more sums, some of which cancel"),
    "forward mode, fp32": (5e-4, "relative; as the gradient"),
    "network, other layout": (1e-4, "relative; float32 sums in another order"),
    "network, TF32": (1e-2, "relative; 10 bits of mantissa in every convolution"),
    "network, bf16": (3e-2, "relative; 8 bits of mantissa in every layer"),
    "forward mode, bf16": (0.1, "relative; a derivative is a difference of rounded numbers"),
    "network, compiled": (3e-2, "relative to eager, in bf16; compiled code rounds less often"),
    "gradient, compiled": (5e-2, "relative to eager, in bf16"),
    "4 calls, compiled for sampling": (5e-2, "relative to eager, in bf16, of four calls"),
    "loss": (1e-4, "relative; as the network"),
    "loss gradient": (1e-3, "relative; as the gradient, of targets of several calls"),
    "fused AdamW": (1e-5, "relative, of three steps' changes; the same formula in float32"),
    "fused average": (1e-6, "relative; one multiplication and one addition"),
    "resumed training": (0.05, "relative to the change; Adam magnifies sums in another order"),
    "compiled training": (0.05, "relative to eager, of the loss after 10 steps in bf16"),
    "Frechet map": (1e-4, "relative; eigenvalues in float64, kept in float32"),
    "Frechet distance": (1e-6, "relative; eigenvalues in float64"),
    "features": (1e-3, "relative; float32 sums in another order, through some 100 layers"),
    "FD": (1e-6, "relative; the same features, sums and eigenvalues in float64"),
    "sliced Wasserstein": (1e-6, "relative; float64 throughout"),
}
BOUNDS = LARGEST | RELATIVE


class Scene:
    """What the stages measure with: a network, images and batches as large as the settings say."""

    def __init__(self, settings: dict):
        self.small, self.batch_size = settings["shape"] == "tiny", settings["batch_size"]
        self.fast = "fp32" if self.small else "bf16"
        self.device = this_device()
        chosen = preset("digits" if self.small else settings["shape"])
        tiny = UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(4,))
        self.net = tiny if self.small else replace(chosen.net, dropout=0.0)
        self.dataset = made_up(self.net.channels, self.net.size, 400 if self.small else 11_000)
        config = replace(chosen.teacher, batch_size=self.batch_size, precision=self.fast)
        self.config = endless(replace(config, log_every=2 if self.small else 10))
        self.inception = Path(settings["inception"]) if settings["inception"] else None

    def model(self, precision: str | None = None, device: torch.device | None = None) -> Model:
        """The untrained network, on this device and fast there if nothing else is given."""
        device = device or self.device
        order = layout() if device.type == "cuda" else torch.contiguous_format
        model = untrained(self.net, self.dataset)
        copy = copied(model.denoiser, precision or self.fast, order, device)
        return replace(model, denoiser=copy)

    def x0(self, rows: Tensor) -> Tensor:
        """Images of the training set, on the CPU."""
        return self.dataset.codec.encode(self.dataset.train.take(rows).images)

    def batch(self, device: torch.device) -> Batch:
        """The same 16 images, noise and levels on every device."""
        x0 = self.x0(torch.arange(16))
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        level = (torch.arange(16).double() + 0.5) / 16
        return Batch(x0.to(device), eps.to(device), level.to(device))

    def extractor(self, device: torch.device) -> features.Extractor:
        """clean-fid's Inception where its file was named, else a small network without training."""
        name = "inception" if self.inception else "random"
        return features.extractor(name, Real.sample(self.dataset), device, self.inception)


Output = Tensor | float
Outputs = Iterator[tuple[str, Output]]  # each by a name of BOUNDS, with what it is of after a comma
Row = tuple[str, dict[str, Any]]  # the title of its table, and its cells


@torch.no_grad()
def check(what: str, here: Output, expected: Output) -> Row:
    """Whether an output is as near to the one expected as BOUNDS wants."""
    kind = next(kind for kind in BOUNDS if f"{what}, ".startswith(f"{kind}, "))
    bound, why = BOUNDS[kind]
    a, b = (torch.as_tensor(x, dtype=torch.float64, device=CPU) for x in (here, expected))
    measured = float((a - b).norm() / b.norm() if kind in RELATIVE else (a - b).abs().max())
    ok = measured <= bound  # not so of NaN
    return "checks", {"what": what, "bound": bound, "measured": measured, "ok": ok, "why": why}


def agree(here: Outputs, expected: Outputs) -> Iterator[Row]:
    """Check each output as soon as both sides have made it."""
    for (what, output), (_, other) in zip(here, expected, strict=True):
        yield check(what, output, other)


def as_on_cpu(outputs: Callable[[Scene, torch.device], Outputs], scene: Scene) -> Iterator[Row]:
    """Check what this device makes, in full float32, against what the CPU makes of the same."""
    with machine.full_float32():
        yield from agree(outputs(scene, scene.device), outputs(scene, CPU))


def times(comparisons: Iterable[Comparison], repeats: int, title: str = "") -> Iterator[Row]:
    """Images/s of every alternative, and how many times as many as the first one's."""
    for comparison in comparisons:
        assert comparison.images
        seconds = take_turns(comparison.calls, repeats, this_device())
        first, *_ = comparison.calls
        for name in comparison.calls:
            rate = comparison.images / seconds.median(name)
            cells = {"what": comparison.title + title, "alternative": name, "images/s": rate}
            if name != first:
                ratio = seconds.ratio(first, name)
                cells |= zip(("times as many", "from", "to"), ratio, strict=True)
            yield "times", cells


def without_compiler(what: str) -> list[Row]:
    """The row that leaves it out, where torch.compile does not work; none where it does."""
    why = compiler()
    return [("left out", {"what": what, "why": why})] if why else []


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient_of(module: nn.Module) -> Tensor:
    """The gradients of all its weights, flat."""
    return flat(weight.grad for weight in module.parameters() if weight.grad is not None)


def batches(scene: Scene) -> Iterator[Row]:
    """A training's batch, of images in the CPU's memory and in the device's."""
    config, train = FitConfig(batch_size=32), scene.dataset.train
    worker: Any = SimpleNamespace(device=scene.device, num_processes=1, process_index=0)
    for kind, home in (("pinned batch", CPU), ("resident batch", scene.device)):
        near = lambda images, _, home=home: InMemory(images.images.to(home))  # noqa: E731
        with mock.patch.object(InMemory, "near", near):
            x0 = Batches(scene.dataset, config, worker).draw(5).x0
        random = torch.Generator(home).manual_seed(batch_seed(config.seed, 5))
        rows = torch.randint(len(train), (32,), generator=random, device=home).cpu()
        yield check(kind, x0, scene.x0(rows))


def numbers(scene: Scene, place: torch.device) -> Outputs:
    """Noise, and what every sampler makes of it."""
    yield "noise", next(Noise(3, torch.arange(256).to(place), scene.dataset.spec.shape))
    model, indices = scene.model("fp32", place), torch.arange(8).to(place)
    for name in [name for name in SOLVERS if name != "ancestral-learned"]:
        angles = SOLVERS[name].angles(model.schedule, 6)
        yield f"sampler, {name}", model.x0(plan(name, angles), 0, indices)


def passes(model: Model, batch: Batch) -> dict[str, Tensor]:
    """x0, the gradient of its mean square in every weight, and its derivative along x and t."""
    denoiser, t = model.denoiser.requires_grad_(True), 0.2 + batch.level
    denoiser.zero_grad()
    x0 = denoiser(batch.eps, t)
    x0.square().mean().backward()
    gradient = gradient_of(denoiser)
    _, change = derivative(denoiser, (batch.eps, t), (batch.x0, torch.ones_like(t)))
    return {"network": x0, "gradient": gradient, "forward mode": change}


def network(scene: Scene) -> Iterator[Row]:
    """One network in every precision, layout and way to run it."""
    batch = scene.batch(scene.device)

    def rows(way: str, model: Model, expected: dict, *names: str) -> Iterator[Row]:
        outputs = passes(model, batch)
        for name in names:
            yield check(f"{name}, {way}", outputs[name], expected[name])

    expected = passes(scene.model("fp32", CPU), scene.batch(CPU))
    with machine.full_float32():
        yield from rows("fp32", scene.model("fp32"), expected, *expected)
        for order in ("contiguous_format", "channels_last"):
            model = speed.refitted(scene.model(), frozenset({order}))
            yield from rows(f"other layout, {order}", model, expected, "network")
    yield from rows("TF32", scene.model("fp32"), expected, "network")
    yield from rows("bf16", scene.model("bf16"), expected, "network", "forward mode")
    if missing := without_compiler("torch.compile and CUDA graphs"):
        yield from missing
        return
    eager, compiled, graphs = (scene.model() for _ in range(3))
    expected = passes(eager, batch)
    compiled.denoiser.net.compile()
    yield from rows("compiled", compiled, expected, "network", "gradient")
    eager.denoiser.requires_grad_(False)
    graphs.denoiser.compile_network()
    ddim, indices = eager.plan(4, "ddim"), torch.arange(8, device=scene.device)
    images = [graphs.x0(ddim, seed, indices) for seed in (0, 0, 0)]  # warmed, recorded, replayed
    before = images[-1].clone()
    graphs.x0(ddim, 1, indices)
    yield check("images kept over later calls", images[-1], before)
    yield check("4 calls, compiled for sampling", before, eager.x0(ddim, 0, indices))


def losses(scene: Scene, place: torch.device) -> Outputs:
    """Every objective's loss and gradient."""
    teacher, batch = scene.model("fp32", place), scene.batch(place)
    student = scene.model("fp32", place).denoiser.requires_grad_(True).train()
    for subject in objectives(teacher, student):
        student.zero_grad()
        loss = subject.objective(student, batch, 0.5).mean()
        loss.backward()
        yield f"loss, {subject.name}", loss
        yield f"loss gradient, {subject.name}", gradient_of(student.net)


def updated(scene: Scene, place: torch.device, fused: bool) -> Outputs:
    """The changes that three steps of AdamW make, and their average's weights."""
    models = [scene.model("fp32", place) for _ in range(2)]
    student, average = (model.denoiser.requires_grad_(True) for model in models)
    weights, begun = [*student.parameters()], flat(student.parameters())
    optimizer = torch.optim.AdamW(weights, 1e-3, (0.9, 0.99), fused=fused, foreach=False)
    random = torch.Generator().manual_seed(2)
    for done in range(3):
        for weight in weights:
            weight.grad = torch.empty_like(weight)  # in the weight's own layout
            weight.grad.copy_(torch.randn(weight.shape, generator=random))
        optimizer.step()
        Average(average, lambda done, progress: 0.9, fused).follow({"student": student}, done)
    yield "fused AdamW", flat(weights) - begun
    yield "fused average", flat(average.parameters())


def trainings(scene: Scene) -> Iterator[Row]:
    """Fused updates beside those on the CPU; training resumed and compiled, beside itself."""
    yield from agree(updated(scene, scene.device, True), updated(scene, CPU, False))
    config = FitConfig(iterations=10, batch_size=32, warmup=2, anneal="none", log_every=5)
    config = replace(config, precision=scene.fast, save_every=0.0)

    def trained(compile: bool, *stops: int) -> tuple[Tensor, float]:
        """The change of all weights, and the last loss; at a stop the state is saved and read."""
        with TemporaryDirectory() as folder:
            for stop in (*stops, 10):
                model = scene.model()
                student = model.denoiser.requires_grad_(True)
                begun = flat(student.parameters())
                method = one_network(student, Denoising(model.schedule.to(scene.device)))
                chosen = replace(config, compile=compile)
                with closing(fit(method, scene.dataset, chosen, Path(folder, "state"))) as loop:
                    loss = speed.lap(loop, stop).loss
                    if stop == 10:
                        next(loop, None)  # to its end: the averaged weights
        return flat(student.parameters()) - begun, loss

    (whole, loss), (resumed, _) = trained(False), trained(False, 5)
    yield check("resumed training", resumed, whole)
    missing = without_compiler("compiled training")
    yield from missing or [check("compiled training", trained(True)[1], loss)]


@cache
def correlated(rows: int, dim: int) -> Tensor:
    """Random features (rows, dim), on the CPU."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(rows, dim, generator=random) @ torch.randn(dim, dim, generator=random)


def frechet(scene: Scene, place: torch.device) -> Outputs:
    """The map and the distance of the Fréchet term."""
    dim = 32 if scene.small else 1024
    real = correlated(4 * dim, dim)
    term = Frechet(sums(real.to(place)), 784)
    term((0.9 * real + 0.3 * real.roll(1, 0)).to(place))
    term.follow({}, 1)
    term.update()
    yield "Frechet map", term.map
    yield "Frechet distance", term.distance


def distances(scene: Scene, place: torch.device) -> Outputs:
    """Features of 64 images, and the distances that are made of features."""
    test, dim = scene.dataset.test, 64 if scene.small else 2048
    images = test.take(torch.arange(len(test))[:64]).images
    yield "features", scene.extractor(place).extract(images.to(place))
    a = correlated(2 * dim, dim) / dim**0.5
    x, y = a.to(place), (0.8 * a.roll(1, 1) + 0.1).to(place)
    yield "FD", metrics.frechet_distance(metrics.Moments.of(x), metrics.Moments.of(y))
    random = torch.Generator().manual_seed(0)
    yield "sliced Wasserstein", sets.sliced_wasserstein(x, y, 16, random)
    yield "KID", sets.kid(x, y)


def switches(
    scene: Scene, parts: dict, repeats: int, compared: Callable[..., Iterator[Comparison]]
) -> Iterator[Row]:
    """Variants that compile nothing first, which take no minutes; then what compiling adds."""
    off, compiling = speed.absent(scene.device, True), ("torch.compile", "CUDA graphs")
    plain = speed.variants(parts, off | dict.fromkeys(compiling, ""))
    yield from times(compared(plain), repeats, ", not compiled")
    names = {speed.ALL, *(f"without {name}" for name in compiling)}
    chosen = {name: on for name, on in speed.variants(parts, off).items() if name in names}
    missing = without_compiler("torch.compile")
    yield from missing or times(compared(chosen), repeats, ", compiled")


def switches_in_sampling(scene: Scene) -> Iterator[Row]:
    """4 calls from noise to uint8, with each part of the speed off in turn."""
    model, sizes = scene.model(), (1, scene.batch_size)
    yield from switches(
        scene,
        speed.SAMPLING,
        3 if scene.small else 20,
        lambda on: speed.samplings(speed.sampling_models(model, on), "ddim", 4, sizes),
    )


def switches_in_training(scene: Scene) -> Iterator[Row]:
    """benchmarks.speed's training, with each part of the speed off in turn."""
    model = scene.model()
    for name in ("denoising",) if scene.small else speed.OBJECTIVES:
        compared = partial(speed.trainings, model, name, scene.dataset, scene.config)
        yield from switches(scene, speed.TRAINING, 1 if scene.small else 3, compared)


def images(scene: Scene) -> Iterator[Row]:
    """50,000 images at 1, 2 and 4 calls, through the harness to a Fréchet distance."""
    device, size, model = scene.device, scene.batch_size, scene.model()
    extractor, real = scene.extractor(device), Real.sample(scene.dataset)
    judge = Judge.of(real, extractor, features.random_network(real, device), device)
    count = 300 if scene.small else 50_000
    if not scene.small:
        yield from (missing := without_compiler("torch.compile"))
        if not missing:
            model.denoiser.compile_network()
    for num_steps in (1, 2, 4):
        yield from times(speed.samplings({"images": model}, "ddim", num_steps, (size,)), 5)
        ddim, begun = plan("ddim", even(model.schedule, num_steps)), time.monotonic()
        with TemporaryDirectory() as folder:
            *_, (_, seen) = stream.look(judge, model, ddim, 0, count, size, Path(folder, "part"))
        cells = {"calls": num_steps, "images": count}
        cells[f"{extractor.name}, {extractor.dim} dims"] = quality.Measured(judge, seen).distance
        yield "images", {**cells, "seconds": time.monotonic() - begun}


def peer(scene: Scene) -> Iterator[Row]:
    """diffusers' and accelerate's loops beside ours."""
    if not find_spec("diffusers"):
        why = "diffusers is not installed: pip install -e '.[bench]'"
        yield "left out", {"what": "the peer", "why": why}
        return
    from benchmarks import peer

    yield from times(peer.training(scene.net, scene.config), 3)
    model, unet = scene.model(), peer.peer_network(scene.net).to(scene.device).eval()
    for num_steps in (4, 50):
        comparison = peer.sampling(model, unet, "ddim", num_steps, scene.batch_size)
        yield from times([comparison], 3)


def line(scene: Scene) -> Iterator[Row]:
    """The commands themselves on digits: teacher, students of four kinds, and their comparison."""
    short, many = (20, 300) if scene.small else (200, 1024)
    with TemporaryDirectory() as folder:
        home = Path(folder)
        training = f"--iterations {short} --batch-size 64 --precision {scene.fast}"
        student = f"{training} --teacher {home}/teacher"
        for command in (
            f"teachers.ddpm {training} --out {home}/teacher {'--width 8' * scene.small}",
            f"distill.progressive {student} --start-steps 8 --rounds 4 1",
            f"distill.midtraining {student} --solver-steps 4",
            f"distill.consistency {student} --frechet 0.1 --out {home}/cd",
            f"distill.consistency {student} --mode scm --out {home}/scm",
            f"eval.compare {home} --out {home}/compare --steps 1 --no-long --num-images {many} "
            f"--seeds 0 --features random --precision {scene.fast} --likelihood 2 --no-times",
        ):
            module, *_ = words = command.split()
            with mock.patch("sys.argv", words):
                import_module(module).main()
        records = Store.open(home / "compare").records.values()
    for record in records:
        yield check(f"a whole line, {record.title} at {record.nfe}", record.score, 0.0)


STAGES: dict[str, tuple] = {  # its share of the time, and its parts, each a function of the Scene
    "numbers": (2, batches, partial(as_on_cpu, numbers)),
    "network": (5, network),
    "training": (5, partial(as_on_cpu, losses), trainings),
    "frechet": (2, partial(as_on_cpu, frechet)),
    "distances": (3, partial(as_on_cpu, distances)),
    "sampling-switches": (8, switches_in_sampling),
    "images": (12, images),
    "peer": (4, peer),
    "training-switches": (14, switches_in_training),
    "line": (4, line),
}


def main(stage: str, path: Path) -> None:
    """Run the stage here, and leave its rows in the file as they come, whatever fails."""
    torch._dynamo.config.cache_size_limit = 64  # variants of one network, of which 8 are usual
    whole, begun, tables = json.loads(path.read_text()), time.monotonic(), {}

    def save(state: str) -> None:
        seconds = time.monotonic() - begun
        whole["stages"][stage] = {"state": state, "seconds": seconds, "tables": tables}
        write_atomic(path, json.dumps(whole, indent=1))

    try:
        scene = Scene(whole["settings"])
        for part in STAGES[stage][1:]:
            for title, cells in part(scene):
                tables.setdefault(title, []).append(cells)
                save("cut short")
        save("done")
    except Interrupted:
        raise
    except Exception as error:  # a result like others, and the other stages go on
        save(f"failed: {type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
