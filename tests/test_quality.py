"""The judge's figures of real images made worse by degrees, and what it warns of and refuses."""

from dataclasses import replace
from functools import reduce
from itertools import pairwise
from operator import add

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from diffusion import data
from eval.measure import features, quality
from eval.measure import judge as judges
from eval.measure.judge import Judge
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.quality import Measured
from eval.measure.real import Real
from eval.measure.seen import KEPT, Seen


@pytest.fixture(scope="module")
def digits() -> Real:
    """The digits as the harness has them."""
    return Real.sample(data.load("digits"))


CPU = torch.device("cpu")
GROWS = ("own", "cross", "kid", "sliced-wasserstein", "infinity")


@pytest.fixture(scope="module")
def judge(digits, tmp_path_factory) -> Judge:
    """With a classifier that is trained for a few seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STEPS", 150)
        own = features.classifier(digits, CPU, tmp_path_factory.mktemp("cache"))
    assert own.accuracy > 0.95
    return Judge.of(digits, own, features.extractor("random", digits, CPU), CPU)


def figures(judge: Judge, images: Tensor) -> dict[str, float]:
    seen = judge.see_images(images)
    others = Measured(judge, seen).others
    return others | {"own": Measured(judge, seen).distance, "cross": others[judge.cross.name]}


@pytest.fixture(scope="module")
def ladders(judge, digits) -> dict[str, list[dict[str, float]]]:
    """The figures of the held-out digits by degrees of blur, noise and of classes that are lost."""
    images, labels = digits.test, digits.test_labels
    random = torch.Generator().manual_seed(0)
    eps = torch.randn(images.shape, generator=random)

    def kept(classes: int) -> Tensor:
        """As many images, of fewer classes."""
        some = images[labels < classes]
        return some[torch.randint(len(some), (len(images),), generator=random)]

    worse = {
        "blur": [images, *(gaussian_blur(images, 7, std) for std in (0.6, 0.9, 1.5))],
        "noise": [
            images,
            *((images + std * eps).clamp(0, 255).round().byte() for std in (24, 48, 96)),
        ],
        "collapse": [kept(classes) for classes in (10, 7, 4, 2)],
    }
    return {name: [figures(judge, step) for step in steps] for name, steps in worse.items()}


@pytest.mark.parametrize("worse", ["blur", "noise", "collapse"])
@pytest.mark.parametrize("name", GROWS)
def test_every_distance_grows_with_every_step_of_harm(ladders, worse, name):
    steps = [each[name] for each in ladders[worse]]
    assert all(a < b for a, b in pairwise(steps)), steps


def test_collapse_costs_recall_coverage_and_score_but_no_precision(ladders):
    steps = ladders["collapse"]
    for name in ("recall", "coverage", "classifier-score"):
        shares = [each[name] for each in steps]
        assert all(a > b for a, b in pairwise(shares)), (name, shares)
        assert shares[-1] < shares[0] / 2
    # what little it moves by is how typical the images of the classes left are
    assert min(each["precision"] for each in steps) > 0.9 * steps[0]["precision"]


def test_blur_and_noise_cost_coverage(ladders):
    for worse in ("blur", "noise"):
        shares = [each["coverage"] for each in ladders[worse]]
        assert all(a >= b for a, b in pairwise(shares)), shares
        assert shares[-1] < 0.6 * shares[0]


def test_a_copied_training_set_and_a_lost_diversity_are_warned_of(judge, digits, ladders):
    held_out = quality.held_out(judge, len(digits.test))
    copies = Measured(judge, judge.see_images(digits.train[:359])).others
    assert quality.warnings(copies, held_out) == ["copies"]
    assert quality.warnings(ladders["collapse"][-1], held_out) == ["collapsed"]
    assert quality.warnings(held_out, held_out) == []


def test_copies_of_a_handful_of_images_are_marked_though_nothing_is_held_out(digits):
    few = replace(digits, train=digits.train[:12], test=digits.test[:0], test_condition={})
    own = features.extractor("random", few, CPU)
    judge = Judge.of(few, own, own, CPU)
    held_out, fresh = quality.held_out(judge, 100), digits.test[:100]
    assert held_out == {}

    def figures_of(copies: int) -> dict[str, float]:
        """The figures of fresh images with so many noisy copies in a hundred."""
        noisy = few.train[torch.arange(copies) % 12].int() + torch.arange(64).view(8, 8) % 3
        images = torch.cat([noisy.clamp(0, 255).byte(), fresh[copies:]])
        return Measured(judge, judge.see_images(images)).others

    assert figures_of(47)["memorisation-copied"] == pytest.approx(0.47, abs=0.02)
    assert quality.warnings(figures_of(47), held_out) == ["copies"]
    assert quality.warnings(figures_of(8), held_out) == ["copies"]
    assert quality.warnings(figures_of(0), held_out) == []
    assert quality.unheld(figures_of(0))


def test_the_floor_is_what_as_many_real_images_give(judge, digits):
    which = torch.randperm(359, generator=torch.Generator().manual_seed(0))[:200]
    (floor,), _ = judge.floor(200, 1)
    seen = judge.see_images(digits.test[which])
    assert floor == pytest.approx(Measured(judge, seen).distance, rel=1e-6)
    more, _ = judge.floor(1000, 4)  # more than are held out: training images, with replacement
    assert len({*more}) == 4
    assert max(more) < floor


def test_moments_and_rows_of_parts_are_those_of_the_whole_in_any_order(judge, digits):
    images = digits.test[:300]
    whole = judge.see_images(images)
    parts = [judge.see_images(images[i : i + 77], i) for i in range(0, 300, 77)]
    for order in (parts, parts[::-1]):
        merged = reduce(add, order, Seen())
        assert merged.rows("features").equal(torch.cat([part.rows("features") for part in parts]))
        assert merged.rows("pixels").equal(images[: KEPT["pixels"]])
        assert Measured(judge, merged).distance == pytest.approx(
            Measured(judge, whole).distance, rel=1e-5
        )
        again = Seen.of(merged.tensors(), CPU)
        assert Measured(judge, again).distance == Measured(judge, merged).distance
        assert Measured(judge, again).others == Measured(judge, merged).others


def test_what_is_kept_of_many_images_is_bounded(judge, digits, monkeypatch):
    monkeypatch.setattr(judges, "KEPT", {"features": 100, "pixels": 50})
    seen = reduce(add, (judge.see_images(digits.test[i : i + 60], i) for i in range(0, 300, 60)))
    assert [len(seen.rows(name)) for name in ("features", "cross", "pixels")] == [100, 100, 50]
    features = judge.extractor.extract(digits.test[:300])
    expected = frechet_distance(Moments.of(features), judge.real["own"])
    assert Measured(judge, seen).distance == pytest.approx(expected, rel=1e-5)


def test_real_features_are_read_from_the_cache_where_they_are_in_it(judge, digits, tmp_path):
    first = judges.reference(digits.test, judge.cross, CPU, tmp_path)
    (path,) = (tmp_path / "reference").iterdir()
    before = path.read_bytes()
    assert judges.reference(digits.test, judge.cross, CPU, tmp_path).equal(first)
    assert path.read_bytes() == before
    judges.reference(digits.test[1:], judge.cross, CPU, tmp_path)  # other images, another file
    assert len([*(tmp_path / "reference").iterdir()]) == 2


def test_the_features_of_no_images_are_none(judge, digits, tmp_path):
    unable = replace(judge.extractor, extract=None)  # some networks take no empty batch
    features = judges.reference(digits.test[:0], unable, CPU, tmp_path)
    assert features.shape == (0, judge.extractor.dim)
