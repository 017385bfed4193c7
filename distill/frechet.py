"""A Fréchet distance that a student is trained by, beside the comparison with its teacher.

Compared image by image, a student says the mean of what it cannot tell apart, and a set of such
means is not spread as the data are. A distance of sets sees that: Heusel et al.'s (2017, eq. 6),
which Mathiasen & Hvilshøj (2020) made a loss; here in features of the teacher's own network, not of
any that judges.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn

from diffusion.batches import Batch
from diffusion.circle import add_noise
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.data import Dataset
from diffusion.images import some
from diffusion.model import Model
from diffusion.training import Nets

ANGLE = 0.1  # at which the teacher sees an image
WIDEST = 1024  # features: a covariance of so many takes thousands of images
MOST = 60_000  # real images
DECAY = 0.99  # a step, of the moments: with 64 images each, they are those of about 12,700
EVERY = 8  # steps from one map to the next
RIDGE = 1e-3  # of a feature's variance, added to every one

Features = Callable[[Tensor, Tensor], Tensor]  # (x0, eps) (B, C, H, W) -> (B, D)


def sums(phi: Tensor) -> Tensor:
    """(D + 1, D + 1) float64: outer products of features (B, D), a 1 behind each, summed.

    Sums of several batches add up; moments reads them.
    """
    one = F.pad(phi.double(), (0, 1), value=1.0)
    return one.T @ one


def moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the mean outer product (D, D)."""
    return sums[-1, :-1] / sums[-1, -1], sums[:-1, :-1] / sums[-1, -1]


