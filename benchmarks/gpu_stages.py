"""The stages of benchmarks.gpu: each fills its sheet with checks against the CPU and with times."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
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
from diffusion.config import FitConfig, check_compiler
from diffusion.console import Interrupted, UserError
from diffusion.data import Dataset
from diffusion.files import write_atomic
from diffusion.images import InMemory
from diffusion.machine import layout, this_device
from diffusion.model import Model
from diffusion.networks import UNetConfig
from diffusion.noise import Noise
from diffusion.plan import plan
from diffusion.samplers import SOLVERS
from diffusion.schedules import even
from diffusion.training import Average, fit, one_network
from distill.frechet import Frechet, sums
from distill.scm import derivative
from eval.measure import features, sets
from eval.measure.judge import Judge
from eval.measure.machine import full_float32
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.quality import Measured
from eval.measure.real import Real
from eval.measure.stream import look
from eval.results.store import Store
from teachers.ddpm import Denoising
from teachers.presets import preset

CPU = torch.device("cpu")
# What may differ from the CPU's result, at most, and why so much. Relative: |a - b| / |b| over all.
# On a CPU with its sums in another order (channels last, oneDNN off) Fashion-MNIST's network
# differs by 1e-6 in x0, 4e-6 in gradients, forward mode and samples, and in bf16 by 6e-3, 9e-3 and
# 1.5e-2: the bounds leave 5 to 100 times that for cuDNN's kernels, and a fault moves far more.
BOUNDS = {
    "noise": (1e-6, "float64's logarithm may end otherwise: one unit of a float32"),
    "pinned batch": (1e-6, "the same images; a GPU divides by multiplying by the reciprocal"),
    "resident batch": (1e-6, "the same images; a GPU divides by multiplying by the reciprocal"),
    "sampler": (1e-3, "standard deviations, after 6 steps in float32"),
    "network, fp32": (1e-4, "relative; float32 sums in another order"),
    "gradient, fp32": (5e-4, "relative; more sums, some of which cancel"),
    "network, other layout": (1e-4, "relative; float32 sums in another order"),
    "network, TF32": (1e-2, "relative; 10 bits of mantissa in every convolution"),
    "network, bf16": (3e-2, "relative; 8 bits of mantissa in every layer"),
    "forward mode, fp32": (5e-4, "relative; as the gradient"),
    "forward mode, bf16": (0.1, "relative; a derivative is a difference of rounded numbers"),
    "network, compiled": (3e-2, "relative to eager, in bf16; compiled code rounds less often"),
    "gradient, compiled": (5e-2, "relative to eager, in bf16"),
    "4 calls, compiled for sampling": (5e-2, "relative to eager, in bf16, of four calls"),
    "images kept over later calls": (0.0, "a CUDA graph's next call must overwrite none of them"),
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
    "KID": (1e-4, "absolute; float32 products that cancel"),
    "sliced Wasserstein": (1e-6, "relative; float64 throughout"),
    "a whole line": (100.0, "any finite figure: these trainings are too short for good ones"),
}

Outputs = dict[tuple[str, str], Tensor]  # (a name in BOUNDS, what it is of)


@dataclass
class Sheet:
    """What a stage has measured so far, on disk after every line; and what it measures it with."""

    stage: str
    path: Path
    """The file of all results, whose settings say how large the network and its batches are."""
    tables: dict[str, list[dict]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def save(self, state: str = "cut short") -> None:
        whole, seconds = json.loads(self.path.read_text()), time.monotonic() - self.begun
        stage = {"state": state, "seconds": seconds, "tables": self.tables}
        whole["stages"][self.stage] = stage
        write_atomic(self.path, json.dumps(whole, indent=1))

    def row(self, table: str, **cells: object) -> None:
        self.tables.setdefault(table, []).append(cells)
        self.save()

    def check(self, kind: str, measured: float, detail: str = "") -> None:
        bound, why = BOUNDS[kind]
        ok = bool(measured <= bound)  # not so of NaN
        cells = {"bound": bound, "measured": measured, "ok": ok, "why": why}
        self.row("checks", what=f"{kind}, {detail}" if detail else kind, **cells)

    def agree(self, outputs: Callable[[torch.device], Outputs], absolute: bool = False) -> None:
        """Check what this device makes, in full float32, against what the CPU makes."""
        with full_float32():
            expected, here = outputs(CPU), outputs(self.device)
        for (kind, detail), value in here.items():
            measure = distance if absolute else relative
            self.check(kind, measure(value, expected[kind, detail]), detail)

    def time(self, comparison: Comparison, repeats: int, title: str = "") -> None:
        """Images/s of every alternative, and how many times as many as the first one's."""
        assert comparison.images
        times = take_turns(comparison.calls, repeats, self.device)
        first, *_ = comparison.calls
        for name in comparison.calls:
            cells = {"alternative": name, "images/s": comparison.images / times.median(name)}
            if name != first:
                ratio = times.ratio(first, name)
                cells |= zip(("times as many", "from", "to"), ratio, strict=True)
            self.row("times", what=f"{comparison.title}{title}", **cells)

    def skip(self, what: str, why: str) -> None:
        self.row("left out", what=what, why=why)

    def can_compile(self, what: str) -> bool:
        """Whether torch.compile works here; where it does not, `what` is left out."""
        try:
            check_compiler(True)
        except UserError as error:
            self.skip(what, str(error))
            return False
        return True

    @cached_property
    def settings(self) -> dict:
        return json.loads(self.path.read_text())["settings"]

    @property
    def small(self) -> bool:
        return self.settings["shape"] == "tiny"

    @property
    def batch_size(self) -> int:
        return self.settings["batch_size"]

    @cached_property
    def device(self) -> torch.device:
        return this_device()

    @property
    def fast(self) -> str:
        return "fp32" if self.small else "bf16"

    @cached_property
    def net(self) -> UNetConfig:
        tiny = UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(4,))
        return tiny if self.small else replace(preset(self.settings["shape"]).net, dropout=0.0)

    @cached_property
    def dataset(self) -> Dataset:
        return made_up(self.net.channels, self.net.size, 400 if self.small else 11_000)

    def config(self, steps: int) -> FitConfig:
        """An endless training of so many steps a line."""
        name = "digits" if self.small else self.settings["shape"]
        config = replace(preset(name).teacher, batch_size=self.batch_size)
        return endless(replace(config, log_every=steps, precision=self.fast))

    def model(self, precision: str | None = None) -> Model:
        return untrained(self.net, self.dataset, precision or self.fast)

    def batch(self, device: torch.device, size: int = 16) -> Batch:
        """The same numbers on every device."""
        random = torch.Generator().manual_seed(1)
        x0 = self.dataset.codec.encode(self.dataset.train.take(torch.arange(size)).images)
        eps = torch.randn(x0.shape, generator=random)
        level = (torch.arange(size).double() + 0.5) / size
        return Batch(x0.to(device), eps.to(device), level.to(device))


