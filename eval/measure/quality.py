"""A set of images measured against real ones: distances, fidelity and diversity, copies."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from math import isfinite
from operator import add

import torch
from torch import Tensor

from eval.measure import sets
from eval.measure.intervals import jackknife, uncertainty
from eval.measure.judge import NEIGHBOURS, PORTION, Asked, Judge
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.seen import Seen
from eval.measure.several import ratio, ratio_error
from eval.results.records import Uncertainty

SLICES = 64
RATIO = "fd-ratio-"  # and the number of extractors that it is over: the name of a figure
SHARE = "share-of-class-"  # and its number: the name of a figure
CLASSES = 100  # at most, whose shares are reported
COPIED = 0.05  # of the images; more than so many copies are marked where no image is held out


@dataclass(frozen=True)
class Measured:
    """The figures of one set of images, each computed once, when it is asked for."""

    judge: Judge
    seen: Seen

    @property
    def distance(self) -> float:
        """The main figure: the Fréchet distance to the training images."""
        return self.distances["own"]

    @property
    def uncertainty(self) -> Uncertainty:
        """How uncertain that distance is."""
        return self.uncertainties["own"]

    @cached_property
    def others(self) -> dict[str, float]:
        """The further figures, by name; of images compared with statistics alone there are none."""
        if not len(self.judge.train):
            return {}
        figures = self._of_features(self.features, self.seen.rows("cross"))
        figures |= self._of_pixels(self.near)
        figures |= self._of_agreement(slice(None))
        if self.judge.more:
            figures |= self._further(self.distances, self.ratio)
        if self.seen.moments["own"].count >= 4 * self.judge.extractor.dim:  # else: a large bias
            figures["infinity"] = self.distance - self.uncertainty.bias
        return figures

    @cached_property
    def errors(self) -> dict[str, float]:
        """Standard errors of the further figures, by name."""
        if not len(self.judge.train):
            return {}
        features, cross, near = self.features, self.seen.rows("cross"), self.near

        def of_features(which: Tensor) -> dict[str, float]:
            which = which.to(features.device)
            return self._of_features(features[which], cross[which])

        errors = jackknife(of_features, len(features))
        errors |= jackknife(lambda which: self._of_pixels(near[which.to(near.device)]), len(near))
        errors |= jackknife(
            lambda which: self._of_agreement(which.to(features.device)), len(features)
        )
        for name in ("memorisation-p_value", "memorisation-copied_floor"):  # no model's figures
            errors.pop(name, None)
        if self.judge.more:
            each = {key: one.variance**0.5 for key, one in self.uncertainties.items()}
            share = ratio_error(self.distances, self.uncertainties)
            errors |= self._further(each, self.ratio * share)
        return errors | {"infinity": self.uncertainty.variance**0.5}

    @cached_property
    def features(self) -> Tensor:
        return self.seen.rows("features")

    @cached_property
    def near(self) -> Tensor:
        """(n, 2): distances of the images that are kept to the training images."""
        return sets.two_nearest(self.seen.rows("pixels"), self.judge.bank)

    @cached_property
    def distances(self) -> dict[str, float]:
        """By every extractor, by the names of what Seen keeps of them."""
        moments = self.seen.moments
        spaces = self.judge.spaces.items()
        return {key: frechet_distance(moments[key], space.real) for key, space in spaces}

    @cached_property
    def uncertainties(self) -> dict[str, Uncertainty]:
        """How uncertain these are."""
        return {
            key: uncertainty(
                self.features if key == "own" else self.seen.rows(key),
                self.seen.moments[key],
                space.real,
            )
            for key, space in self.judge.spaces.items()
        }

    @cached_property
    def ratio(self) -> float:
        """Over all extractors."""
        count = self.seen.moments["own"].count
        floors = {key: space.floor(count) for key, space in self.judge.spaces.items()}
        return ratio(self.distances, floors)

    def _further(self, values: Mapping[str, float], over: float) -> dict[str, float]:
        """What is known by the further extractors and over all, by the figures' names."""
        spaces = self.judge.spaces
        named = {spaces[key].extractor.name: x for key, x in values.items() if key != "own"}
        return named | {f"{RATIO}{len(spaces)}": over}

    def _of_features(self, fake: Tensor, cross: Tensor) -> dict[str, float]:
        judge, slices = self.judge, torch.Generator().manual_seed(0)
        distance = frechet_distance(Moments.of(cross), judge.real["cross"])
        figures = {judge.cross.name: distance, "kid": sets.kid(fake, judge.some, judge.kernel_mean)}
        figures["sliced-wasserstein"] = sets.sliced_wasserstein(fake, judge.some, SLICES, slices)
        if min(len(fake), len(judge.some)) > NEIGHBOURS:
            some, radius = judge.balls(len(fake))
            figures |= sets.precision_recall_density_coverage(some, fake, NEIGHBOURS, radius)
        if judge.extractor.probabilities:
            probabilities = judge.extractor.probabilities(fake)
            figures["classifier-score"] = sets.inception_score(probabilities)
            classes = probabilities.shape[1]
            if classes <= CLASSES:
                counts = probabilities.argmax(1).bincount(minlength=classes)
                figures |= {f"{SHARE}{i}": int(n) / len(fake) for i, n in enumerate(counts)}
        return figures

    def _of_agreement(self, which: Tensor | slice) -> dict[str, float]:
        """How far these images show what they were asked for: by their classes, as the extractor
        tells them apart, and by their texts."""
        figures, probabilities = {}, self.judge.extractor.probabilities
        if probabilities and self.seen.has("asked"):
            shown = probabilities(self.features[which]).argmax(1)
            right = shown == self.seen.rows("asked")[which].to(shown.device)
            figures["asked-class"] = float(right.double().mean())
        if self.seen.has("agreement"):
            figures["clip-score"] = float(self.seen.rows("agreement")[which].double().mean())
        return figures

    def _of_pixels(self, near: Tensor) -> dict[str, float]:
        if not len(self.judge.held_out_nearest):
            return {"memorisation-copied": sets.copied(near)}
        figures = sets.memorisation(near, self.judge.held_out_nearest)
        return {f"memorisation-{name}": value for name, value in figures.items()}


def held_out(judge: Judge, num_images: int) -> dict[str, float]:
    """The further figures of up to that many held-out images; none where there are too few."""
    images = judge.dataset.test[:num_images]
    if len(images) <= 5:
        return {}
    real, seen = judge.dataset, []
    for start in range(0, len(images), PORTION):
        some = slice(start, min(start + PORTION, len(images)))
        part = images[some].to(judge.device)
        seen.append(judge.see_images(part, start, Asked(texts=real.captions(some))))
    seen = reduce(add, seen)
    return {k: value for k, value in Measured(judge, seen).others.items() if isfinite(value)}


def warnings(others: dict[str, float], real: dict[str, float]) -> list[str]:
    """What a reader of the table must not miss: a set that lost its diversity, or holds copies.

    Collapse: coverage below half of the held-out images'. Copies: more than three times as many
    as among the held-out images, and at least 1 in 50; where none is held out, more than COPIED.
    """
    marks = []
    if "coverage" in real and others.get("coverage", 1.0) < real["coverage"] / 2:
        marks.append("collapsed")
    limit = COPIED if unheld(others) else max(0.02, 3 * others.get("memorisation-copied_floor", 0))
    if others.get("memorisation-copied", 0.0) > limit:
        marks.append("copies")
    return marks


def unheld(others: dict[str, float]) -> bool:
    """Whether these figures were taken where no image is held out to compare with."""
    return "memorisation-copied" in others and "memorisation-copied_floor" not in others
