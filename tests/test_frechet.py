"""The Fréchet distance as a loss, against the distance itself and against its own gradient."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close as close

from diffusion import checkpoint, runs
from diffusion.batches import Batch
from diffusion.circle import add_noise
from diffusion.console import Interrupted
from diffusion.denoiser import DenoiserConfig
from diffusion.model import build, load
from diffusion.networks import UNetConfig
from distill.cd import Loss, Options, distill
from distill.frechet import Frechet, FrechetTerm, middle, moments, of_data, sums
from eval.measure.metrics import Moments, frechet_distance

DIM = 6


def cloud(seed: int, count: int = 4000, dim: int = DIM) -> torch.Tensor:
    """Features whose every direction has a variance and a mean of its own."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=random) + 2 * torch.eye(dim)
    centre = torch.randn(dim, generator=random)
    return torch.randn(count, dim, generator=random) @ mix + centre


def followed(frechet: Frechet, features: torch.Tensor) -> Frechet:
    """The same after a first step that saw these, and its map made."""
    frechet(features)
    frechet.follow(None, 1)
    frechet.update()
    return frechet


def scaled(frechet: Frechet, features: torch.Tensor) -> torch.Tensor:
    return (features - frechet.centre) * frechet.scale


def with_ridge(features: torch.Tensor, ridge: float) -> Moments:
    """Their moments, of as many as they are, each direction's variance larger by the ridge."""
    measured = Moments.of(features)
    added = torch.eye(features.shape[1], dtype=torch.float64) * ridge * measured.count
    # a covariance over N, as the loss has it, not N - 1
    return replace(
        measured, scatter=(measured.scatter + added) * (measured.count - 1) / measured.count
    )


def test_it_is_the_distance_of_the_scaled_features():
    real, mine = cloud(0), cloud(1)
    frechet = followed(Frechet(sums(real), DIM), mine)
    a, b = (with_ridge(scaled(frechet, x), frechet.ridge) for x in (real, mine))
    assert float(frechet.distance) ** 2 == pytest.approx(frechet_distance(a, b), rel=1e-4)
    # of one variance over the data, and an image's in all
    close(scaled(frechet, real).var(0, correction=0), torch.ones(DIM))


def test_its_gradient_is_that_of_the_distance():
    """As finite differences of eval's distance have it, in every feature of some images."""
    real, mine = cloud(0), cloud(1, count=40)
    frechet = followed(Frechet(sums(real), DIM), mine)
    leaf = mine.clone().requires_grad_(True)
    frechet(leaf).mean().backward()
    target = with_ridge(scaled(frechet, real).double(), frechet.ridge)

    def distance(features: torch.Tensor) -> float:
        student = with_ridge(scaled(frechet, features).double(), frechet.ridge)
        return frechet_distance(target, student) ** 0.5

    for image, feature in [(0, 0), (7, 3), (39, 5)]:
        moved = torch.zeros(40, DIM, dtype=torch.float64)
        moved[image, feature] = 1e-4
        numeric = (distance(mine + moved) - distance(mine - moved)) / 2e-4
        assert float(leaf.grad[image, feature]) == pytest.approx(numeric, rel=2e-3, abs=1e-6)


def test_its_map_makes_the_students_moments_the_real_ones():
    real, mine = cloud(0), cloud(1)
    frechet = followed(Frechet(sums(real), DIM), mine)
    target, student = (with_ridge(scaled(frechet, x).double(), frechet.ridge) for x in (real, mine))
    centred = (scaled(frechet, mine) - frechet.mean.float()) @ frechet.map
    close(centred.mean(0), torch.zeros(DIM), rtol=0, atol=1e-5)
    mapped = frechet.map.double() @ student.covariance @ frechet.map.double()
    close(mapped, target.covariance, rtol=0, atol=1e-5)


def test_features_that_are_spread_as_the_real_ones_are_left_alone():
    real = cloud(0)
    frechet = followed(Frechet(sums(real), DIM), real)
    leaf = real.clone().requires_grad_(True)
    loss = frechet(leaf)
    assert float(loss.detach().max()) < 1e-6
    close(frechet.map, torch.eye(DIM), rtol=0, atol=1e-6)


def test_trained_by_it_alone_an_affine_student_learns_the_datas_mean_and_covariance():
    real = cloud(0)
    frechet = Frechet(sums(real), DIM)
    mix, shift = torch.eye(DIM, requires_grad=True), torch.zeros(DIM, requires_grad=True)
    optimizer = torch.optim.Adam([mix, shift], 0.02)
    random = torch.Generator().manual_seed(2)
    for done in range(1, 1501):
        phi = torch.randn(64, DIM, generator=random) @ mix + shift
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - done / 1501)
        frechet(phi).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        frechet.follow(None, done)
    close(shift.detach(), real.mean(0), rtol=0, atol=0.1)
    covariance = torch.cov(real.T)
    error = (mix.T @ mix).detach() - covariance
    assert float(error.norm() / covariance.norm()) < 0.1
    assert float((torch.eye(DIM) - covariance).norm() / covariance.norm()) > 0.5  # where it began