def placed(
    model: Model,
    device: torch.device,
    precision: str = "fp32",
    order: torch.memory_format | None = None,
) -> Model:
    """A copy there, in that device's layout where no order of memory is given."""
    order = order or (layout() if device.type == "cuda" else torch.contiguous_format)
    return replace(model, denoiser=copied(model.denoiser, precision, order, device))


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| over all elements."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of any element."""
    return float((a.detach().cpu().double() - b.detach().cpu().double()).abs().max())


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient_of(module: nn.Module) -> Tensor:
    """The gradients of all its weights, flat."""
    return flat(weight.grad for weight in module.parameters() if weight.grad is not None)


def numbers(sheet: Sheet) -> None:
    """Noise, batches and samplers."""
    device, dataset = sheet.device, sheet.dataset

    def noise(place: torch.device) -> Outputs:
        return {("noise", ""): next(Noise(3, torch.arange(256).to(place), dataset.spec.shape))}

    sheet.agree(noise, absolute=True)
    config = FitConfig(batch_size=32)
    worker: Any = SimpleNamespace(device=device, num_processes=1, process_index=0)
    for kind, home in (("pinned", CPU), ("resident", device)):
        near = lambda images, _, home=home: InMemory(images.images.to(home))  # noqa: E731
        with mock.patch.object(InMemory, "near", near):
            x0 = Batches(dataset, config, worker).draw(5).x0
        random = torch.Generator(home).manual_seed(batch_seed(config.seed, 5))
        rows = torch.randint(len(dataset.train), (32,), generator=random, device=home).cpu()
        expected = dataset.codec.encode(dataset.train.take(rows).images)
        sheet.check(f"{kind} batch", distance(x0, expected))
    model = sheet.model("fp32")

    def samples(place: torch.device) -> Outputs:
        one, indices = placed(model, place), torch.arange(8).to(place)
        plans = {name: SOLVERS[name].angles(model.schedule, 6) for name in SOLVERS}
        del plans["ancestral-learned"]
        return {("sampler", name): one.x0(plan(name, plans[name]), 0, indices) for name in plans}

    sheet.agree(samples, absolute=True)


