"""The real images that everything is judged by."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffusion.condition import Condition, Kinds
from diffusion.data import Dataset, ImageSpec
from diffusion.images import Captioned, InMemory, some, spread, with_conditions


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
    """The number of classes of the labels among it; 0 for none."""
    of: int
    """How many training images the source has."""
    source: Dataset | None = None
    """The whole dataset."""

    @staticmethod
    def sample(dataset: Dataset) -> "Real":
        train, test = some(dataset.train), some(dataset.test)
        known = train.condition, test.condition, dataset.num_classes
        return Real(dataset.spec, train.images, test.images, *known, len(dataset.train), dataset)

    def given(self, numbers: Tensor, kinds: Kinds) -> Condition:
        """What images of these numbers are told, of the real images': as Dataset.given has it."""
        return self.source.given(numbers, kinds) if self.source else {}

    def known(self, some: slice, kinds: Kinds) -> Condition:
        """What is known of those held-out images, as far as a model of these kinds is told it."""
        images = self.source.test if self.source else InMemory(self.test, self.test_condition)
        which = spread(images, len(self.test))[some].to(images.device)
        rows = with_conditions(images, kinds).take(which).condition
        return {name: rows[name] for name in kinds if name in rows}

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