def middle(teacher: Model, compile: bool = False) -> Features:
    """What the middle of the teacher's network makes of faintly noisy images.

    Averaged within as many squares as leave at most 1024 features.
    """
    denoiser = teacher.denoiser
    encode = getattr(denoiser.net, "encode", None)
    if encode is None:
        raise UserError(
            "--frechet needs a teacher whose network has an `encode`, as the U-Net has: leave it "
            "out"
        )
    encode = torch.compile(encode) if compile else encode

    def features(x0: Tensor, eps: Tensor) -> Tensor:
        t = torch.full((len(x0),), ANGLE, dtype=torch.float64, device=x0.device)
        h, *_ = denoiser.call(encode, add_noise(x0, eps, t), t)
        side = max(1, min(h.shape[-1], math.isqrt(WIDEST // h.shape[1])))
        return F.adaptive_avg_pool2d(h.float(), side).flatten(1)

    return features


@torch.no_grad()
def of_data(features: Features, dataset: Dataset, flip: bool, device: torch.device) -> Tensor:
    """The sums of training images, every second mirrored where training mirrors half of them."""
    random = torch.Generator(device).manual_seed(0)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for images in some(dataset.train, MOST).images.split(128):
        if flip:
            images = images.clone()
            images[::2] = images[::2].flip(-1)
        x0 = dataset.codec.encode(images.to(device))
        eps = torch.randn(x0.shape, generator=random, device=device)
        total = total + sums(features(x0, eps))
    return total


def root(covariance: Tensor, power: float = 0.5) -> Tensor:
    """That power of a symmetric matrix (D, D) whose eigenvalues are positive but for rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    tiny = torch.finfo(values.dtype).eps * values[-1]
    return (vectors * values.clamp(min=tiny).pow(power)) @ vectors.T


class Frechet(nn.Module):
    """The Fréchet distance d of the student's features from the real ones, as a loss of each image.

    Features are scaled to zero mean and one variance over the data, all together an image's. With R
    and S the covariances of the real ones and of the student's,
    d^2 = |m|^2 + tr(S + R - 2 (S R)^(1/2)), whose gradient in one of N features phi is
    2/N (phi - M(phi)): M(phi) = T (phi - m) with T = R^(1/2) (R^(1/2) S R^(1/2))^(-1/2) R^(1/2) is
    the shortest map of the one normal distribution to the other. So |phi - M(phi)|^2 / 2d, with M
    and d held, has the gradient of d; and m and S may be running averages over many batches.
    """

    centre: Tensor
    scale: Tensor
    real_root: Tensor
    mean: Tensor
    square: Tensor
    map: Tensor
    distance: Tensor
    fresh: Tensor

    def __init__(self, real: Tensor, pixels: int):
        """real: the sums of real features; pixels: values of an image."""
        super().__init__()
        mean, square = moments(real)
        covariance = square - torch.outer(mean, mean)
        std = covariance.diagonal().clamp(min=0).sqrt()
        scale = math.sqrt(pixels / len(mean)) / std.clamp(min=1e-3 * std.max())
        self.ridge = RIDGE * pixels / len(mean)
        covariance = scale[:, None] * covariance * scale
        covariance.diagonal().add_(self.ridge)

        def buffer(name: str, value: Tensor, kept: bool = False) -> None:
            self.register_buffer(name, value, persistent=kept)

        buffer("centre", mean.float())
        buffer("scale", scale.float())
        buffer("real_root", root(covariance))
        # the student's moments; the map is the identity before the first is made
        buffer("mean", torch.zeros_like(mean), kept=True)
        buffer("square", torch.zeros_like(covariance), kept=True)
        buffer("map", torch.eye(len(mean), device=mean.device), kept=True)
        buffer("distance", torch.ones((), device=mean.device), kept=True)
        buffer("fresh", torch.zeros_like(real))  # this step's sums; empty whenever a state is saved

    def forward(self, phi: Tensor) -> Tensor:
        """The loss (B,) of features (B, D), whose moments `follow` takes up."""
        phi = (phi - self.centre) * self.scale
        with torch.no_grad():
            self.fresh += sums(phi)
            aim = (phi - self.mean.float()) @ self.map
        return (phi - aim).square().sum(1) / (2 * self.distance)

    @torch.no_grad()
    def follow(self, nets: Nets, done: int, progress: float = 0.0) -> None:
        """After a step: every process's features join the moments, the same in each."""
        mean, square = moments(reduce(self.fresh, "sum"))
        pace = 1 - min(DECAY, (done - 1) / (done + 9))
        self.mean.lerp_(mean, pace)
        self.square.lerp_(square, pace)
        self.fresh.zero_()
        if done % EVERY == 0:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """The map and the distance that the moments give."""
        covariance = self.square - torch.outer(self.mean, self.mean)
        covariance.diagonal().add_(self.ridge)
        between = self.real_root @ covariance @ self.real_root
        inverse = root(between, -0.5)
        self.map.copy_(self.real_root @ inverse @ self.real_root)
        traces = covariance.trace() + self.real_root.square().sum()
        squared = self.mean.square().sum() + traces - 2 * (between * inverse).sum()
        self.distance.copy_(squared.clamp(min=self.ridge).sqrt())


@dataclass(frozen=True)
class FrechetLoss:
    """The settings of a mode that takes the term."""

    frechet: float = 0.0
    """Weight of a second loss that makes images sharper, the Fréchet distance of the student's
    images from real ones in features of the teacher's network (Mathiasen & Hvilshøj 2020). 0:
    none."""


@dataclass(frozen=True)
class FrechetTerm:
    """What joins a consistency loss: x0, an image whatever the angle, must be spread as images are.

    At the noisier half of a batch's angles, where it is not yet given by x_t. The weight grows with
    the training, from 0, for at first x0 is a blur whose moments say little.
    """

    weight: float
    features: Features
    frechet: Frechet

    def __call__(self, x0: Tensor, batch: Batch, progress: float) -> Tensor:
        """(B,), 0 for the other half.

        The loss of a step is the mean over all B, the zeros too: so `weight` counts half of what it
        would if the mean were over those images that have a term.
        """
        noisy = batch.level.topk((len(x0) + 1) // 2).indices
        eps = batch.eps[noisy].flip(-1, -2)  # upside down: x0 may be made of what lies beneath
        loss = self.weight * progress * self.frechet(self.features(x0[noisy], eps))
        return loss.new_zeros(len(x0)).index_add(0, noisy, loss)


def frechet_term(weight: float, teacher: Model, dataset: Dataset, config: FitConfig) -> FrechetTerm:
    """The term at this weight, with the real images' moments in the teacher's features."""
    features = middle(teacher, config.compile)
    real = of_data(features, dataset, config.flip, teacher.device)
    return FrechetTerm(weight, features, Frechet(real, math.prod(teacher.shape)))
