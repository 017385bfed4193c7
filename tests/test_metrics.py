"""The Fréchet distance against clean-fid's, against closed forms, from any split of the images."""

from collections.abc import Callable

import pytest
import torch
from cleanfid import fid
from scipy import linalg

from diffusion.circle import add_noise
from diffusion.console import UserError
from diffusion.data import Dataset
from diffusion.files import load_tensors, save_tensors
from eval.measure.features import random_network
from eval.measure.metrics import Moments, frechet_distance


@pytest.fixture(scope="module")
def features(digits) -> dict[str, torch.Tensor]:
    """64 numbers an image: a network's for digits and noisy digits, and the digits' pixels."""
    extract = random_network(digits, torch.device("cpu")).extract
    noisy = noised(digits, digits.train.images, 0.3)
    return {
        "digits": extract(digits.train.images),
        "held out": extract(digits.test.images),
        "noisy": extract(noisy),
        "pixels": digits.train.images.flatten(
            1
        ).float(),  # a singular covariance: corners are black
        "noisy pixels": noisy.flatten(1).float(),
    }


def noised(digits: Dataset, images: torch.Tensor, t: float) -> torch.Tensor:
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return digits.codec.decode(add_noise(digits.codec.encode(images), eps, torch.tensor(t)))


@pytest.fixture(scope="module")
def wide(digits) -> Callable[[int, int, float], torch.Tensor]:
    """(count, dim, t) -> features of digits drawn anew with noise t: cosines of random projections.

    Of condition 1e5 to 1e6 where count is twice dim, singular where it is less than dim.
    """

    def extract(count: int, dim: int, t: float) -> torch.Tensor:
        random = torch.Generator().manual_seed(1)
        directions = 0.1 * torch.randn(64, dim, generator=random)
        phases = 2 * torch.pi * torch.rand(dim, generator=random)
        which = torch.randint(len(digits.train), (count,), generator=random)
        noisy = noised(digits, digits.train.images[which], t)
        return torch.cos((noisy.flatten(1) / 127.5 - 1) @ directions + phases)

    return extract


def clean_fids(monkeypatch, a: Moments, b: Moments) -> float:
    # clean-fid 0.1.35 asks for a second result by an argument that SciPy 1.18 does not take
    monkeypatch.setattr(fid.linalg, "sqrtm", lambda x, disp, sqrtm=linalg.sqrtm: (sqrtm(x), 0))
    gaussians = (part.numpy() for m in (a, b) for part in (m.mean, m.covariance))
    return fid.frechet_distance(*gaussians)


def of(mean: torch.Tensor, covariance: torch.Tensor, count: int = 100) -> Moments:
    return Moments(count, mean, covariance * (count - 1))


