"""What images are judged by: the extractors, and what they make of the real images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.codec import Codec
from diffusion.console import track
from diffusion.image_file import Form
from diffusion.machine import CACHE
from diffusion.owner import cached
from eval.measure import sets
from eval.measure.agreement import Agreement
from eval.measure.features import Extractor
from eval.measure.inception import file_sha256
from eval.measure.intervals import uncertainty
from eval.measure.metrics import Moments
from eval.measure.real import Real, fingerprint
from eval.measure.seen import FAR, KEPT, Seen
from eval.measure.several import Representation
from eval.results.records import Data

NEIGHBOURS = 5  # in the balls of precision, recall, density and coverage
PORTION = 1000  # images through an extractor at a time


class Asked(NamedTuple):
    """What images should show."""

    labels: Tensor | None = None
    """(B,) the class of each."""
    texts: Sequence[str] = ()
    """A caption for each; none where they have none."""


NOTHING = Asked()


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
    agreement: Agreement | None = None
    """How well an image agrees with a text; None where no network for that was named."""
    known_balls: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(
        dataset: Real,
        extractor: Extractor,
        cross: Extractor,
        device: torch.device,
        more: Sequence[Extractor] = (),
        statistics: Path | None = None,
        agreement: Agreement | None = None,
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
            known, held_out = (reference(x, other, device) for x in (dataset.train, dataset.test))
            further.append(Representation(other, known, held_out, Moments.of(known)))
        if dataset.of > len(train):
            data["of"] = dataset.of
        if dataset.spec.background not in ("", Form.background):
            data["background"] = dataset.spec.background
        if dataset.spec.aspect == "pad":
            data["aspect"] = "pad"
        known = dataset, extractor, cross, device, train, test, real, bank, near, data
        return Judge(*known, tuple(further), agreement)

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

    def see(self, x0: Tensor, start: int, codec: Codec, asked: Asked = NOTHING) -> Seen:
        """Look at generated images, number `start` onwards: x0 (B, C, H, W), as sampled. asked:
        what each should show."""
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
        seen = self.see_images(images, start, asked)
        seen.odd = torch.stack([value.double().sum() for value in (*odd, outside)])
        return seen

    def see_images(self, images: Tensor, start: int = 0, asked: Asked = NOTHING) -> Seen:
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
        kept = slice(0, left["features"])
        if asked.labels is not None:
            rows["asked"] = asked.labels[kept]
        if self.agreement and asked.texts:
            rows["agreement"] = self.agreement(images[kept], asked.texts[kept])
        odd = torch.zeros(4, dtype=torch.float64, device=images.device)
        return Seen(moments, odd, {start: rows})

    @cached_property
    def spaces(self) -> dict[str, Representation]:
        """All extractors by the names of what Seen keeps of them: the table's own, and the further
        ones."""
        main = Representation(self.extractor, self.train, self.test, self.real["own"])
        return {"own": main} | {f"more{i}": space for i, space in enumerate(self.more)}

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
