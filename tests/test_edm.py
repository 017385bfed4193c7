"""Teachers that are denoisers D(x, sigma) of the user's own code."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion import data
from diffusion.circle import add_noise
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.model import load
from diffusion.samplers import sample
from distill import cd, match, progressive
from students import generate
from tests.analytic import normal

QUICK = FitConfig(iterations=3, batch_size=16, warmup=1, precision="fp32")


class Preconditioned(nn.Module):
    """Karras et al. 2022, table 1, at sigma_data = 1/2, around a convolution."""

    img_channels, img_resolution = 1, 8

    def __init__(self, label_dim: int = 0):
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)
        self.label_dim = label_dim
        self.classes = nn.Linear(label_dim, 1) if label_dim else None

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = sigma.square() + 0.25
        inner = self.net(x / total.sqrt()) + sigma.log() / 4
        if class_labels is not None and self.classes is not None:
            inner = inner + self.classes(class_labels)[..., None, None]
        return 0.25 / total * x + sigma * 0.5 / total.sqrt() * inner


def made(label_dim: int = 0) -> Preconditioned:
    torch.manual_seed(0)
    return Preconditioned(label_dim)


def unlabelled() -> nn.Module:
    return made()


def labelled() -> nn.Module:
    return made(10)


def no_module() -> int:
    return 1


def heun_of_theirs(network: nn.Module, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Euler's rule for dx/dsigma = (x - D) / sigma, sigmas descending to 0."""
    x = noise * (1 + sigmas[0] ** 2).sqrt()  # our first x_t is on the circle
    for sigma, then in pairwise(sigmas):
        x = x + (then - sigma) * (x - network(x, sigma.expand(len(x)))) / sigma
    return x


def test_images_are_those_of_eulers_rule_in_sigma(tmp_path):
    model = load(Path("edm:tests.test_edm:unlabelled"))
    angles = model.plan(6, "ddim").on(torch.device("cpu"))
    sigmas = angles.tan().flip(0)
    assert sigmas[0] == pytest.approx(80)
    assert float(model.schedule[1].tan()) == pytest.approx(0.002)
    noise = normal(0, 4, 1, 8, 8)
    with torch.no_grad():
        theirs = heun_of_theirs(made().double(), noise.double(), sigmas).float()
    x0 = sample(model.denoiser, iter([noise]), "ddim", angles)
    torch.testing.assert_close(x0, theirs, atol=1e-4, rtol=1e-4)


def test_a_clean_image_stays_as_it_is():
    model, image = load(Path("edm:tests.test_edm:unlabelled")), normal(0, 2, 1, 8, 8)
    torch.testing.assert_close(model.denoiser(image, torch.zeros(2).double()), image)


def test_classes_are_one_hot_and_zeros_for_an_unknown_one():
    model, image = load(Path("edm:tests.test_edm:labelled")), normal(0, 2, 1, 8, 8)
    t, label = torch.tensor([0.7, 1.1]).double(), torch.tensor([3, 10])
    x0 = model.denoiser(image, t, {"label": label})
    one_hot = torch.zeros(2, 10)
    one_hot[0, 3] = 1
    sigma = t.tan().float()
    expected = made(10)(image * (1 + sigma**2).sqrt()[:, None, None, None], sigma, one_hot)
    torch.testing.assert_close(x0, expected, atol=1e-5, rtol=1e-5)


def test_students_are_of_the_users_own_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"teacher": Path("edm:tests.test_edm:unlabelled"), "data": "digits", "fit": QUICK}
    progressive.distill(progressive.Options(**given, start_steps=4, rounds=(2,)))
    student = cd.distill(cd.Options(**given))
    assert student.denoiser.net.state_dict().keys() == {
        "denoiser.net.weight",
        "denoiser.net.bias",
    }
    assert load(Path("runs/test_edm/consistency")).sha256 == student.sha256


def test_a_checkpoint_that_names_code_is_not_run_unless_the_user_allows_it(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.networks.module._named", {"tests.test_edm"})
    monkeypatch.chdir(tmp_path)
    given = {"teacher": Path("edm:tests.test_edm:unlabelled"), "data": "digits", "fit": QUICK}
    cd.distill(cd.Options(**given))
    monkeypatch.setattr("diffusion.networks.module._named", set())
    with pytest.raises(UserError, match="allow it by FEWSTEP_TRUST=tests"):
        load(Path("runs/test_edm/consistency"))


@pytest.fixture
def exported(tmp_path) -> Path:
    example = (torch.zeros(2, 1, 8, 8), torch.ones(2))
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(made().eval(), example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, tmp_path / "denoiser.pt2")
    return Path(f"edm:{tmp_path / 'denoiser.pt2'}")


def test_an_exported_denoiser_is_trusted_and_matched_by_a_network_of_ours(
    exported, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusion.networks.module._named", set())
    with pytest.raises(UserError, match="add --trust if you know its maker"):
        load(exported)
    done = command(generate.main, exported, "--trust", "--num", 1, "--steps", 2)
    assert done.code == 0, done.err
    given = {"teacher": exported, "data": "digits", "trust": True}
    with pytest.raises(UserError, match=r"python -m distill\.match"):
        cd.distill(cd.Options(**given, fit=QUICK))
    fit = FitConfig(iterations=60, batch_size=16, learning_rate=5e-3, warmup=5, precision="fp32")
    matched = match.distill(match.Options(**given, fit=fit))
    assert matched.card.net["name"] == "unet"
    teacher, t = load(exported), torch.tensor(1.0).double()
    x0 = teacher.codec.encode(data.load("digits").test.take(torch.arange(64)).images)
    x_t = add_noise(x0, normal(0, 64, 1, 8, 8), t)
    said, untrained = teacher.denoiser(x_t, t), t.cos() * x_t  # whose v is 0
    distances = [(said - each).square().mean() for each in (matched.denoiser(x_t, t), untrained)]
    assert distances[0] < 0.3 * distances[1]
    student = cd.distill(cd.Options(Path("runs/denoiser/matched"), fit=QUICK))
    assert student.card.origin == teacher.sha256


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (
            "tests.test_edm:none",
            "expected edm:PACKAGE.MODULE:FUNCTION, got edm:tests.test_edm:none",
        ),
        ("tests.test_edm", "expected edm:PACKAGE.MODULE:FUNCTION, got edm:tests.test_edm"),
        ("tests.test_edm:no_module", r"returns int: expected a torch\.nn\.Module"),
        ("torch.nn:ReLU", r"returns ReLU: expected a torch\.nn\.Module"),
        ("tests.test_edm:heun_of_theirs", "calling it without arguments failed"),
        ("nowhere.pt2", "nowhere.pt2 can run code of its maker"),
    ],
)
def test_what_is_no_denoiser_is_said_in_one_line(place, words):
    with pytest.raises(UserError, match=words):
        load(Path(f"edm:{place}"))


def test_the_last_angle_is_where_their_noise_ends():
    assert float(load(Path("edm:tests.test_edm:unlabelled")).schedule[-1]) == math.atan(80)