def passes(model: Model, batch: Batch) -> dict[str, Tensor]:
    """x0, the gradient of its mean square in every weight, and its derivative along x and t."""
    denoiser, t = model.denoiser.requires_grad_(True), 0.2 + batch.level
    denoiser.zero_grad()
    x0 = denoiser(batch.eps, t)
    x0.square().mean().backward()
    gradient = gradient_of(denoiser)
    along = (batch.x0, torch.ones_like(t))
    _, change = derivative(denoiser, (batch.eps, t), along)
    return {"network": x0, "gradient": gradient, "forward mode": change}


def network(sheet: Sheet) -> None:
    """One network in every precision, layout and way to run it."""
    model, device = sheet.model("fp32"), sheet.device
    batch = sheet.batch(device)
    expected = passes(placed(model, CPU), sheet.batch(CPU))

    def check(kind: str, outputs: dict[str, Tensor], *names: str, detail: str = "") -> None:
        for name in names:
            sheet.check(f"{name}, {kind}", relative(outputs[name], expected[name]), detail)

    with full_float32():
        check("fp32", passes(placed(model, device), batch), *expected)
        for order in (torch.contiguous_format, torch.channels_last):
            outputs = passes(placed(model, device, order=order), batch)
            check("other layout", outputs, "network", detail=str(order).split(".")[1])
    check("TF32", passes(placed(model, device), batch), "network")
    check("bf16", passes(placed(model, device, "bf16"), batch), "network", "forward mode")
    if not sheet.can_compile("torch.compile and CUDA graphs"):
        return
    eager, compiled, graphs = (placed(model, device, sheet.fast) for _ in range(3))
    expected = passes(eager, batch)
    compiled.denoiser.net.compile()
    check("compiled", passes(compiled, batch), "network", "gradient")
    eager.denoiser.requires_grad_(False)
    graphs.denoiser.compile_network()
    ddim, indices = model.plan(4, "ddim"), torch.arange(8, device=device)
    images = [graphs.x0(ddim, seed, indices) for seed in (0, 0, 0)]  # warmed, recorded, replayed
    before = images[-1].clone()
    graphs.x0(ddim, 1, indices)
    sheet.check("images kept over later calls", distance(images[-1], before))
    sheet.check("4 calls, compiled for sampling", relative(before, eager.x0(ddim, 0, indices)))


def training(sheet: Sheet) -> None:
    """Every objective's loss and gradient, and what moves the weights."""
    model, device = sheet.model("fp32"), sheet.device

    def losses(place: torch.device) -> Outputs:
        teacher, batch, outputs = placed(model, place), sheet.batch(place), {}
        student = placed(model, place).denoiser.requires_grad_(True).train()
        for subject in objectives(teacher, student):
            student.zero_grad()
            loss = subject.objective(student, batch, 0.5).mean()
            loss.backward()
            gradient = gradient_of(student.net)
            outputs |= {("loss", subject.name): loss, ("loss gradient", subject.name): gradient}
        return outputs

    sheet.agree(losses)
    begun = flat(model.denoiser.parameters()).cpu()

    def updated(place: torch.device, fused: bool) -> tuple[Tensor, Tensor]:
        """The changes that three steps of AdamW make, and their average's weights."""
        student, average = (placed(model, place).denoiser.requires_grad_(True) for _ in range(2))
        weights = student.parameters()
        optimizer = torch.optim.AdamW(weights, 1e-3, (0.9, 0.99), fused=fused, foreach=False)
        random = torch.Generator().manual_seed(2)
        for done in range(3):
            for weight in student.parameters():
                weight.grad = torch.empty_like(weight)  # in the weight's own layout
                weight.grad.copy_(torch.randn(weight.shape, generator=random))
            optimizer.step()
            Average(average, lambda done, progress: 0.9, fused).follow({"student": student}, done)
        return flat(student.parameters()).cpu() - begun, flat(average.parameters()).cpu()

    pairs = zip(updated(device, True), updated(CPU, False), strict=True)
    for kind, pair in zip(("fused AdamW", "fused average"), pairs, strict=True):
        sheet.check(kind, relative(*pair))
    config = FitConfig(iterations=10, batch_size=32, warmup=2, anneal="none", log_every=5)
    config = replace(config, precision=sheet.fast, save_every=0.0)

    def trained(compiled: bool, *stops: int) -> tuple[Tensor, float]:
        """The change of all weights, and the last loss; at a stop the state is saved and read."""
        with TemporaryDirectory() as folder:
            for stop in (*stops, 10):
                student = placed(model, device, sheet.fast).denoiser.requires_grad_(True)
                method = one_network(student, Denoising(model.schedule.to(device)))
                chosen = replace(config, compile=compiled)
                loop = fit(method, sheet.dataset, chosen, Path(folder, "state"))
                with closing(loop):
                    last = next(line for line in loop if line.iteration == stop)
                    if stop == 10:
                        next(loop, None)  # to its end: the averaged weights
        return flat(student.parameters()).cpu() - begun, last.loss

    (whole, loss), (resumed, _) = trained(False), trained(False, 5)
    sheet.check("resumed training", relative(resumed, whole))
    if sheet.can_compile("compiled training"):
        sheet.check("compiled training", abs(trained(True)[1] / loss - 1))


