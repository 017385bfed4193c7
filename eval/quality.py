"""What is measured of a set of images, against real ones: distances, fidelity and diversity, copies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.data import Dataset
from eval import sets
from eval.features import Extractor
from eval.metrics import Moments, frechet_distance

SLICES = 256


@dataclass(frozen=True)
class Judge:
    """The extractors, and what they make of the real images."""

    dataset: Dataset
    extractor: Extractor
    cross: Extractor
    """An untrained network's features: a cross-check that no training can favour."""
    train: Tensor
    """(N, D) features of the training images."""
    real: Moments
    cross_real: Moments
    device: torch.device

    @staticmethod
    def of(
        dataset: Dataset, extractor: Extractor, cross: Extractor, device: torch.device
    ) -> "Judge":
        train = features(dataset.train, extractor, device)
        crossed = Moments.of(features(dataset.train, cross, device))
        return Judge(dataset, extractor, cross, train, Moments.of(train), crossed, device)

    def distance(self, images: Tensor) -> float:
        """The main figure: the Fréchet distance to the training images."""
        return frechet_distance(
            Moments.of(features(images, self.extractor, self.device)), self.real
        )

    def others(self, images: Tensor) -> dict[str, float]:
        """The further figures of (N, C, H, W) uint8 images, by name."""
        fake = features(images, self.extractor, self.device)
        random = torch.Generator().manual_seed(0)
        some = torch.randperm(len(self.train), generator=random)[: len(fake)].to(self.device)
        slices = torch.Generator(self.device).manual_seed(0)
        crossed = Moments.of(features(images, self.cross, self.device))
        figures = {self.cross.name: frechet_distance(crossed, self.cross_real)}
        figures["kid"] = sets.kid(fake, self.train)
        figures["sliced-wasserstein"] = sets.sliced_wasserstein(fake, self.train, SLICES, slices)
        figures |= sets.precision_recall_density_coverage(self.train[some], fake)
        if self.extractor.probabilities:
            parts = images.split(1000)
            shares = [self.extractor.probabilities(part.to(self.device)) for part in parts]
            figures["classifier-score"] = sets.inception_score(torch.cat(shares))
        if len(fake) >= 4 * self.extractor.dim:
            thinned = torch.Generator().manual_seed(0)
            figures["infinity"] = sets.frechet_infinity(fake, self.real, thinned)
        if len(self.dataset.test):
            bank = (images, self.dataset.train, self.dataset.test)
            near = sets.memorisation(*(part.to(self.device) for part in bank))
            figures |= {f"memorisation-{name}": value for name, value in near.items()}
        return figures


def features(images: Tensor, extractor: Extractor, device: torch.device) -> Tensor:
    """(N, D) float32 on the device."""
    return torch.cat([extractor.extract(part.to(device)) for part in images.split(1000)])


def real_draws(dataset: Dataset, num_images: int, draws: int) -> list[Tensor]:
    """As many real images, drawn anew each time, for floors.

    Held-out images where they are enough, else training images with replacement, which as
    distances go is the stricter floor.
    """
    held_out = len(dataset.test) >= num_images
    images, found = dataset.test if held_out else dataset.train, []
    for seed in range(draws):
        random = torch.Generator().manual_seed(seed)
        if held_out:
            which = torch.randperm(len(images), generator=random)[:num_images]
        else:
            which = torch.randint(len(images), (num_images,), generator=random)
        found.append(images[which])
    return found


def held_out(dataset: Dataset, num_images: int) -> Tensor | None:
    """Up to that many held-out images, which figures of diversity and copies are set beside."""
    return dataset.test[:num_images] if len(dataset.test) > 5 else None


def warnings(others: dict[str, float], real: dict[str, float]) -> list[str]:
    """What a reader of the table must not miss: a set that lost its diversity, or holds copies.

    Collapse: coverage below half of the held-out images'. Copies: more than three times as many
    as among the held-out images, and at least 1 in 50.
    """
    found = []
    if "coverage" in real and others.get("coverage", 1.0) < real["coverage"] / 2:
        found.append("collapsed")
    copied = others.get("memorisation-copied", 0.0)
    if copied > max(0.02, 3 * others.get("memorisation-copied_floor", 1.0)):
        found.append("copies")
    return found
