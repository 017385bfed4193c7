"""Further extractors beside the table's own, and one ratio over all of them.

One representation can be gamed, or blind: FD-loss (arXiv 2604.28190) therefore proposes to judge by
several at once, FDr^k. Here that is the geometric mean, over the k extractors, of the distance over
its floor: the distance of as many real images in the same features. It is 1 for real images, and
no extractor's scale or number of features weighs more than another's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, log
from statistics import mean

import torch
from torch import Tensor

from eval.measure.features import Extractor
from eval.measure.metrics import Moments, frechet_distance
from eval.results.records import Uncertainty

DRAWS = 8  # of real images, for the floor of each in the ratio


@dataclass(frozen=True)
class Representation:
    """An extractor with what it makes of the real images."""

    extractor: Extractor
    train: Tensor
    """(N, D) features; none where statistics alone are known."""
    test: Tensor
    """(M, D)"""
    real: Moments
    """What distances are to: moments of the training images, or saved ones."""
    known_floors: dict[int, float] = field(default_factory=dict)

    def floors(self, num_images: int, draws: int) -> list[float]:
        """The distance of as many real images, drawn anew each time.

        Held-out images where they are enough, else training images with replacement, which as
        distances go is the stricter floor; of statistics alone, vectors of their Gaussian.
        """
        distances = []
        for seed in range(draws):
            random = torch.Generator().manual_seed(seed)
            if len(self.test) >= num_images:
                which = torch.randperm(len(self.test), generator=random)[:num_images]
                features = self.test[which.to(self.test.device)]
            elif len(self.train):
                which = torch.randint(len(self.train), (num_images,), generator=random)
                features = self.train[which.to(self.train.device)]
            else:
                root = self.real.root
                noise = torch.randn(num_images, root.shape[1], generator=random).to(root)
                features = self.real.mean + noise @ root.T
            distances.append(frechet_distance(Moments.of(features), self.real))
        return distances

    def floor(self, num_images: int) -> float:
        """The mean of a few draws, kept."""
        if num_images not in self.known_floors:
            self.known_floors[num_images] = mean(self.floors(num_images, DRAWS))
        return self.known_floors[num_images]


def ratio(distances: Mapping[str, float], floors: Mapping[str, float]) -> float:
    """The geometric mean of the distances over their floors, by name."""
    return exp(mean(log(distances[name] / floors[name]) for name in distances))


def ratio_error(distances: Mapping[str, float], known: Mapping[str, Uncertainty]) -> float:
    """The ratio's standard error, as a share of it, by the delta method: the distances are of the
    same images, whose influences on each of them are added block by block."""
    shares = [
        torch.tensor(known[name].influence, dtype=torch.float64) / distances[name]
        for name in distances
    ]
    return float(torch.stack(shares).mean(0).std())
