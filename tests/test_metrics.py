"""The Fréchet distance against clean-fid's, against closed forms, and from any split of the images."""

import pytest
import torch
from cleanfid import fid
from scipy import linalg

from diffusion.circle import add_noise
from eval.features import random_network
from eval.metrics import Moments, frechet_distance


@pytest.fixture(scope="module")
def features(digits) -> dict[str, torch.Tensor]:
    """64 numbers an image: a network's of the digits and of noisy digits, and the digits' pixels."""
    extract = random_network(digits, torch.device("cpu")).extract
    random = torch.Generator().manual_seed(0)
    x0 = digits.spec.to_unit(digits.train)
    eps = torch.randn(x0.shape, generator=random)
    noisy = digits.spec.to_uint8(add_noise(x0, eps, torch.tensor(0.3)))
    return {
        "digits": extract(digits.train),
        "held out": extract(digits.test),
        "noisy": extract(noisy),
        "pixels": digits.train.flatten(1).float(),  # a singular covariance: corners are black
        "noisy pixels": noisy.flatten(1).float(),
    }


def of(mean: torch.Tensor, covariance: torch.Tensor, count: int = 100) -> Moments:
    return Moments(count, mean, covariance * (count - 1))


@pytest.mark.filterwarnings(
    "ignore:Matrix is singular"
)  # scipy's square root finds one all the same
@pytest.mark.parametrize(
    ("a", "b"), [("noisy", "digits"), ("held out", "digits"), ("noisy pixels", "noisy")]
)
def test_the_distance_is_clean_fids(features, a, b, monkeypatch):
    # clean-fid 0.1.35 asks for a second result by an argument that SciPy 1.18 does not take
    monkeypatch.setattr(fid.linalg, "sqrtm", lambda x, disp, sqrtm=linalg.sqrtm: (sqrtm(x), 0))
    a, b = Moments.of(features[a]), Moments.of(features[b])
    theirs = fid.frechet_distance(
        a.mean.numpy(), a.covariance.numpy(), b.mean.numpy(), b.covariance.numpy()
    )
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)


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
