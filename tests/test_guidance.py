"""Guidance: what it is in closed form, and a network that makes it in one call."""

import math
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion.batches import Batches
from diffusion.checkpoint import Card
from diffusion.circle import FROM_X0, add_noise
from diffusion.console import UserError
from diffusion.denoiser import Condition, Denoiser, guide
from diffusion.model import Model, build, load, this_device
from diffusion.networks import UNetConfig
from diffusion.runs import train_model
from diffusion.schedules import cosine
from diffusion.training import fit
from distill import guidance, progressive
from distill.guidance import Guidance, with_guidance_input
from students import generate
from teachers.ddpm import SOLVERS, Denoising
from tests.analytic import BIMODAL, Gaussian, normal, random_unet

close = torch.testing.assert_close
WEIGHTS = torch.tensor([1.0, 1.5, 3.0, 4.0])
ANGLES = torch.tensor([0.1, 0.7, 1.2, 1.5], dtype=torch.float64)
NET = UNetConfig(width=8, multipliers=(1,), blocks=1, attention=(), num_classes=10)
CLASSES = [Gaussian(m, s) for m, s in zip(BIMODAL.means, BIMODAL.scales, strict=True)]


class TwoClasses(nn.Module):
    """The exact velocity for BIMODAL, whose components are the two classes; it counts its work."""

    config = UNetConfig(num_classes=2)

    def __init__(self):
        super().__init__()
        self.calls, self.images = 0, 0

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.calls, self.images = self.calls + 1, self.images + len(x_t)
        every = torch.stack([data(x_t, t) for data in (*CLASSES, BIMODAL)])
        return FROM_X0["v"](x_t, every[label, torch.arange(len(label))], t)


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
    guided = Denoiser(TwoClasses())(images, ANGLES, Condition(label, WEIGHTS))
    close(guided[..., 0, 0].double(), exact.detach(), rtol=1e-4, atol=1e-4)


def test_guidance_is_affine_in_its_weight_and_exact_at_0_and_1():
    conditional, unconditional = normal(0, 4, 1, 8, 8), normal(1, 4, 1, 8, 8)
    ones = torch.ones(4)
    assert torch.equal(guide(conditional, unconditional, ones), conditional)
    assert torch.equal(guide(conditional, unconditional, 0 * ones), unconditional)
    steps = [guide(conditional, unconditional, w * ones) for w in (1.5, 2.5, 3.5)]
    close(steps[2] - steps[1], steps[1] - steps[0], rtol=1e-5, atol=1e-5)


def test_guidance_towards_no_class_is_none_at_any_weight():
    denoiser, unknown = Denoiser(TwoClasses()), torch.full((4,), 2)
    x_t = normal(0, 4, 1, 2, 2)
    plain = denoiser(x_t, ANGLES, unknown)
    assert torch.equal(denoiser(x_t, ANGLES, Condition(unknown, WEIGHTS)), plain)


def test_guidance_is_one_call_of_twice_the_batch():
    denoiser, label = Denoiser(TwoClasses()), torch.tensor([0, 1, 1, 0])
    denoiser(normal(0, 4, 1, 2, 2), ANGLES, Condition(label, WEIGHTS))
    assert (denoiser.net.calls, denoiser.net.images) == (1, 8)


