"""The real images that everything is judged by."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffusion.data import Dataset, ImageSpec
from diffusion.images import Captioned, InMemory, some, spread


@dataclass(frozen=True)
class Real:
    """A dataset in memory: all of it, or an even sample of a source that is larger than SAMPLE."""

    spec: ImageSpec
    train: Tensor
    """(N, C, H, W) uint8."""
    test: Tensor
    train_condition: Mapping[str, Tensor]
    """What is known of each image, by name: (N, ...)."""
    test_condition: Mapping[str, Tensor]
    num_classes: int
    """Of the labels among it; 0 for none."""
    of: int
    """How many training images the source has."""
    source: Dataset | None = None
    """All of it."""

    @staticmethod
    def sample(dataset: Dataset) -> "Real":
        train, test = some(dataset.train), some(dataset.test)
        counts = dataset.num_classes, len(dataset.train)
        return Real(
            dataset.spec,
            train.images,
            test.images,
            train.condition,
            test.condition,
            *counts,
            dataset,
        )

    def given(self, numbers: Tensor) -> dict[str, Tensor]:
        """What generated images number `numbers` are told: as Dataset.given."""
        return self.source.given(numbers) if self.source else {}

    def known(self, some: slice) -> Mapping[str, Tensor]:
        """What is known of those held-out images, their texts too."""
        if self.source is None:
            return {name: rows[some] for name, rows in self.test_condition.items()}
        which = spread(self.source.test, len(self.test))[some]
        return self.source.test.take(which.to(self.source.test.device)).condition

    def captions(self, some: slice) -> list[str]:
        """The captions of those held-out images, "" for none; no list where there are none."""
        test = self.source.test if self.source else None
        if not isinstance(test, Captioned):
            return []
        return test.captions(spread(test, len(self.test))[some])

    @property
    def train_labels(self) -> Tensor | None:
        return self.train_condition.get("label")

    @property
    def test_labels(self) -> Tensor | None:
        return self.test_condition.get("label")


def fingerprint(images: Tensor) -> str:
    """sha256 over the bytes of images."""
    return InMemory(images).fingerprint()
