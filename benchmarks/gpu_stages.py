"""The stages of benchmarks.gpu: each fills its sheet with checks against the CPU and with times."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import parts, speed, step_cost
from benchmarks.rounds import relative, rounds
from diffusion.batches import Batch, Batches, batch_seed
from diffusion.checkpoint import weights_sha256, write_atomic
from diffusion.config import FitConfig, check_compiler
from diffusion.console import UserError
from diffusion.data import Dataset, ImageSpec
from diffusion.denoiser import Denoiser
from diffusion.machine import layout, this_device
from diffusion.model import Model
from diffusion.networks import UNetConfig
from diffusion.noise import Noise
from diffusion.samplers import SOLVERS
from diffusion.schedules import even
from diffusion.training import Average, fit
from distill import cd, midtraining, progressive, scm
from distill.frechet import Frechet, sums, with_frechet
from distill.scm import derivative
from distill.shared import angles_of
from eval import compare
from eval.measure import evaluate, features, inception, sets
from eval.measure.machine import full_float32
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.plans import Row
from eval.measure.quality import Judge
from eval.measure.race import race
from eval.results.store import Store
from teachers import ddpm
from teachers.ddpm import Denoising
from teachers.presets import preset

CPU = torch.device("cpu")
# What may differ from the CPU's result, at most, and why so much. Relative: |a - b| / |b| over all.
# On a CPU with its sums in another order (channels last, oneDNN off) Fashion-MNIST's network differs
# by 1e-6 in x0, 4e-6 in gradients, forward mode and samples, and in bf16 by 6e-3, 9e-3 and 1.5e-2:
# the bounds leave 5 to 100 times that for cuDNN's kernels, and a fault moves far more.
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


@dataclass(frozen=True)
class Job:
    """One stage to run, here: JSON between the processes."""

    stage: str
    path: str
    """The file of all results."""
    seconds: float
    shape: str
    batch_size: int
    small: bool
    inception: str | None = None


@dataclass
class Sheet:
    """What a stage has measured so far, on disk after every line; and what it measures it with."""

    job: Job
    tables: dict[str, list[dict]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def save(self, state: str = "cut short", **more) -> None:
        path, seconds = Path(self.job.path), time.monotonic() - self.begun
        whole = json.loads(path.read_text())
        stage = {"state": state, "seconds": seconds, **more, "tables": self.tables}
        whole["stages"] |= {self.job.stage: stage}
        write_atomic(path, json.dumps(whole, indent=1))

    def row(self, table: str, **cells) -> None:
        self.tables.setdefault(table, []).append(cells)
        self.save()

    def check(self, kind: str, measured: float, detail: str = "") -> None:
        bound, why = BOUNDS[kind]
        ok = bool(measured <= bound)  # not so of NaN
        cells = {"bound": bound, "measured": measured, "ok": ok, "why": why}
        self.row("checks", what=f"{kind}, {detail}" if detail else kind, **cells)

    def skip(self, what: str, why: str) -> None:
        self.row("left out", what=what, why=why)

    def switches(self, what: str, rates: dict[str, float], every: str) -> None:
        """images/s by variant; `every`: of what is on in the first."""
        for variant, rate in list(rates.items())[1:]:
            cells = {"on": rates[parts.ALL], "off": rate, "on / off": rates[parts.ALL] / rate}
            self.row("switches", what=what, switch=variant.removeprefix("without "), **cells)
        self.row("images per second", what=f"{what}, {every}", rate=rates[parts.ALL])

    @cached_property
    def device(self) -> torch.device:
        return this_device()

    @property
    def fast(self) -> str:
        return "fp32" if self.job.small else "bf16"

    @cached_property
    def net(self) -> UNetConfig:
        tiny = UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(4,))
        return tiny if self.job.small else replace(preset(self.job.shape).net, dropout=0.0)

    @cached_property
    def dataset(self) -> Dataset:
        """Made-up images of that shape, smooth ones: no time depends on them."""
        shape, random = (self.net.channels, self.net.size), torch.Generator().manual_seed(0)
        count = 400 if self.job.small else 11_000
        coarse = torch.rand(count, shape[0], 4, 4, generator=random)
        images = F.interpolate(coarse, size=shape[1], mode="bilinear").mul(255).round()
        spec = ImageSpec("made-up", *shape, 0, float(images.mean()), float(images.std()))
        train, test = images.to(torch.uint8).split([count - count // 11, count // 11])
        return Dataset(spec, train, None, test, None)

    def model(self, precision: str | None = None) -> Model:
        """An untrained teacher whose last layers are not zero, so that all of it counts."""
        model = parts.untrained(self.net, self.dataset, precision or self.fast)
        random = torch.Generator().manual_seed(0)
        for weight in model.denoiser.parameters():
            if weight.ndim > 1 and not weight.any():
                values = torch.randn(weight.shape, generator=random) / weight[0].numel() ** 0.5
                weight.copy_(values)
        return replace(model, sha256=weights_sha256(model.denoiser.net.state_dict()))

    def batch(self, device: torch.device, size: int = 16) -> Batch:
        """The same numbers on every device."""
        random = torch.Generator().manual_seed(1)
        x0 = self.dataset.spec.to_unit(self.dataset.train[:size])
        eps = torch.randn(x0.shape, generator=random)
        level = (torch.arange(size).double() + 0.5) / size
        return Batch(*(part.to(device) for part in (x0, eps, level)), label=None, seed=0)


def on(model: Model, device: torch.device, precision: str = "fp32", order=None) -> Model:
    """A copy there, in that device's layout unless told another order of memory."""
    order = order or (layout() if device.type == "cuda" else torch.contiguous_format)
    net = deepcopy(model.denoiser.net).to(device)
    return replace(model, denoiser=Denoiser(net, precision, order).eval().requires_grad_(False))


