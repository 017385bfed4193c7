"""Several extractors judge at once, and saved statistics stand in for real images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import data
from diffusion.console import UserError
from eval import compare
from eval.compare import Options
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.real import Real
from eval.measure.several import ratio, ratio_error
from eval.results import jsonl
from eval.results.records import Uncertainty


@pytest.fixture(scope="module")
def real() -> Real:
    return Real.sample(data.load("digits"))


@pytest.fixture
def theirs(tmp_path, real) -> Path:
    """Held-out images, with some noise."""
    noise = 20 * torch.randn(real.test.shape, generator=torch.Generator().manual_seed(0))
    images = (real.test + noise).round().clamp(0, 255).to(torch.uint8)
    np.savez(tmp_path / "theirs.npz", images=images.permute(0, 2, 3, 1).numpy())
    return tmp_path / "theirs.npz"


def measure(tmp_path: Path, path: Path, **others):
    usual = {"data": "digits", "features": "random", "num_images": 300, "times": False}
    (record,) = compare.compare(Options((path,), **(usual | {"out": tmp_path / "out"} | others)))
    return record


def means(tmp_path: Path, monkeypatch) -> str:
    """Another extractor, of one's own: means of the image's rows and columns."""
    (tmp_path / "judged_by_means.py").write_text(
        "import torch\n"
        "def means(images):\n"
        "    x = images.float()\n"
        "    return torch.cat([x.mean(2).flatten(1), x.mean(3).flatten(1)], 1) / 16\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "module:judged_by_means:means"


def test_the_ratio_over_several_is_the_geometric_mean_and_each_alone_is_what_it_was(
    tmp_path, theirs, monkeypatch
):
    other = means(tmp_path, monkeypatch)
    both = measure(tmp_path, theirs, features=f"random,{other}")
    first = measure(tmp_path, theirs)
    second = measure(tmp_path, theirs, features=other, out=tmp_path / "alone")
    assert both.key != first.key  # what lacks the further figures is measured again
    assert both.quality == first.quality
    assert both.others[second.metric] == pytest.approx(second.quality, rel=1e-9)
    assert both.extractor["further"] == [second.metric]
    # floors here are of a few draws: within their spread
    expected = math.sqrt(first.score / np.mean(first.floor) * second.score / np.mean(second.floor))
    assert both.further["fd-ratio-2"] == pytest.approx(expected, rel=0.1)
    assert 0 < both.errors["fd-ratio-2"][0] < both.further["fd-ratio-2"] / 2
    assert both.errors[second.metric] == pytest.approx([second.uncertainty[0].variance ** 0.5])
    assert both in jsonl.read(tmp_path / "out" / "results.jsonl")
    assert both.held_out["fd-ratio-2"] == pytest.approx(1, abs=0.2)


def test_a_ratio_weighs_representations_alike_whatever_their_scale():
    distances, floors = {"a": 8.0, "b": 0.03}, {"a": 2.0, "b": 0.03}
    assert ratio(distances, floors) == pytest.approx(2)  # of 4 and 1
    scaled = {"a": 8.0, "b": 30.0}, {"a": 2.0, "b": 30.0}
    assert ratio(*scaled) == pytest.approx(2)


def test_errors_of_one_sample_add_up_or_cancel_as_its_images_move_the_distances():
    blocks = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks /= blocks.std()

    def known(sign: float, error: float) -> Uncertainty:
        return Uncertainty(0, error**2, 0, 0, (sign * error * blocks).tolist())

    distances = {"a": 2.0, "b": 100.0}
    alike = {"a": known(1, 0.2), "b": known(1, 10.0)}  # both by a tenth
    assert ratio_error(distances, alike) == pytest.approx(0.1)
    against = alike | {"b": known(-1, 10.0)}
    assert ratio_error(distances, against) == pytest.approx(0, abs=1e-12)
    assert ratio_error(distances, alike | {"b": known(1, 0.0)}) == pytest.approx(0.05)


@pytest.mark.parametrize("features", ["random,random", "random,", ","])
def test_extractors_are_named_once_each(tmp_path, theirs, features):
    with pytest.raises(UserError, match="--features takes names, each once"):
        measure(tmp_path, theirs, features=features)


def test_saved_statistics_give_the_distance_that_the_images_gave(tmp_path, theirs):
    saved = tmp_path / "real.npz"
    by_images = measure(tmp_path, theirs, write_reference=saved)
    beside = measure(tmp_path, theirs, reference=saved)
    alone = measure(tmp_path, theirs, reference=saved, data=None, out=tmp_path / "alone")
    assert beside.score == pytest.approx(by_images.score, rel=1e-6)
    assert alone.score == pytest.approx(by_images.score, rel=1e-6)
    assert beside.others == by_images.others
    assert alone.others == {}
    with np.load(saved) as file:
        assert (file["mu"].shape, file["sigma"].shape) == ((64,), (64, 64))
    # a Gaussian's draws are no images, but their floor is near that of real ones
    assert np.mean(alone.floor) == pytest.approx(np.mean(by_images.floor), rel=0.5)
    assert (tmp_path / "alone" / "table.md").exists()
    assert len({by_images.key, beside.key, alone.key}) == 3


def test_statistics_of_others_are_numpys_mean_and_covariance(tmp_path):
    x = np.random.default_rng(0).normal(size=(500, 6)) @ np.diag([1, 2, 3, 1, 1, 0.1])
    np.savez(tmp_path / "s.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    read = Moments.saved(tmp_path / "s.npz", 6, "0" * 64)
    exact = Moments.of(torch.from_numpy(x))
    torch.testing.assert_close(read.covariance, exact.covariance)
    assert frechet_distance(read, exact) == pytest.approx(0, abs=1e-6)


def test_statistics_of_another_extractor_are_refused_in_one_line(tmp_path, theirs):
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64), extractor="0ther")
    np.savez(tmp_path / "none.npz", images=np.zeros(3))
    for name, match in {
        "wide": r"statistics of 2048 features.* these are 64 by",
        "other": r"by extractor 0ther, and",
        "none": "with mu and sigma",
        "missing": "with mu and sigma",
    }.items():
        with pytest.raises(UserError, match=match) as error:
            measure(tmp_path, theirs, reference=tmp_path / f"{name}.npz")
        assert "\n" not in str(error.value)
