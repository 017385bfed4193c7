"""Guidance: what it is in closed form, and a network that makes it in one call."""

import math
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion import codec, networks
from diffusion.batches import Batches
from diffusion.checkpoint import Card
from diffusion.circle import FROM_X0, add_noise
from diffusion.condition import Guidance as Weight
from diffusion.condition import Kinds, Label, to_json
from diffusion.console import UserError
from diffusion.denoiser import Denoiser, DenoiserConfig, guide
from diffusion.images import InMemory
from diffusion.machine import this_device
from diffusion.model import Model, build, load
from diffusion.networks import UNetConfig
from diffusion.plan import plan
from diffusion.runs import train_model
from diffusion.schedules import cosine
from diffusion.training import fit, one_network
from distill import guidance, progressive
from distill.guidance import Guidance, with_guidance_input
from eval import compare
from eval.results import jsonl
from students import generate
from teachers.ddpm import Denoising
from tests.analytic import BIMODAL, Gaussian, normal, random_unet

close = torch.testing.assert_close
WEIGHTS = torch.tensor([1.0, 1.5, 3.0, 4.0])
ANGLES = torch.tensor([0.1, 0.7, 1.2, 1.5], dtype=torch.float64)
NET = UNetConfig(width=8, multipliers=(1,), blocks=1, attention=())
CLASSED: Kinds = {"label": Label(10)}
GUIDED: Kinds = CLASSED | {"guidance": Weight(1.0, 4.0)}
CLASSES = [Gaussian(m, s) for m, s in zip(BIMODAL.means, BIMODAL.scales, strict=True)]


