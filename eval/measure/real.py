"""The real images that everything is judged by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from diffusion.condition import Kinds
from diffusion.data import Dataset, ImageSpec
from diffusion.images import InMemory, some


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
    given: Callable[[Tensor, Kinds], Mapping[str, Tensor]] = lambda numbers, kinds: {}
    """What images of these numbers are told, of the real images': as Dataset.given has it."""

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
            dataset.given,
        )

    @property
    def train_labels(self) -> Tensor | None:
        return self.train_condition.get("label")

    @property
    def test_labels(self) -> Tensor | None:
        return self.test_condition.get("label")


def fingerprint(images: Tensor) -> str:
    """sha256 over the bytes of images."""
    return InMemory(images).fingerprint()