def frechet(sheet: Sheet) -> None:
    """The map and the distance of the Fréchet term."""
    dim = 32 if sheet.small else 1024
    random = torch.Generator().manual_seed(0)
    real = torch.randn(4 * dim, dim, generator=random) @ torch.randn(dim, dim, generator=random)

    def term(place: torch.device) -> Outputs:
        term = Frechet(sums(real.to(place)), 784)
        term((0.9 * real + 0.3 * real.roll(1, 0)).to(place))
        term.follow({}, 1)
        term.update()
        return {("Frechet map", ""): term.map, ("Frechet distance", ""): term.distance}

    sheet.agree(term)


def extractor(sheet: Sheet, device: torch.device) -> features.Extractor:
    """clean-fid's Inception where its file was named, else a small network without training."""
    weights = sheet.settings["inception"]
    name = "inception" if weights else "random"
    return features.extractor(
        name, Real.sample(sheet.dataset), device, Path(weights) if weights else None
    )


def distances(sheet: Sheet) -> None:
    """Features, and the distances that are made of them."""
    test = sheet.dataset.test
    images = test.take(torch.arange(len(test))[:64]).images
    dim = 64 if sheet.small else 2048
    sheet.agree(lambda d: {("features", ""): extractor(sheet, d).extract(images.to(d))})
    random = torch.Generator().manual_seed(0)
    a = torch.randn(2 * dim, dim, generator=random) @ torch.randn(dim, dim, generator=random)
    a /= dim**0.5
    b = 0.8 * a.roll(1, 1) + 0.1

    def figures(place: torch.device) -> Outputs:
        x, y = a.to(place), b.to(place)
        frechet = frechet_distance(Moments.of(x), Moments.of(y))
        sliced = sets.sliced_wasserstein(x, y, 16, torch.Generator().manual_seed(0))
        values = {"FD": frechet, "sliced Wasserstein": sliced}
        return {(name, ""): torch.tensor(value).double() for name, value in values.items()}

    sheet.agree(figures)
    sheet.agree(lambda d: {("KID", ""): torch.tensor(sets.kid(a.to(d), b.to(d)))}, absolute=True)


def line(sheet: Sheet) -> None:
    """The commands themselves on digits: teacher, students of four kinds, and their comparison."""
    short, many = (20, 300) if sheet.small else (200, 1024)
    with TemporaryDirectory() as folder:
        home = Path(folder)
        training = f"--iterations {short} --batch-size 64 --precision {sheet.fast}"
        student = f"{training} --teacher {home}/teacher"
        commands = [
            f"teachers.ddpm {training} --out {home}/teacher {'--width 8' * sheet.small}",
            f"distill.progressive {student} --start-steps 8 --rounds 4 1",
            f"distill.midtraining {student} --solver-steps 4",
            f"distill.consistency {student} --frechet 0.1 --out {home}/cd",
            f"distill.consistency {student} --mode scm --out {home}/scm",
            f"eval.compare {home} --out {home}/compare --steps 1 --no-long --num-images {many} "
            f"--seeds 0 --features random --precision {sheet.fast} --likelihood 2 --no-times",
        ]
        for command in commands:
            module, *_ = words = command.split()
            with mock.patch("sys.argv", words):
                import_module(module).main()
        records = Store.open(home / "compare").records.values()
    for record in records:
        sheet.check("a whole line", record.score, f"{record.title} at {record.nfe}")