class TwoClasses(nn.Module):
    """The exact velocity for BIMODAL, whose components are the two classes; it counts its work."""

    def __init__(self):
        super().__init__()
        self.calls, self.images = 0, 0

    def forward(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.calls, self.images = self.calls + 1, self.images + len(x_t)
        label = condition["label"]
        every = torch.stack([data(x_t, t) for data in (*CLASSES, BIMODAL)])
        return FROM_X0["v"](x_t, every[label, torch.arange(len(label))], t)


def two_classes() -> Denoiser:
    return Denoiser(TwoClasses(), kinds={"label": Label(2)})


def random_denoiser(kinds: Kinds, prediction: str = "v") -> Denoiser:
    net = random_unet(1, kinds, **vars(NET))
    return Denoiser(net, config=DenoiserConfig(prediction), kinds=kinds)


def log_density(x_t: Tensor, t: Tensor, components: list[int]) -> Tensor:
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    terms = []
    for i in components:
        normal = torch.distributions.Normal(
            cos * BIMODAL.means[i], (cos**2 * BIMODAL.scales[i] ** 2 + sin**2).sqrt()
        )
        terms.append(normal.log_prob(x_t) + math.log(BIMODAL.weights[i]))
    return torch.stack(terms).logsumexp(0)


def test_guided_x0_is_tweedies_of_the_density_that_guidance_sharpens():
    """log p_w = log p + w (log p(. | c) - log p), its gradient by autograd."""
    label = torch.tensor([0, 1, 1, 0])
    x_t = normal(0, 4, 1).double().requires_grad_()
    conditional = torch.stack(
        [log_density(x_t[i : i + 1], ANGLES[i : i + 1], [int(c)])[0] for i, c in enumerate(label)]
    )
    marginal = log_density(x_t, ANGLES, [0, 1])
    sharpened = marginal + WEIGHTS[:, None] * (conditional - marginal)
    (score,) = torch.autograd.grad(sharpened.sum(), x_t)
    exact = (x_t + ANGLES.sin()[:, None] ** 2 * score) / ANGLES.cos()[:, None]
    images = x_t.detach().float()[..., None, None]
    guided = two_classes()(images, ANGLES, {"label": label, "guidance": WEIGHTS})
    close(guided[..., 0, 0].double(), exact.detach(), rtol=1e-4, atol=1e-4)


def test_guidance_is_affine_in_its_weight_and_exact_at_0_and_1():
    conditional, unconditional = normal(0, 4, 1, 8, 8), normal(1, 4, 1, 8, 8)
    ones = torch.ones(4)
    assert torch.equal(guide(conditional, unconditional, ones), conditional)
    assert torch.equal(guide(conditional, unconditional, 0 * ones), unconditional)
    steps = [guide(conditional, unconditional, w * ones) for w in (1.5, 2.5, 3.5)]
    close(steps[2] - steps[1], steps[1] - steps[0], rtol=1e-5, atol=1e-5)


def test_guidance_towards_no_class_is_none_at_any_weight():
    denoiser, unknown = two_classes(), {"label": torch.full((4,), 2)}
    x_t = normal(0, 4, 1, 2, 2)
    plain = denoiser(x_t, ANGLES, unknown)
    assert torch.equal(denoiser(x_t, ANGLES, unknown | {"guidance": WEIGHTS}), plain)


def test_guidance_is_one_call_of_twice_the_batch():
    denoiser, label = two_classes(), torch.tensor([0, 1, 1, 0])
    denoiser(normal(0, 4, 1, 2, 2), ANGLES, {"label": label, "guidance": WEIGHTS})
    assert (denoiser.net.calls, denoiser.net.images) == (1, 8)


class Counted(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.images = net, 0

    def forward(self, x_t: Tensor, *others: Tensor) -> Tensor:
        self.images += len(x_t)
        return self.net(x_t, *others)


def model_of(kinds: Kinds, own: float | None = None) -> Model:
    """A model with random weights, of 4 ddim steps."""
    card = Card(
        method="teacher",
        plans=(plan("ddim", cosine(4), own),),
        abilities=("denoise",),
        net=networks.to_json(NET),
        denoiser=DenoiserConfig().to_json(),
        condition=to_json(kinds),
        codec={"name": "scale", "mean": 80, "std": 96},
        data={"name": "digits", "channels": 1, "size": 8},
    )
    return Model(random_denoiser(kinds).eval().requires_grad_(False), card, "")


@pytest.mark.parametrize(
    ("kinds", "own", "weight", "per_step"),
    [
        (CLASSED, None, None, 1),
        (CLASSED, None, 1.0, 1),
        (CLASSED, None, 2.0, 2),
        (CLASSED, 2.0, None, 2),
        (GUIDED, None, 2.0, 1),
        (GUIDED, 2.0, None, 1),
        (GUIDED, 2.0, 1.0, 1),
    ],
)
def test_a_guided_teacher_costs_2_calls_a_step_and_a_guided_student_1(kinds, own, weight, per_step):
    model, indices = model_of(kinds, own), torch.arange(3)
    model.denoiser.net = Counted(model.denoiser.net)
    asked = model.plan(guidance=weight)
    model.x0(asked, 0, indices, {"label": indices})
    assert model.denoiser.net.images == 3 * 4 * per_step
    assert model.calls_per_step(asked) == per_step


def test_a_model_samples_at_its_cards_weight_unless_told_another():
    model, indices = model_of(CLASSED, own=2.0), torch.arange(3)
    images = {
        weight: model.x0(model.plan(guidance=weight), 0, indices) for weight in (None, 1.0, 2.0)
    }
    assert torch.equal(images[None], images[2.0])
    assert not torch.equal(images[None], images[1.0])
    plain = model_of(CLASSED)
    assert torch.equal(plain.x0(plain.plan(), 0, indices), images[1.0])


@pytest.mark.parametrize(
    ("kinds", "weight"),
    [
        (GUIDED, 0.5),
        (GUIDED, 4.5),
        (CLASSED, -1.0),
        (CLASSED, math.nan),
        (CLASSED, math.inf),
    ],
)
def test_a_weight_that_the_model_cannot_be_guided_by_is_an_error(kinds, weight):
    with pytest.raises(UserError, match="--guidance must be from"):
        model_of(kinds).plan(guidance=weight)


def test_guidance_of_a_model_without_classes_is_an_error():
    with pytest.raises(UserError, match="--guidance needs a model with classes"):
        model_of({}).plan(guidance=2.0)


@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_a_student_with_a_guidance_input_begins_as_its_teacher_exactly(prediction):
    teacher = random_denoiser(CLASSED, prediction)
    student = with_guidance_input(teacher, teacher.net.config, (1.0, 4.0), seed=0)
    x_t, label = normal(0, 4, 1, 8, 8), {"label": torch.tensor([0, 9, 10, 4])}
    expected = teacher(x_t, ANGLES, label)
    assert student.kinds == GUIDED
    assert torch.equal(student(x_t, ANGLES, label | {"guidance": WEIGHTS}), expected)
    assert torch.equal(student(x_t, ANGLES, label), expected)


def test_without_a_weight_a_trained_guidance_input_is_told_1():
    denoiser, label = random_denoiser(GUIDED), {"label": torch.arange(4)}
    x_t = normal(0, 4, 1, 8, 8)
    plain, one, more = (
        denoiser(x_t, ANGLES, label | further)
        for further in ({}, {"guidance": WEIGHTS**0}, {"guidance": WEIGHTS + 0.5})
    )
    assert torch.equal(plain, one)
    assert (more - one).abs().max() > 1e-3


def batches(dataset, config, kinds, rank: int = 0, world: int = 1) -> Batches:
    worker = SimpleNamespace(device=torch.device("cpu"), process_index=rank, num_processes=world)
    return Batches(dataset, config, worker, kinds)


def test_weights_fill_their_range_and_change_nothing_else_of_a_batch(digits, quick):
    with_weight = batches(digits, quick, GUIDED).draw(7)
    without = batches(digits, quick, CLASSED).draw(7)
    assert (with_weight.condition.keys(), without.condition.keys()) == (
        GUIDED.keys(),
        CLASSED.keys(),
    )
    pairs = [with_weight.condition["label"]], [without.condition["label"]]
    for batch, parts in zip((with_weight, without), pairs, strict=True):
        parts += [batch.x0, batch.eps, batch.level, torch.tensor(batch.seed)]
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a, b)
    weights = torch.cat(
        [batches(digits, quick, GUIDED).draw(i).condition["guidance"] for i in range(64)]
    )
    exact = torch.distributions.Uniform(1.0, 4.0).cdf(weights.sort().values)
    steps = torch.arange(len(weights)) / len(weights)
    assert (exact - steps).abs().max() < 1.63 / len(weights) ** 0.5  # Kolmogorov, 1 %


def test_two_processes_draw_the_weights_that_one_draws(digits, quick):
    one = batches(digits, quick, GUIDED).draw(3).condition
    shares = [batches(digits, quick, GUIDED, rank, 2).draw(3).condition for rank in range(2)]
    for name in GUIDED:
        both = torch.stack([share[name] for share in shares], 1)
        assert torch.equal(both.flatten(), one[name])


def test_data_without_classes_cannot_train_a_guidance_input(digits, quick):
    with pytest.raises(UserError, match="none"):
        batches(replace(digits, train=InMemory(digits.train.images), kinds={}), quick, GUIDED)


@dataclass(frozen=True)
class Distance:
    """RMS distance of a student to the teacher's guided x0, on held-out images at one weight."""

    teacher: Denoiser
    images: Tensor
    labels: Tensor

    @torch.no_grad()
    def __call__(self, student: Denoiser, weight: float) -> float:
        t = torch.linspace(0.3, 1.5, len(self.images), dtype=torch.float64)
        x_t = add_noise(self.images, normal(5, *self.images.shape), t)
        condition = {"label": self.labels, "guidance": torch.full((len(t),), weight)}
        gap = student(x_t, t, condition) - self.teacher(x_t, t, condition)
        return float(gap.square().mean().sqrt())


def test_distillation_brings_the_student_near_the_guided_teacher_at_every_weight(
    tmp_path, digits, quick
):
    teacher = random_denoiser(CLASSED).eval().requires_grad_(False)
    teacher.net.classes.weight *= 10
    student = with_guidance_input(teacher, teacher.net.config, (1.0, 4.0), seed=0)
    images, condition = digits.test.take(torch.arange(64))
    distance = Distance(teacher, digits.codec.encode(images), condition["label"])
    before = [distance(student, weight) for weight in (2.0, 3.0, 4.0)]
    config = replace(quick, iterations=150, learning_rate=1e-2, ema=0.98)
    objective = Guidance(teacher.to(this_device()), cosine(64).to(this_device()))
    list(fit(one_network(student, objective), digits, config, tmp_path / "state"))
    student.cpu(), teacher.cpu()
    after = [distance(student, weight) for weight in (2.0, 3.0, 4.0)]
    assert max(a / b for a, b in zip(after, before, strict=True)) < 1 / 3


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, digits, quick):
    """A finished conditional teacher of 8 steps."""
    run, angles = tmp_path_factory.mktemp("guidance") / "teacher", cosine(8)
    card = Card(
        method="teacher",
        plans=(plan("ancestral", angles),),
        abilities=("denoise",),
        net=networks.to_json(NET),
        denoiser=DenoiserConfig().to_json(),
        condition=to_json(CLASSED),
        codec=codec.to_json(digits.codec),
        data=asdict(digits.spec),
    )
    torch.manual_seed(0)
    denoiser = build(NET, DenoiserConfig(), CLASSED, "fp32")
    method = one_network(denoiser, Denoising(angles.to(this_device())))
    train_model(run, method, digits, quick, card)
    return run


