"""A set of images measured against real ones: distances, fidelity and diversity, copies."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import isfinite
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from diffusion.codec import Codec
from diffusion.console import UserError, track
from diffusion.image_file import Form
from diffusion.machine import CACHE
from diffusion.owner import cached
from eval.measure import sets
from eval.measure.features import Extractor
from eval.measure.inception import file_sha256
from eval.measure.intervals import jackknife, uncertainty
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.real import Real, fingerprint
from eval.measure.several import Representation, ratio, ratio_error
from eval.results.records import Data, Uncertainty

SLICES = 64
NEIGHBOURS = 5  # in the balls of precision, recall, density and coverage
PORTION = 1000  # images through an extractor at a time
# Of how many images, the first ones, a row each is kept: the rest are in the moments alone.
KEPT = {"features": 1024, "pixels": 256}
SHOWN = 16  # of the pixels, on pictures
RATIO = "fd-ratio-"  # and the number of extractors that it is over: the name of a figure
FAR = 128.0  # grey levels beyond black or white
SHARE = "share-of-class-"  # and its number: the name of a figure
CLASSES = 100  # at most, whose shares are reported
COPIED = 0.05  # of the images; more than so many copies are marked where no image is held out


@dataclass
class Seen:
    """What is kept of a set of images while it streams by; two of them merge, in any order."""

    moments: dict[str, Moments] = field(default_factory=dict)
    """Extractor -> moments of the features; "own" alone is of all images."""
    odd: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    """(4,) float64: images, those not finite, those of one flat colour, share of far-off values."""
    parts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Number of a batch's first image -> the rows that are kept of it, by KEPT's names."""

    def __add__(self, other: "Seen") -> "Seen":
        if not self.parts:
            return other
        if not other.parts:
            return self
        moments = {name: self.moments[name] + other.moments[name] for name in self.moments}
        return Seen(moments, self.odd + other.odd, self.parts | other.parts)

    def rows(self, name: str) -> Tensor:
        """The kept rows of that name, in the order of the images."""
        return torch.cat([self.parts[start][name] for start in sorted(self.parts)])

    def refuse(self) -> None:
        """UserError where these cannot be a model's images."""
        images, broken, flat, far = self.odd.tolist()
        if broken:
            raise UserError(
                f"{broken:.0f} of {images:.0f} images hold NaN or infinity: the training failed"
            )
        self.moments["own"].refuse()
        same = images > 1 and self.moments["own"].scatter.trace() == 0
        if flat == images or same:
            raise UserError(f"all {images:.0f} images are the same, or of one flat colour each")
        if far > images / 2:
            raise UserError(
                f"{far / images:.0%} of all values lie more than {FAR:.0f} grey levels below black "
                "or above white: the model has diverged"
            )

    def tensors(self) -> dict[str, Tensor]:
        """To be saved or sent."""
        named = {"odd": self.odd}
        for name, moments in self.moments.items():
            named |= {f"moments.{name}.{key}": value for key, value in moments.tensors().items()}
        for start, rows in self.parts.items():
            named |= {f"parts.{start}.{name}": value for name, value in rows.items()}
        return {name: value.cpu() for name, value in named.items()}

    @staticmethod
    def of(tensors: dict[str, Tensor], device: torch.device) -> "Seen":
        """The inverse of tensors, on the device."""
        seen, moments = Seen(odd=tensors["odd"].to(device)), {}
        for name, value in tensors.items():
            kind, *place = name.split(".")
            if kind == "moments":
                moments.setdefault(place[0], {})[place[1]] = value.to(device)
            elif kind == "parts":
                seen.parts.setdefault(int(place[0]), {})[place[1]] = value.to(device)
        seen.moments = {name: Moments.from_tensors(value) for name, value in moments.items()}
        return seen