COMPILING = ("torch.compile", "CUDA graphs")


def variants(sheet: Sheet, parts: dict) -> Iterator[tuple[str, speed.Variants]]:
    """Variants that compile nothing first, which take no minutes; then what compiling adds."""
    off = speed.absent(sheet.device, True)
    yield ", not compiled", speed.variants(parts, {**off, **dict.fromkeys(COMPILING, "")})
    if sheet.can_compile("torch.compile"):
        names = {speed.ALL, *(f"without {name}" for name in COMPILING)}
        whole = speed.variants(parts, off)
        yield ", compiled", {name: on for name, on in whole.items() if name in names}


def switches_in_training(sheet: Sheet) -> None:
    """benchmarks.speed's training, with each part of the speed off in turn."""
    small, model = sheet.small, sheet.model()
    config = sheet.config(2 if small else 10)
    for name in ("denoising",) if small else speed.OBJECTIVES:
        for title, chosen in variants(sheet, speed.TRAINING):
            for comparison in speed.trainings(model, name, sheet.dataset, config, chosen):
                sheet.time(comparison, 1 if small else 3, title)


def switches_in_sampling(sheet: Sheet) -> None:
    """4 calls from noise to uint8, with each part of the speed off in turn."""
    model, sizes = sheet.model(), (1, sheet.batch_size)
    for title, chosen in variants(sheet, speed.SAMPLING):
        models = speed.sampling_models(model, chosen)
        for comparison in speed.samplings(models, "ddim", 4, sizes):
            sheet.time(comparison, 3 if sheet.small else 20, title)


def peer(sheet: Sheet) -> None:
    """diffusers' and accelerate's loops beside ours."""
    if not importlib.util.find_spec("diffusers"):
        sheet.skip("the peer", "diffusers is not installed: pip install -e '.[bench]'")
        return
    from benchmarks import peer

    for comparison in peer.training(sheet.net, sheet.config(2 if sheet.small else 10)):
        sheet.time(comparison, 3)
    model, unet = sheet.model(), peer.peer_network(sheet.net).to(sheet.device).eval()
    for num_steps in (4, 50):
        sheet.time(peer.sampling(model, unet, "ddim", num_steps, sheet.batch_size), 3)


def images(sheet: Sheet) -> None:
    """50,000 images at 1, 2 and 4 calls, through the harness to a Fréchet distance."""
    device, size, model = sheet.device, sheet.batch_size, sheet.model()
    judging = extractor(sheet, device)
    real = Real.sample(sheet.dataset)
    judge = Judge.of(real, judging, features.random_network(real, device), device)
    count = 300 if sheet.small else 50_000
    if not sheet.small and sheet.can_compile("torch.compile"):
        model.denoiser.compile_network()
    for num_steps in (1, 2, 4):
        for comparison in speed.samplings({"images": model}, "ddim", num_steps, (size,)):
            sheet.time(comparison, 5)
        ddim, begun = plan("ddim", even(model.schedule, num_steps)), time.monotonic()
        with TemporaryDirectory() as folder:
            *_, (_, seen) = look(judge, model, ddim, 0, count, size, Path(folder, "part"))
        cells = {f"{judging.name}, {judging.dim} dims": Measured(judge, seen).distance}
        seconds = time.monotonic() - begun
        sheet.row("images", calls=num_steps, images=count, **cells, seconds=seconds)


STAGES: dict[str, tuple[Callable[[Sheet], None], float]] = {  # and its share of the time
    "numbers": (numbers, 2),
    "network": (network, 5),
    "training": (training, 5),
    "frechet": (frechet, 2),
    "distances": (distances, 3),
    "sampling-switches": (switches_in_sampling, 8),
    "images": (images, 12),
    "peer": (peer, 4),
    "training-switches": (switches_in_training, 14),
    "line": (line, 4),
}


def main(stage: str, path: Path) -> None:
    """Run the stage here, and leave its sheet in the file, whatever fails."""
    torch._dynamo.config.cache_size_limit = 64  # variants of one network, of which 8 are usual
    sheet = Sheet(stage, path)
    try:
        STAGES[stage][0](sheet)
        sheet.save("done")
    except Interrupted:
        raise
    except Exception as error:  # a result like others, and the other stages go on
        first_line = (str(error).splitlines() or [""])[0]
        sheet.save(f"failed: {type(error).__name__}: {first_line}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