@pytest.fixture(scope="module")
def guided(conditional, quick):
    guidance.distill(guidance.Options(teacher=conditional, own_guidance=2.0, fit=quick))
    return conditional.parent / "guided"


def test_a_guided_student_samples_as_its_teacher_does_and_halves(conditional, guided, quick):
    teacher, student = load(conditional), load(guided)
    assert student.card.plans == tuple(own.guided(2.0) for own in teacher.card.plans)
    assert (student.card.sampler, student.solvers) == ("ancestral", teacher.solvers)
    assert (student.kinds, student.card.guidance) == (GUIDED, 2.0)
    assert student.card.parent == teacher.sha256
    options = progressive.Options(teacher=guided, start_steps=8, end_steps=4, fit=quick)
    (halved,) = progressive.distill(options)
    assert (halved.kinds, halved.card.guidance) == (GUIDED, 2.0)
    assert halved.calls_per_step(halved.plan()) == 1
    assert (student.card.shifted, halved.card.shifted) == (False, True)
    indices = torch.arange(4, device=halved.device)
    images = [halved.x0(halved.plan(guidance=w), 0, indices) for w in (None, 2.0, 4.0)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.fixture
def training(tmp_path, digits, quick):
    def begin(name: str):
        teacher = random_denoiser(CLASSED).to(this_device()).requires_grad_(False)
        student = with_guidance_input(teacher, teacher.net.config, (1.0, 4.0), seed=0)
        objective = Guidance(teacher, cosine(8).to(this_device()))
        config = replace(quick, save_every=0.0)
        method = one_network(student, objective)
        return student, fit(method, digits, config, tmp_path / f"{name}.safetensors")

    return begin


def test_distillation_stopped_and_resumed_ends_with_the_same_weights_bit_for_bit(training):
    whole, loop = training("whole")
    list(loop)
    _, loop = training("stopped")
    assert [next(loop).iteration, next(loop).iteration] == [5, 10]
    loop.close()
    resumed, loop = training("stopped")
    assert next(loop).iteration >= 5
    list(loop)
    close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("weight", ["1", "2.5"])
def test_generate_guides_a_teacher_and_its_student(command, tmp_path, conditional, guided, weight):
    images, said = {}, {}
    for run in (conditional, guided):
        out = tmp_path / f"{run.name}.npz"
        outcome = command(generate.main, run, "--guidance", weight, "--num", 3, "--out", out)
        assert outcome.code == 0
        said[run], images[run] = outcome.out, np.load(out, allow_pickle=False)["images"]
    assert ("of 2 network calls" in said[conditional]) == (weight != "1")
    assert "of 2 network calls" not in said[guided]
    assert images[guided].shape == images[conditional].shape == (3, 8, 8, 1)


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (generate, "guided --guidance 5", ["--guidance", "from 1 to 4", "5"]),
        (generate, "teacher --guidance -1", ["--guidance", "-1"]),
        (guidance, "guided", ["an input already"]),
        (guidance, "teacher --guidance 2 4", ["--guidance", "2 4"]),
        (guidance, "teacher --guidance 1 1", ["--guidance", "1 1"]),
        (guidance, "teacher --own-guidance 5", ["--own-guidance", "5"]),
        (guidance, "missing", ["no checkpoint", "missing"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(command, tmp_path, guided, main, arguments, words):
    run, *rest = arguments.split()
    flag = ["--teacher"] if main is guidance else []
    outcome = command(main.main, *flag, guided.parent / run, "--out", tmp_path / "x.png", *rest)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words)


def test_a_teacher_without_classes_cannot_be_distilled(command, teacher, tmp_path):
    outcome = command(guidance.main, "--teacher", teacher, "--out", tmp_path / "x")
    assert outcome.code == 2
    assert "--num-classes" in outcome.err


def test_each_weight_is_a_row_of_its_own_in_one_table(conditional, guided, tmp_path, command):
    settings = "--guidance 1 2 --steps 4 --solvers ddim --no-long --no-times --num-images 80"
    settings += " --features random --likelihood 0"
    done = command(compare.main, conditional, guided, *settings.split(), "--out", tmp_path)
    assert done.code == 0, done.err
    rows = jsonl.read(tmp_path / "results.jsonl")
    calls = {(row.method, row.steps, row.guidance): row.nfe for row in rows}
    halves = {("teacher", 4, 1): 4, ("teacher", 4, 2): 8, ("guided", 4, 1): 4, ("guided", 4, 2): 4}
    assert calls == halves | {("guided", 8, 1): 8, ("guided", 8, 2): 8}
    assert len({row.tag for row in rows}) == len(rows)
    lines = (tmp_path / "table.md").read_text().splitlines()
    cells = "".join(line for line in lines if line.startswith("|"))
    assert cells.count("[guidance 1]") == cells.count("[guidance 2]") > 0