@dataclass(frozen=True)
class Judge:
    """The extractors, and what they make of the real images."""

    dataset: Real
    extractor: Extractor
    cross: Extractor
    """An untrained network's features: a cross-check that no training can favour."""
    device: torch.device
    train: Tensor
    """(N, D) features of the training images."""
    test: Tensor
    """(M, D) features of the held-out images."""
    real: dict[str, Moments]
    """Moments of the training images' features, as in Seen."""
    bank: Tensor
    """The training images on the device, for the nearest ones."""
    held_out_nearest: Tensor
    """(M, 2): sets.two_nearest of held-out images."""
    data: Data
    """The real images' name, split, number and sha256."""
    more: tuple[Representation, ...] = ()
    """Further extractors, whose distances are further figures."""
    known_balls: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(
        dataset: Real,
        extractor: Extractor,
        cross: Extractor,
        device: torch.device,
        more: Sequence[Extractor] = (),
        statistics: Path | None = None,
    ) -> "Judge":
        """more: further extractors. statistics: a file of saved ones, in place of those of the
        training images; where the dataset is empty they are all that is known."""
        train = reference(dataset.train, extractor, device)
        crossed = reference(dataset.train, cross, device)
        test = reference(dataset.test, extractor, device)
        bank, some = dataset.train.to(device), dataset.test[: KEPT["pixels"]].to(device)
        near = sets.two_nearest(some, bank) if len(some) else torch.zeros(0, 2)
        real = {"own": Moments.of(train), "cross": Moments.of(crossed)}
        data: Data = {
            "name": dataset.spec.name,
            "split": "train",
            "images": len(train),
            "sha256": fingerprint(dataset.train),
        }
        if statistics:
            saved = Moments.saved(statistics, extractor.dim, extractor.sha256)
            real["own"], data["statistics"] = saved.to(device), file_sha256(statistics)
        further = []
        for other in more:
            features = (reference(x, other, device) for x in (dataset.train, dataset.test))
            known, held_out = features
            further.append(Representation(other, known, held_out, Moments.of(known)))
        if dataset.of > len(train):
            data["of"] = dataset.of
        if dataset.spec.background not in ("", Form.background):
            data["background"] = dataset.spec.background
        return Judge(
            dataset, extractor, cross, device, train, test, real, bank, near, data, tuple(further)
        )

    @cached_property
    def some(self) -> Tensor:
        """Features of so many training images, in random order, as are kept of generated ones."""
        random = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.train), generator=random)[: KEPT["features"]]
        return self.train[order.to(self.device)]

    @cached_property
    def kernel_mean(self) -> float:
        return sets.kernel_mean(self.some)

    def balls(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` of `some`, and the radii of their balls among themselves."""
        if count not in self.known_balls:
            some = self.some[:count]
            self.known_balls[count] = some, sets.radius(some, NEIGHBOURS)
        return self.known_balls[count]

    def see(self, x0: Tensor, start: int, codec: Codec) -> Seen:
        """Look at generated images, number `start` onwards: x0 (B, C, H, W), as sampled."""
        values, outside = x0.flatten(1), torch.zeros(len(x0), device=x0.device).double()
        if codec.grey_levels:
            mean, std = codec.grey_levels
            levels = values * std + mean
            outside = ((levels < -FAR) | (levels > 255 + FAR)).double().mean(1)
        images = codec.decode(x0)
        pixels = images.flatten(1)
        odd = [
            torch.ones_like(outside),
            ~values.isfinite().all(1),
            pixels.amax(1) == pixels.amin(1),
        ]
        seen = self.see_images(images, start)
        seen.odd = torch.stack([value.double().sum() for value in (*odd, outside)])
        return seen

    def see_images(self, images: Tensor, start: int = 0) -> Seen:
        """Look at uint8 images (B, C, H, W) on the device, number `start` onwards."""
        ours = self.extractor.extract(images)
        left = {name: max(0, limit - start) for name, limit in KEPT.items()}
        rows = {"features": ours[: left["features"]], "pixels": images[: left["pixels"]]}
        rows["cross"] = self.cross.extract(images[: left["features"]])
        moments = {"own": Moments.of(ours)}
        for i, space in enumerate(self.more):
            features = space.extractor.extract(images)
            moments[f"more{i}"] = Moments.of(features)
            rows[f"more{i}"] = features[: left["features"]]
        odd = torch.zeros(4, dtype=torch.float64, device=images.device)
        return Seen(moments, odd, {start: rows})

    def distance(self, seen: Seen) -> float:
        """The main figure: the Fréchet distance to the training images."""
        return frechet_distance(seen.moments["own"], self.real["own"])

    def uncertainty(self, seen: Seen) -> Uncertainty:
        """How uncertain that distance is."""
        return uncertainty(seen.rows("features"), seen.moments["own"], self.real["own"])

    def others(self, seen: Seen) -> dict[str, float]:
        """The further figures, by name; of images compared with statistics alone there are none."""
        if not len(self.train):
            return {}
        features, cross, near = self._rows(seen)
        figures = self._of_features(features, cross) | self._of_pixels(near) | self.several(seen)
        if seen.moments["own"].count >= 4 * self.extractor.dim:  # else the bias is no small one
            figures["infinity"] = self.distance(seen) - self.uncertainty(seen).bias
        return figures

    def errors(self, seen: Seen) -> dict[str, float]:
        """Standard errors of the further figures, by name."""
        if not len(self.train):
            return {}
        features, cross, near = self._rows(seen)

        def of_features(which: Tensor) -> dict[str, float]:
            which = which.to(features.device)
            return self._of_features(features[which], cross[which])

        errors = jackknife(of_features, len(features))
        errors |= jackknife(lambda which: self._of_pixels(near[which.to(near.device)]), len(near))
        for name in ("memorisation-p_value", "memorisation-copied_floor"):  # no model's figures
            errors.pop(name, None)
        errors["infinity"] = self.uncertainty(seen).variance ** 0.5
        return errors | self.several_errors(seen)

    def _rows(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Of the images that are kept: both features, and distances to the training images."""
        near = sets.two_nearest(seen.rows("pixels"), self.bank)
        return seen.rows("features"), seen.rows("cross"), near

    def _of_features(self, fake: Tensor, cross: Tensor) -> dict[str, float]:
        slices = torch.Generator().manual_seed(0)
        distance = frechet_distance(Moments.of(cross), self.real["cross"])
        figures = {self.cross.name: distance, "kid": sets.kid(fake, self.some, self.kernel_mean)}
        figures["sliced-wasserstein"] = sets.sliced_wasserstein(fake, self.some, SLICES, slices)
        if min(len(fake), len(self.some)) > NEIGHBOURS:
            some, radius = self.balls(len(fake))
            figures |= sets.precision_recall_density_coverage(some, fake, NEIGHBOURS, radius)
        if self.extractor.probabilities:
            probabilities = self.extractor.probabilities(fake)
            figures["classifier-score"] = sets.inception_score(probabilities)
            classes = probabilities.shape[1]
            if classes <= CLASSES:
                counts = probabilities.argmax(1).bincount(minlength=classes)
                figures |= {f"{SHARE}{i}": int(n) / len(fake) for i, n in enumerate(counts)}
        return figures

    def _of_pixels(self, near: Tensor) -> dict[str, float]:
        if not len(self.held_out_nearest):
            return {"memorisation-copied": sets.copied(near)}
        figures = sets.memorisation(near, self.held_out_nearest)
        return {f"memorisation-{name}": value for name, value in figures.items()}

    @cached_property
    def spaces(self) -> dict[str, Representation]:
        """All extractors by the names of what Seen keeps of them: the table's own, and the further
        ones."""
        main = Representation(self.extractor, self.train, self.test, self.real["own"])
        return {"own": main} | {f"more{i}": space for i, space in enumerate(self.more)}

    def several(self, seen: Seen) -> dict[str, float]:
        """The distances by the further extractors, and the ratio over all, where there are any."""
        if not self.more:
            return {}
        distances, count = self._distances(seen), seen.moments["own"].count
        floors = {key: space.floor(count) for key, space in self.spaces.items()}
        return self._named(distances, ratio(distances, floors))

    def several_errors(self, seen: Seen) -> dict[str, float]:
        """Their standard errors."""
        if not self.more:
            return {}
        known = {
            key: uncertainty(
                seen.rows("features" if key == "own" else key), seen.moments[key], space.real
            )
            for key, space in self.spaces.items()
        }
        distances, over = self._distances(seen), self.several(seen)[self._ratio]
        errors = {key: each.variance**0.5 for key, each in known.items()}
        return self._named(errors, over * ratio_error(distances, known))

    def _distances(self, seen: Seen) -> dict[str, float]:
        return {
            k: frechet_distance(seen.moments[k], space.real) for k, space in self.spaces.items()
        }

    @property
    def _ratio(self) -> str:
        return f"{RATIO}{len(self.spaces)}"

    def _named(self, values: dict[str, float], over: float) -> dict[str, float]:
        """What is known by the further extractors and over all, by the figures' names."""
        named = {self.spaces[key].extractor.name: value for key, value in values.items()}
        del named[self.extractor.name]
        return named | {self._ratio: over}

    def floor(self, num_images: int, draws: int) -> tuple[list[float], float]:
        """The main figure of as many real images, drawn anew each time, and its mean's standard
        error.

        The held-out images are themselves a sample: how far another one would move the mean is in
        the error.
        """
        distances = self.spaces["own"].floors(num_images, draws)
        error = torch.tensor(distances, dtype=torch.float64).var() / draws if draws > 1 else 0
        if len(self.test) >= num_images:
            some = self.test[: KEPT["features"]]
            error += uncertainty(some, Moments.of(self.test), self.real["own"]).variance
        return distances, float(error) ** 0.5

    def held_out(self, num_images: int) -> dict[str, float]:
        """The further figures of up to that many held-out images; none where there are too few."""
        images = self.dataset.test[:num_images]
        if len(images) <= 5:
            return {}
        portions = enumerate(images.to(self.device).split(PORTION))
        figures = self.others(reduce(add, (self.see_images(x, PORTION * i) for i, x in portions)))
        return {name: value for name, value in figures.items() if isfinite(value)}


def reference(
    images: Tensor, extractor: Extractor, device: torch.device, cache: Path = CACHE
) -> Tensor:
    """(N, D) features of real images on the device: read from the cache where they are in it."""
    name = f"{extractor.name}-{extractor.sha256[:8]}-{fingerprint(images)[:16]}.safetensors"
    path = cache / "reference" / name
    if not len(images):  # nothing is held out of a small folder
        return torch.zeros(0, extractor.dim, device=device)

    def make() -> tuple[dict[str, Tensor], dict[str, str]]:
        parts = track(
            enumerate(images.split(PORTION)),
            "features of real images",
            lambda item: (min(PORTION * item[0], len(images)), len(images), "images"),
        )
        features = [extractor.extract(part.to(device)) for _, part in parts]
        return {"features": torch.cat(features)}, {}

    return cached(path, make)[0]["features"].to(device)


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