# scipy's root finds some of these singular, and the root of what rounding left is then its error
@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(
    ("a", "b"), [("noisy", "digits"), ("held out", "digits"), ("noisy pixels", "noisy")]
)
def test_the_distance_is_clean_fids(features, a, b, monkeypatch):
    a, b = Moments.of(features[a]), Moments.of(features[b])
    assert frechet_distance(a, b) == pytest.approx(clean_fids(monkeypatch, a, b), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(
    ("dim", "count", "rel"),
    [(512, 1024, 1e-6), (512, 256, 1e-5), (2048, 4096, 1e-6)],
    ids=["512", "512-singular", "2048-half-a-minute-of-clean-fid"],
)
def test_the_distance_of_wide_features_is_clean_fids(wide, monkeypatch, dim, count, rel):
    a, b = Moments.of(wide(count, dim, 0.4)), Moments.of(wide(2 * dim, dim, 0.3))
    assert frechet_distance(a, b) == pytest.approx(clean_fids(monkeypatch, a, b), rel=rel)


@pytest.mark.parametrize(("dim", "counts"), [(512, (300, 2000)), (512, (300, 200))])
def test_with_fewer_images_than_dimensions_it_is_that_of_the_images_themselves(wide, dim, counts):
    # tr (A B)^(1/2) is the nuclear norm of X Y^T over the roots of both counts less 1
    a, b = (wide(count, dim, t).double() for count, t in zip(counts, (0.4, 0.3), strict=True))
    x, y = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (a, b))
    gap = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
    expected = float(gap - 2 * torch.linalg.svdvals(x @ y.T).sum())
    a, b = Moments.of(a), Moments.of(b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("tilt", [0, 0.003, 1])
@pytest.mark.parametrize("axes", ["ascending", "shuffled", "turned"])
@pytest.mark.parametrize("exponent", [0, 2, 4, 7])
def test_small_variances_keep_their_digits(exponent, axes, tilt):
    random = torch.Generator().manual_seed(0)
    x, y, turn, tilts = (
        torch.randn(count, 200, generator=random, dtype=torch.float64)
        for count in (600, 600, 200, 200)
    )
    turns = {
        "ascending": torch.eye(200).double().flip(0),
        "shuffled": torch.eye(200).double()[torch.randperm(200, generator=random)],
        "turned": torch.linalg.qr(turn)[0],
    }
    spread = torch.arange(1, 201).double() ** (-exponent / 2)
    tilted = torch.linalg.qr(torch.eye(200).double() + tilt * tilts)[0]
    a, b = Moments.of(x * spread @ turns[axes]), Moments.of(y * spread @ tilted @ turns[axes])
    cross = float(torch.linalg.svdvals(a.root.T @ b.root).sum())  # squares nothing, loses nothing
    rest = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
    assert frechet_distance(a, b) == pytest.approx(rest - 2 * cross, rel=1e-7)


@pytest.mark.parametrize("name", ["digits", "pixels", "few"])
def test_a_root_times_its_transpose_is_the_covariance_and_it_has_its_rank(features, wide, name):
    x = wide(100, 128, 0.3) if name == "few" else features[name]
    moments = Moments.of(x)
    error = moments.root @ moments.root.T - moments.covariance
    assert error.abs().max() < 1e-13 * moments.covariance.abs().max()
    centred = x.double() - x.double().mean(0)
    assert moments.root.shape[1] == torch.linalg.matrix_rank(centred, rtol=1e-10)


def test_a_reference_is_decomposed_once(features, monkeypatch):
    reference, seen = Moments.of(features["digits"]), []
    for name in ("eigh", "cholesky_ex"):
        decompose = getattr(torch.linalg, name)
        watched = lambda x, f=decompose: seen.append(x) or f(x)  # noqa: E731
        monkeypatch.setattr(torch.linalg, name, watched)
    frechet_distance(Moments.of(features["noisy"]), reference)
    seen.clear()
    frechet_distance(Moments.of(features["held out"]), reference)
    assert seen
    assert not any(torch.equal(x, reference.covariance) for x in seen)


def test_a_singular_covariance_agrees_with_the_eigenvalues_of_the_product(features):
    a, b = Moments.of(features["pixels"]), Moments.of(features["noisy pixels"])
    product = torch.linalg.eigvals(a.covariance @ b.covariance).real.clamp(min=0)
    traces = a.covariance.trace() + b.covariance.trace() - 2 * product.sqrt().sum()
    expected = float((a.mean - b.mean).square().sum() + traces)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_covariances_that_commute_have_the_closed_form():
    random = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(16, 16, generator=random, dtype=torch.float64))
    variances = torch.rand(2, 16, generator=random, dtype=torch.float64)
    means = torch.randn(2, 16, generator=random, dtype=torch.float64)
    a, b = (of(m, axes @ v.diag() @ axes.T) for m, v in zip(means, variances, strict=True))
    gap = variances[0].sqrt() - variances[1].sqrt()
    expected = float((means[0] - means[1]).square().sum() + gap.square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_the_distance_to_itself_is_zero(features):
    a = Moments.of(features["pixels"])
    assert abs(frechet_distance(a, a)) < 1e-9 * float(a.covariance.trace())


def test_the_distance_is_symmetric(features):
    a, b = Moments.of(features["noisy"]), Moments.of(features["digits"])
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_moments_of_parts_add_up_to_those_of_the_whole(features, size):
    x = features["digits"] + 1e3  # far from zero, where sums of squares would lose digits
    first, *others = map(Moments.of, x.split(size))
    total = sum(others, first)
    assert total.count == len(x) > first.count
    torch.testing.assert_close(total.mean, x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(total.covariance, x.double().T.cov(), rtol=1e-9, atol=1e-13)


def test_moments_survive_a_file_bit_for_bit(features, tmp_path):
    moments = Moments.of(features["digits"])
    save_tensors(tmp_path / "moments.safetensors", moments.tensors(), {})
    back = Moments.from_tensors(load_tensors(tmp_path / "moments.safetensors")[0])
    assert back.count == moments.count
    assert torch.equal(back.mean, moments.mean)
    assert torch.equal(back.scatter, moments.scatter)


def test_moments_leave_the_features_as_they_were(features):
    x = features["digits"].double()
    before = x.clone()
    Moments.of(x)
    assert torch.equal(x, before)


def test_features_that_are_not_finite_are_refused_however_they_were_merged(features):
    x = features["digits"].clone()
    x[[3, 5], 7] = torch.nan
    merged = Moments.of(x[:9]) + Moments.of(x[9:])
    with pytest.raises(UserError, match=f"some of {len(x)} images are not finite"):
        frechet_distance(merged, Moments.of(features["noisy"]))


def test_one_image_has_no_covariance(features):
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_distance(Moments.of(features["digits"][:1]), Moments.of(features["noisy"]))