class Counted(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.images = net, 0

    def forward(self, x_t: Tensor, *others: Tensor) -> Tensor:
        self.images += len(x_t)
        return self.net(x_t, *others)


def model_of(net: UNetConfig, own: float | None = None) -> Model:
    """A model with random weights, of 4 ddim steps."""
    denoiser = build(net, "fp32")
    denoiser.net.load_state_dict(random_unet(**vars(net)).state_dict())
    spec = {"name": "digits", "channels": 1, "size": 8, "num_classes": 10, "mean": 80, "std": 96}
    plans = {4: cosine(4).tolist()}
    card = Card("teacher", "ddim", plans, ("ddim",), vars(net), spec, guidance=own)
    return Model(denoiser.eval().requires_grad_(False), card, "")


GUIDED = replace(NET, guidance=(1.0, 4.0))


@pytest.mark.parametrize(
    ("net", "own", "weight", "per_step"),
    [
        (NET, None, None, 1),
        (NET, None, 1.0, 1),
        (NET, None, 2.0, 2),
        (NET, 2.0, None, 2),
        (GUIDED, None, 2.0, 1),
        (GUIDED, 2.0, None, 1),
        (GUIDED, 2.0, 1.0, 1),
    ],
)
def test_a_guided_teacher_costs_2_calls_a_step_and_a_guided_student_1(net, own, weight, per_step):
    model, indices = model_of(net, own), torch.arange(3)
    model.denoiser.net = Counted(model.denoiser.net)
    model.x0(model.plan(), 0, indices, indices, weight)
    assert model.denoiser.net.images == 3 * 4 * per_step
    assert model.calls_per_step(weight) == per_step


def test_a_model_samples_at_its_cards_weight_unless_told_another():
    model, indices = model_of(NET, own=2.0), torch.arange(3)
    images = {
        weight: model.x0(model.plan(), 0, indices, indices, weight) for weight in (None, 1.0, 2.0)
    }
    assert torch.equal(images[None], images[2.0])
    assert not torch.equal(images[None], images[1.0])
    plain = replace(model, card=replace(model.card, guidance=None))
    assert torch.equal(plain.x0(plain.plan(), 0, indices, indices), images[1.0])


@pytest.mark.parametrize(("net", "weight"), [(GUIDED, 0.5), (GUIDED, 4.5), (NET, -1.0), (NET, math.nan), (NET, math.inf)])  # fmt: skip
def test_a_weight_that_the_model_cannot_be_guided_by_is_an_error(net, weight):
    with pytest.raises(UserError, match="--guidance must be from"):
        model_of(net).condition(torch.arange(3), weight)


def test_guidance_of_a_model_without_classes_is_an_error():
    with pytest.raises(UserError, match="--guidance needs a model with classes"):
        model_of(replace(NET, num_classes=0)).condition(None, 2.0)


@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_a_student_with_a_guidance_input_begins_as_its_teacher_exactly(prediction):
    teacher = Denoiser(random_unet(**vars(replace(NET, prediction=prediction))))
    student = with_guidance_input(teacher, (1.0, 4.0), seed=0)
    x_t, label = normal(0, 4, 1, 8, 8), torch.tensor([0, 9, 10, 4])
    expected = teacher(x_t, ANGLES, label)
    assert torch.equal(student(x_t, ANGLES, Condition(label, WEIGHTS)), expected)
    assert torch.equal(student(x_t, ANGLES, label), expected)


def test_without_a_weight_a_trained_guidance_input_is_told_1():
    denoiser, label = Denoiser(random_unet(**vars(GUIDED))), torch.arange(4)
    x_t = normal(0, 4, 1, 8, 8)
    plain, one, more = (
        denoiser(x_t, ANGLES, condition)
        for condition in (label, Condition(label, WEIGHTS**0), Condition(label, WEIGHTS + 0.5))
    )
    assert torch.equal(plain, one)
    assert (more - one).abs().max() > 1e-3


def batches(dataset, config, guidance, rank: int = 0, world: int = 1) -> Batches:
    worker = SimpleNamespace(device=torch.device("cpu"), process_index=rank, num_processes=world)
    return Batches(dataset, config, worker, guidance)


def test_weights_fill_their_range_and_change_nothing_else_of_a_batch(digits, quick):
    with_weight = batches(digits, quick, (1.0, 4.0)).draw(7)
    without = batches(digits, quick, None).draw(7)
    for a, b in zip(with_weight._replace(label=with_weight.label.label), without, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    weights = torch.cat(
        [batches(digits, quick, (1.0, 4.0)).draw(i).label.guidance for i in range(64)]
    )
    exact = torch.distributions.Uniform(1.0, 4.0).cdf(weights.sort().values)
    steps = torch.arange(len(weights)) / len(weights)
    assert (exact - steps).abs().max() < 1.63 / len(weights) ** 0.5  # Kolmogorov, 1 %


def test_two_processes_draw_the_weights_that_one_draws(digits, quick):
    one = batches(digits, quick, (1.0, 4.0)).draw(3).label
    shares = [batches(digits, quick, (1.0, 4.0), rank, 2).draw(3).label for rank in range(2)]
    for i in range(2):
        assert torch.equal(torch.stack([share[i] for share in shares], 1).flatten(), one[i])


def test_data_without_classes_cannot_train_a_guidance_input(digits, quick):
    with pytest.raises(UserError, match="none"):
        batches(replace(digits, train_labels=None), quick, (1.0, 4.0))


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
        condition = Condition(self.labels, torch.full((len(t),), weight))
        gap = student(x_t, t, condition) - self.teacher(x_t, t, condition)
        return float(gap.square().mean().sqrt())


def test_distillation_brings_the_student_near_the_guided_teacher_at_every_weight(
    tmp_path, digits, quick
):
    teacher = Denoiser(random_unet(**vars(NET))).eval().requires_grad_(False)
    teacher.net.classes.weight *= 10
    student = with_guidance_input(teacher, (1.0, 4.0), seed=0)
    distance = Distance(teacher, digits.spec.to_unit(digits.test[:64]), digits.test_labels[:64])
    before = [distance(student, weight) for weight in (2.0, 3.0, 4.0)]
    config = replace(quick, iterations=150, learning_rate=1e-2, ema=0.98)
    objective = Guidance(teacher.to(this_device()), cosine(64).to(this_device()))
    list(fit(student, objective, digits, config, tmp_path / "state"))
    student.cpu(), teacher.cpu()
    after = [distance(student, weight) for weight in (2.0, 3.0, 4.0)]
    assert max(a / b for a, b in zip(after, before, strict=True)) < 1 / 3


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, digits, quick):
    """A finished conditional teacher of 8 steps."""
    run, angles = tmp_path_factory.mktemp("guidance") / "teacher", cosine(8)
    card = Card(
        "teacher", "ancestral", {8: angles.tolist()}, SOLVERS, asdict(NET), asdict(digits.spec)
    )
    torch.manual_seed(0)
    train_model(run, build(NET, "fp32"), Denoising(angles.to(this_device())), digits, quick, card)
    return run


@pytest.fixture(scope="module")
def guided(conditional, quick):
    guidance.distill(guidance.Options(teacher=conditional, own_guidance=2.0, fit=quick))
    return conditional.parent / "guided"


def test_a_guided_student_samples_as_its_teacher_does_and_halves(conditional, guided, quick):
    teacher, student = load(conditional), load(guided)
    assert student.card.plans == teacher.card.plans
    assert (student.card.sampler, student.card.solvers) == ("ancestral", SOLVERS)
    assert (student.denoiser.guidance, student.card.guidance) == ((1.0, 4.0), 2.0)
    assert student.card.parent == teacher.sha256
    options = progressive.Options(teacher=guided, start_steps=8, end_steps=4, fit=quick)
    (halved,) = progressive.distill(options)
    assert (halved.denoiser.guidance, halved.card.guidance) == ((1.0, 4.0), 2.0)
    assert halved.calls_per_step() == 1
    assert (student.card.shifted, halved.card.shifted) == (False, True)
    indices = torch.arange(4, device=halved.device)
    images = [halved.x0(halved.plan(), 0, indices, indices, w) for w in (None, 2.0, 4.0)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.fixture
def training(tmp_path, digits, quick):
    def begin(name: str):
        teacher = Denoiser(random_unet(**vars(NET))).to(this_device()).requires_grad_(False)
        student = with_guidance_input(teacher, (1.0, 4.0), seed=0)
        objective = Guidance(teacher, cosine(8).to(this_device()))
        config = replace(quick, save_every=0.0)
        return student, fit(student, objective, digits, config, tmp_path / f"{name}.safetensors")

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
        told = command(generate.main, run, "--guidance", weight, "--num", 3, "--out", out)
        assert told.code == 0
        said[run], images[run] = told.out, np.load(out, allow_pickle=False)["images"]
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