def test_moments_of_many_batches_are_those_of_all():
    features = cloud(0)
    whole = moments(sums(features))
    close(moments(sum(sums(part) for part in features.split(700))), whole)
    frechet = Frechet(sums(features), DIM)
    for done, part in enumerate(features.split(64), 1):
        frechet(part)
        frechet.follow(None, done)
    close(frechet.mean, torch.zeros(DIM).double(), rtol=0, atol=0.15)
    assert float(frechet.fresh.abs().max()) == 0


def batch(size: int = 8) -> Batch:
    random = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(size, 1, 8, 8, generator=random) for _ in range(2))
    return Batch(x0, eps, (torch.arange(size).double() + 0.5) / size)


def test_the_term_grows_with_the_training_and_acts_on_the_noisier_half_alone():
    frechet = followed(Frechet(sums(cloud(0, dim=64)), 64), cloud(1, dim=64))
    term = FrechetTerm(2.0, lambda x0, eps: x0.flatten(1), frechet)
    x0 = batch().x0.requires_grad_(True)
    early, late = (term(x0, batch(), progress) for progress in (0.25, 0.75))
    assert (late[:4] == 0).all()
    assert (late[4:] > 0).all()
    close(late, 3 * early)
    (gradient,) = torch.autograd.grad(late.sum(), x0)
    assert (gradient[:4] == 0).all()
    assert (gradient[4:].flatten(1).norm(dim=1) > 0).all()
    backwards = batch()._replace(level=batch().level.flip(0))
    assert (term(x0, backwards, 0.5)[4:] == 0).all()


def test_features_are_the_middle_of_the_teachers_network(teacher, digits):
    model = load(teacher)
    features = middle(model)
    x0, eps = digits.codec.encode(digits.train.images[:4]), batch(4).eps
    t = torch.full((4,), 0.1, dtype=torch.float64)
    h, *_ = model.denoiser.net.encode(add_noise(x0, eps, t), t.float())
    close(features(x0, eps), h.flatten(1))  # 8 channels of 8x8: 512 features need no squares
    assert features(x0, eps).shape == (4, 512)
    shape = UNetConfig(width=96, multipliers=(1,), blocks=1, attention=())
    wide = build(shape, DenoiserConfig(), {}, "bf16")
    many = middle(SimpleNamespace(denoiser=wide))(x0, eps)
    assert many.shape == (4, 96 * 9)  # in 3x3 squares
    assert many.dtype == torch.float32


def test_where_training_mirrors_images_so_do_the_real_features(digits):
    def left(x0, eps):
        return x0[..., :4].mean((1, 2, 3))[:, None]

    def right(x0, eps):
        return x0[..., 4:].mean((1, 2, 3))[:, None]

    device = torch.device("cpu")
    sides = [moments(of_data(side, digits, False, device))[0] for side in (left, right)]
    mixed = [moments(of_data(side, digits, True, device))[0] for side in (left, right)]
    assert abs(sides[0] - sides[1]) > 3 * abs(mixed[0] - mixed[1])


@pytest.fixture
def trained(teacher, quick, tmp_path):
    def train(name: str, frechet: float, iterations: int = 30):
        fit = replace(quick, iterations=iterations, save_every=0.0)
        loss = Loss(frechet=frechet)
        return distill(Options(teacher=teacher, out=tmp_path / name, fit=fit, loss=loss))

    return train


def test_a_run_stopped_and_resumed_ends_with_the_same_weights(trained, monkeypatch, tmp_path):
    whole = trained("whole", frechet=1.0)

    def stopping(*inputs, **named):
        for line in fit(*inputs, **named):
            yield line
            if line.iteration >= 15:
                raise Interrupted("stopped", 15)

    fit = runs.fit
    monkeypatch.setattr(runs, "fit", stopping)
    with pytest.raises(Interrupted):
        trained("stopped", frechet=1.0)
    monkeypatch.undo()
    assert (tmp_path / "stopped" / "state" / "state.safetensors").exists()
    assert trained("stopped", frechet=1.0).sha256 == whole.sha256


def test_a_student_trained_by_it_is_nearer_to_the_data_in_these_features(
    trained, teacher, digits, tmp_path
):
    """And its file holds a network alone: what the loss knew of the data stays out."""
    model = load(teacher)
    features, device = middle(model), torch.device("cpu")
    real = of_data(features, digits, False, device)

    def distance(student) -> float:
        frechet = Frechet(real, 64)
        images = student.x0(student.plan(1), 0, torch.arange(512))
        followed(frechet, features(images, torch.randn(512, 1, 8, 8)))
        return float(frechet.distance)

    plain, nearer = (trained(f"{weight}", frechet=weight, iterations=250) for weight in (0.0, 1.0))
    assert distance(nearer) < 0.9 * distance(plain)
    assert nearer.card.training["settings"]["frechet"] == 1.0
    assert (plain.card.method, nearer.card.method) == ("consistency-cd", "consistency-cd-frechet")
    weights = checkpoint.load(tmp_path / "1.0")[0]
    assert weights.keys() == checkpoint.load(teacher)[0].keys()