def far(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| over all elements."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def most(a: Tensor, b: Tensor) -> float:
    return float((a.detach().cpu().double() - b.detach().cpu().double()).abs().max())


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def passes(model: Model, batch: Batch, gradient: bool) -> tuple[Tensor, Tensor]:
    """x0, and the gradient of its mean square in every weight."""
    denoiser = model.denoiser.requires_grad_(gradient)
    x0 = denoiser(batch.eps, 0.2 + batch.level)
    if not gradient:
        return x0, x0
    denoiser.zero_grad()
    x0.square().mean().backward()
    return x0, flat(weight.grad for weight in denoiser.parameters())


def no_compiler(sheet: Sheet, what: str) -> bool:
    """Whether torch.compile cannot work here, which is then said in place of `what`."""
    try:
        check_compiler(True)
    except UserError as error:
        sheet.skip(what, str(error))
        return True
    return False


def numbers(sheet: Sheet) -> None:
    """Noise, batches and samplers."""
    device, dataset, spec = sheet.device, sheet.dataset, sheet.dataset.spec
    draws = [next(Noise(3, torch.arange(256).to(d), spec.shape)) for d in (CPU, device)]
    sheet.check("noise", most(*draws))
    config, worker = FitConfig(batch_size=32), SimpleNamespace(device=device)
    worker.num_processes, worker.process_index = 1, 0
    for kind, fits, home in (("pinned", False, CPU), ("resident", True, device)):
        with mock.patch("diffusion.batches._fits", lambda images, d, fits=fits: fits):
            x0 = Batches(dataset, config, worker).draw(5).x0
        random = torch.Generator(home).manual_seed(batch_seed(config.seed, 5))
        which = torch.randint(len(dataset.train), (32,), generator=random, device=home).cpu()
        sheet.check(f"{kind} batch", most(x0, spec.to_unit(dataset.train[which])))
    model, indices = sheet.model("fp32"), torch.arange(8)
    for sampler in SOLVERS.keys() - {"ancestral-learned"}:
        plan = sampler, SOLVERS[sampler].angles(model.schedule, 6)
        with full_float32():
            images = [on(model, d).x0(plan, 0, indices.to(d)) for d in (CPU, device)]
        sheet.check("sampler", most(*images), sampler)


def network(sheet: Sheet) -> None:
    """One network in every precision, layout and way to run it."""
    model, device = sheet.model("fp32"), sheet.device
    batch, there = sheet.batch(CPU), sheet.batch(device)
    x0, gradient = passes(on(model, CPU), batch, True)
    with full_float32():
        found, slope = passes(on(model, device), there, True)
        sheet.check("network, fp32", far(found, x0))
        sheet.check("gradient, fp32", far(slope, gradient))
        for order in (torch.contiguous_format, torch.channels_last):
            other, _ = passes(on(model, device, order=order), there, False)
            sheet.check("network, other layout", far(other, x0), str(order).split(".")[1])
    sheet.check("network, TF32", far(passes(on(model, device), there, False)[0], x0))
    rounded = on(model, device, "bf16")
    sheet.check("network, bf16", far(passes(rounded, there, False)[0], x0))
    moved = {}
    places = {"cpu": (on(model, CPU), batch), "fp32": (on(model, device), there)}
    for name, (one, b) in (places | {"bf16": (rounded, there)}).items():
        along = (b.x0, torch.ones_like(b.level))
        with full_float32():
            moved[name] = derivative(one.denoiser, (b.eps, 0.2 + b.level), along)[1]
    sheet.check("forward mode, fp32", far(moved["fp32"], moved["cpu"]))
    sheet.check("forward mode, bf16", far(moved["bf16"], moved["cpu"]))
    if no_compiler(sheet, "torch.compile and CUDA graphs"):
        return
    eager, compiled = on(model, device, sheet.fast), on(model, device, sheet.fast)
    compiled.denoiser.net.compile()
    pairs = list(zip(passes(compiled, there, True), passes(eager, there, True), strict=True))
    for kind, pair in zip(("network", "gradient"), pairs, strict=True):
        sheet.check(f"{kind}, compiled", far(*pair))
    graphs = on(model, device, sheet.fast)
    graphs.denoiser.compile_network()
    plan, indices = model.plan(4, "ddim"), torch.arange(8, device=device)
    images = [graphs.x0(plan, seed, indices) for seed in (0, 0, 0)]  # warmed, recorded, replayed
    before = images[-1].clone()
    graphs.x0(plan, 1, indices)
    sheet.check("images kept over later calls", most(images[-1], before))
    sheet.check("4 calls, compiled for sampling", far(before, eager.x0(plan, 0, indices)))


def training(sheet: Sheet) -> None:
    """Every objective's loss and gradient, and what moves the weights."""
    model, device = sheet.model("fp32"), sheet.device
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for place in (CPU, device):
        teacher, batch = on(model, place), sheet.batch(place)
        student = on(model, place).denoiser.requires_grad_(True).train()
        with full_float32():
            for row in step_cost.rows(teacher, student):
                student.zero_grad()
                loss = row.objective(student, batch, 0.5).mean()
                loss.backward()
                slope = flat(weight.grad for weight in student.net.parameters())
                found.setdefault(row.name, []).append((loss, slope))
    for name, ((loss, slope), (loss_there, slope_there)) in found.items():
        sheet.check("loss", far(loss_there, loss), name)
        sheet.check("loss gradient", far(slope_there, slope), name)
    begun, moved, kept = flat(model.denoiser.parameters()).cpu(), [], []
    for place, fused in ((CPU, False), (device, True)):
        student, average = (on(model, place).denoiser.requires_grad_(True) for _ in range(2))
        options = {"betas": (0.9, 0.99), "fused": fused, "foreach": False}
        optimizer = torch.optim.AdamW(student.parameters(), 1e-3, **options)
        random = torch.Generator().manual_seed(2)
        for done in range(3):
            for weight in student.parameters():
                weight.grad = torch.empty_like(weight)  # in the weight's own layout
                weight.grad.copy_(torch.randn(weight.shape, generator=random))
            optimizer.step()
            Average(average, lambda done, progress: 0.9, fused).follow(student, done)
        moved.append(flat(student.parameters()).cpu() - begun)
        kept.append(flat(average.parameters()).cpu() - begun)
    sheet.check("fused AdamW", far(moved[1], moved[0]))
    sheet.check("fused average", far(kept[1] + begun, kept[0] + begun))
    config = FitConfig(iterations=10, batch_size=32, warmup=2, anneal="none", log_every=5)
    config = replace(config, precision=sheet.fast, save_every=0.0)

    def trained(compiled: bool, *stops: int) -> tuple[Tensor, float]:
        """The change of all weights, and the last loss; at a stop the state is saved and read."""
        with TemporaryDirectory() as folder:
            for stop in (*stops, 10):
                student = on(model, device, sheet.fast).denoiser.requires_grad_(True)
                aim = Denoising(model.schedule.to(device))
                chosen = replace(config, compile=compiled)
                loop = fit(student, aim, sheet.dataset, chosen, Path(folder, "state"))
                with closing(loop):
                    last = next(line for line in loop if line.iteration == stop)
                    if stop == 10:
                        next(loop, None)  # to its end: the averaged weights
        return flat(student.parameters()).cpu() - begun, last.loss

    (whole, loss), (resumed, _) = trained(False), trained(False, 5)
    sheet.check("resumed training", far(resumed, whole))
    if not no_compiler(sheet, "compiled training"):
        sheet.check("compiled training", abs(trained(True)[1] / loss - 1))


def frechet(sheet: Sheet) -> None:
    """The Fréchet term: its map and distance, and what it adds to a training step."""
    device, dim = sheet.device, 32 if sheet.job.small else 1024
    random = torch.Generator().manual_seed(0)
    real = torch.randn(4 * dim, dim, generator=random) @ torch.randn(dim, dim, generator=random)
    made = []
    for place in (CPU, device):
        term = Frechet(sums(real.to(place)), 784)
        term((0.9 * real + 0.3 * real.roll(1, 0)).to(place))
        term.follow(nn.Identity(), 1)
        term.update()
        made.append(term)
    sheet.check("Frechet map", far(made[1].map, made[0].map))
    sheet.check("Frechet distance", far(made[1].distance, made[0].distance))
    model, calls = sheet.model(), {}
    for name, weight in (("without", 0.0), ("with", 0.1)):
        student = on(model, device, sheet.fast).denoiser.requires_grad_(True).train()
        aim = cd.objective(cd.Loss(), model.denoiser, student, angles_of(model))
        aim = with_frechet(aim, weight, model, sheet.dataset, FitConfig())
        batch = sheet.batch(device, sheet.job.batch_size)

        def steps(student=student, aim=aim, batch=batch) -> None:
            for done in range(8, 16):  # one of eight makes a new map
                aim(student, batch, 0.5).mean().backward()
                for average in aim.averages:
                    average.follow(student, done)

        calls[name] = steps
    took = rounds(calls, 3, device)
    rates = {n: 8 * sheet.job.batch_size / sorted(s)[1] for n, s in took.items()}
    slower = relative(took["with"], took["without"])
    cells = {"on": rates["with"], "off": rates["without"], "on / off": 1 / slower}
    sheet.row("switches", what="consistency step", switch="Fréchet term", **cells)


def extractor(sheet: Sheet, device: torch.device) -> features.Extractor:
    """clean-fid's Inception where its file was named, else an untrained one: the same time."""
    if sheet.job.inception:
        return features.extractor("inception", sheet.dataset, device, Path(sheet.job.inception))
    if sheet.job.small:
        return features.extractor("random", sheet.dataset, device)
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    net = inception_v3(weights=None, init_weights=False, aux_logits=False)
    net.fc = nn.Identity()

    def scaled(images: Tensor) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return inception.resize(images, pool) / 127.5 - 1

    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(scaled(sheet.dataset.train[:32]))  # else its features would all but vanish
    net = net.eval().to(device)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        with full_float32():
            return torch.cat([net(scaled(part)) for part in images.split(inception.BATCH)])

    sha256 = weights_sha256(net.state_dict())
    return features.Extractor("fd-untrained-inception", sha256, inception.DIM, extract)


def distances(sheet: Sheet) -> None:
    """Features, and the distances that are made of them."""
    images, device = sheet.dataset.test[:64], sheet.device
    there, here = (extractor(sheet, d).extract(images.to(d)) for d in (device, CPU))
    sheet.check("features", far(there, here))
    dim = 64 if sheet.job.small else 2048
    random = torch.Generator().manual_seed(0)
    a = torch.randn(2 * dim, dim, generator=random) @ torch.randn(dim, dim, generator=random)
    a /= dim**0.5
    b, found = 0.8 * a.roll(1, 1) + 0.1, {}
    for place in (CPU, device):
        x, y = a.to(place), b.to(place)
        begun = time.perf_counter()
        fd = frechet_distance(Moments.of(x), Moments.of(y))
        took = time.perf_counter() - begun
        sheet.row("seconds", what=f"FD at {dim} dimensions on {place.type}", seconds=took)
        wasserstein = sets.sliced_wasserstein(x, y, 16, torch.Generator().manual_seed(0))
        found[place] = torch.tensor([fd, sets.kid(x, y), wasserstein], dtype=torch.float64)
    fd, kid, wasserstein = zip(found[CPU], found[device], strict=True)
    sheet.check("FD", far(*fd[::-1]))
    sheet.check("KID", most(*kid))
    sheet.check("sliced Wasserstein", far(*wasserstein[::-1]))


def line(sheet: Sheet) -> None:
    """The commands themselves on digits: teacher, students of four kinds, and their comparison."""
    short = 20 if sheet.job.small else 200
    with TemporaryDirectory() as folder:
        home = Path(folder)
        base = ddpm.Options.default("digits")
        config = replace(base.fit, iterations=short, minutes=None, batch_size=64)
        config = replace(config, precision=sheet.fast)
        net = replace(base.net, width=8) if sheet.job.small else base.net
        ddpm.train_teacher(replace(base, net=net, fit=config, out=home / "teacher"))
        told = {"teacher": home / "teacher", "fit": config}
        progressive.distill(progressive.Options(**told, start_steps=8, rounds=(4, 1)))
        midtraining.distill(midtraining.Options(**told, solver_steps=4))
        cd.distill(cd.Options(**told, out=home / "consistency-cd", loss=cd.Loss(frechet=0.1)))
        scm.distill(scm.Options(**told, out=home / "consistency-scm"))
        many = 300 if sheet.job.small else 1024
        asked = compare.Options((home,), steps="1", long=False, num_images=many, seeds=(0,))
        asked = replace(asked, features="random", precision=sheet.fast, likelihood=2, times=False)
        records = compare.compare(asked)
    for record in records:
        sheet.check("a whole line", record.score, f"{record.title} at {record.nfe}")


COMPILING = ("torch.compile", "CUDA graphs")


def turns(sheet: Sheet, every: dict) -> Iterator[tuple[str, dict[str, frozenset[str]]]]:
    """Variants that compile nothing first, which take no minutes; then what compiling adds."""
    off = parts.absent(sheet.device, True)
    yield "all but torch.compile on", parts.variants(every, {**off, **dict.fromkeys(COMPILING)})
    if not no_compiler(sheet, "torch.compile"):
        names = {parts.ALL, *(f"without {name}" for name in COMPILING)}
        whole = parts.variants(every, off)
        yield "everything on", {name: on for name, on in whole.items() if name in names}


def switches_in_training(sheet: Sheet) -> None:
    """benchmarks.speed's training, with each part of the speed off in turn."""
    small, model = sheet.job.small, sheet.model()
    options = speed.Options(repeats=1 if small else 3)
    told = replace(preset(sheet.job.shape).teacher, batch_size=sheet.job.batch_size)
    told = parts.endless(replace(told, log_every=2 if small else 10, precision=sheet.fast))
    for name in ("teacher",) if small else speed.OBJECTIVES:
        for every, variants in turns(sheet, parts.TRAINING):
            cells = speed.time_training(model, name, sheet.dataset, told, options, variants)
            rates = {variant: cell["images_per_second"] for variant, cell in cells.items()}
            sheet.switches(f"{name} training", rates, every)


def switches_in_sampling(sheet: Sheet) -> None:
    """4 calls from noise to uint8, with each part of the speed off in turn."""
    model, budget = sheet.model(), 0.2 if sheet.job.small else 1.0
    for every, variants in turns(sheet, parts.SAMPLING):
        models = parts.sampling_models(model, variants)
        for size in (1, sheet.job.batch_size):
            calls = {variant: sampling(other, 4, size) for variant, other in models.items()}
            laps = {lap.key: lap.timing for lap in race(calls, size, sheet.device, budget)}
            rates = {variant: timing.images_per_second for variant, timing in laps.items()}
            sheet.switches(f"4 calls, batch {size}", rates, every)


def sampling(model: Model, calls: int, size: int) -> Callable[[], Tensor]:
    plan = "ddim", even(model.schedule, calls)
    return partial(evaluate.sample, Row(Path("made-up"), model, *plan, own=False), size)


def peer(sheet: Sheet) -> None:
    """diffusers' and accelerate's loops beside ours."""
    if not importlib.util.find_spec("diffusers"):
        sheet.skip("the peer", "diffusers is not installed: pip install -e '.[bench]'")
        return
    from benchmarks import peer

    small, size = sheet.job.small, sheet.job.batch_size
    model, unet = sheet.model(), peer.peer_network(sheet.net).to(sheet.device)
    steps = 2 if small else 10
    options = peer.Options(batch_size=size, precision=sheet.fast, training_steps=steps, repeats=3)
    config = parts.endless(preset(sheet.job.shape).teacher)
    config = replace(config, precision=sheet.fast, batch_size=size, log_every=steps)

    def row(what: str, images: int, seconds: dict[str, list[float]]) -> None:
        ours, theirs = (images / sorted(seconds[who])[1] for who in ("ours", "diffusers"))
        ratio = relative(seconds["diffusers"], seconds["ours"])
        sheet.row("peer", what=what, ours=ours, diffusers=theirs, **{"ours / theirs": ratio})

    row("training", size * steps, peer.time_training(model, unet, sheet.dataset, config, options))
    unet = peer.peer_network(sheet.net).to(sheet.device).eval()
    for sampler, calls in [("ddim", 4), ("ddim", 50)]:
        took = peer.time_sampling(model, unet, sampler, calls, options)
        row(f"{sampler}, {calls} steps", size, took)


def images(sheet: Sheet) -> None:
    """50,000 images at 1, 2 and 4 calls, through the harness to a Fréchet distance."""
    device, size, model = sheet.device, sheet.job.batch_size, sheet.model()
    own = extractor(sheet, device)
    judge = Judge.of(sheet.dataset, own, features.random_network(sheet.dataset, device), device)
    count = 300 if sheet.job.small else 50_000
    if not sheet.job.small and not no_compiler(sheet, "torch.compile"):
        model.denoiser.compile_network()
    settings = {"num_images": count, "long_images": count, "seeds": (0,), "batch_size": size}
    settings |= {"precision": sheet.fast, "compile": False, "times": False, "sweep": False}
    settings |= {"likelihood": 0, "floors": {count: judge.floor(count, 2)}, "held_out": {count: {}}}
    bench = evaluate.Bench(judge, **settings)
    with TemporaryDirectory() as folder:
        store = Store.open(Path(folder))
        for calls in (1, 2, 4):
            call = sampling(model, calls, size)
            *_, lap = race({calls: call}, size, device, budget=1.0)
            begun = time.monotonic()
            ((record,), refused) = evaluate.measure_rows(bench, [call.args[0]], store)
            assert not refused
            took = time.monotonic() - begun
            cells = {"images": count, "made per second": lap.timing.images_per_second}
            cells |= {"seconds with FD": took, f"{own.name}, {own.dim} dims": record.score}
            sheet.row("images", calls=calls, **cells)


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


def main(job: Job) -> None:
    """Run the stage here, and leave its sheet on disk."""
    torch._dynamo.config.cache_size_limit = 64  # variants of one network, of which 8 are usual
    sheet = Sheet(job)
    STAGES[job.stage][0](sheet)
    sheet.save("done")


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
