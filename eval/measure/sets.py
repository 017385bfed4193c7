"""Further comparisons of a set of generated images with a set of real ones: pure functions.

Both sets are on one device and are compared tile by tile, so memory grows with the sets and never
with the product of their counts. Vectors are compared in their own precision; of images the nearest
are found in float32, whose rounding is far below a grey level, and their distances are then exact.
"""

from collections.abc import Iterator
from itertools import product

import torch
from scipy.stats import mannwhitneyu
from torch import Generator, Tensor

from diffusion.console import UserError

TILE = 4096  # rows of each set: 4096 x 4096 pairs are 64 MiB in float32


def kid(a: Tensor, b: Tensor, within_b: float | None = None) -> float:
    """Unbiased MMD^2 with the kernel k(x, y) = (x . y / D + 1)^3 (Bińkowski et al. 2018, eq. 4).

    Over all pairs, where the paper averages over subsets: the same expectation and less variance,
    and nothing is drawn. Unbiased, so near zero it may be negative. a: (N, D), b: (M, D).
    within_b: kernel_mean(b), where it is known.
    """
    within_b = kernel_mean(b) if within_b is None else within_b
    return kernel_mean(a) + within_b - 2 * _kernel_sum(a, b) / (len(a) * len(b))


def kernel_mean(a: Tensor) -> float:
    """The mean of KID's kernel over pairs of different vectors of one set."""
    diagonal = float(_kernel(a.square().sum(1), a.shape[1]).sum(dtype=torch.float64))
    return (_kernel_sum(a, a) - diagonal) / (len(a) * (len(a) - 1))


def _kernel(dots: Tensor, dim: int) -> Tensor:
    return dots.div_(dim).add_(1).pow_(3)


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    return sum(
        float(_kernel(x @ y.T, a.shape[1]).sum(dtype=torch.float64)) for *_, x, y in _tiles(a, b)
    )


def inception_score(probabilities: Tensor) -> float:
    """exp(mean_x KL(p(y|x) || p(y))), from 1 to K (Salimans et al. 2016, sec. 4).

    KL's mean is the entropy of the mean less the mean of the entropies. Over the whole set, not
    ten splits. The name is the Inception network's: of another classifier say which.

    probabilities: (N, K), rows sum to 1.
    """
    p = probabilities.double()
    return float((torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()).exp())


def precision_recall_density_coverage(
    real: Tensor, fake: Tensor, k: int = 5, real_radius: Tensor | None = None
) -> dict[str, float]:
    """Four shares that part fidelity from diversity; a set against itself has all four at 1.

    An image's ball reaches to its k-th nearest other image of its own set, edge excluded.
    precision: of fake images in some real image's ball; recall: of real images in some fake
    image's ball (Kynkäänniemi et al. 2019, eqs. 1-2). density: real balls around a fake image,
    over k, may exceed 1; coverage: of real images with a fake one in their ball (Naeem et al.
    2020). All four depend on the counts and on k: compare at equal ones.

    real: (N, D), fake: (M, D), both of more than k. real_radius: radius(real, k), if it is known.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(
            f"a ball of {k} neighbours takes more than {k} images, "
            f"got {len(real)} real and {len(fake)} fake: add images"
        )
    real_radius = radius(real, k) if real_radius is None else real_radius
    fake_radius = radius(fake, k)
    balls = real_radius.new_zeros(
        len(fake), dtype=torch.float64
    )  # real ones around each fake image
    recalled, covered = (torch.zeros_like(real_radius, dtype=torch.bool) for _ in range(2))
    for rows, columns, x, y in _tiles(real, fake):
        distance = _distances(x, y)
        inside = distance < real_radius[rows, None]
        balls[columns] += inside.sum(0)
        covered[rows] |= inside.any(1)
        recalled[rows] |= (distance < fake_radius[columns]).any(1)
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(balls.mean()) / k,
        "coverage": float(covered.double().mean()),
    }


def radius(x: Tensor, k: int) -> Tensor:
    """The distance of each vector to its k-th nearest other one (N,)."""
    return _nearest(x, x, k + 1)[0][:, -1]


def sliced_wasserstein(a: Tensor, b: Tensor, num_slices: int, generator: Generator) -> float:
    """The mean over random directions of the squared W2 of the projections (Bonneel et al. 2015).

    In one dimension W2^2 = integral over u of (F^-1(u) - G^-1(u))^2. Both quantile functions are
    steps, so the sum over the stretches between steps is exact, whatever the two counts; for
    equal counts it pairs the sorted values. A shift by s gives |s|^2 / D in expectation.

    a: (N, D), b: (M, D).
    """
    n, m, dim = len(a), len(b), a.shape[1]
    directions = torch.randn(dim, num_slices, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(a.device)
    # in units of 1 / (n m) the steps are whole numbers: no rounding tears two equal ones apart
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = ends.diff(prepend=ends.new_zeros(1))
    in_a, in_b = ((ends - 1) // m).to(a.device), ((ends - 1) // n).to(a.device)
    weights = (widths.double() / (n * m)).to(a.device)
    total = 0.0
    for part in directions.split(max(1, TILE**2 // (n + m)), dim=1):
        x, y = (torch.cat([part.T @ rows.double().T for rows in z.split(TILE)], 1) for z in (a, b))
        gap = x.sort().values[:, in_a] - y.sort().values[:, in_b]
        total += float((gap.square() @ weights).sum())
    return total / num_slices


def nearest(images: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """RMS grey levels to the nearest image of the bank (N,) float64, and its index (N,).

    images: (N, C, H, W) uint8, bank: (M, C, H, W) uint8.
    """
    distance, index = _nearest_images(images, bank, 1)
    return distance[:, 0] / images[0].numel() ** 0.5, index[:, 0]


def two_nearest(images: Tensor, bank: Tensor) -> Tensor:
    """Distances to the nearest and the second nearest image of the bank (N, 2), in pixels."""
    return _nearest_images(images, bank, 2)[0]


def _nearest_images(images: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As _nearest, of uint8 images."""
    images, bank = images.flatten(1), bank.flatten(1)
    _, index = _nearest(images, bank, k)
    distance = (images[:, None].double() - bank[index].double()).norm(dim=2)
    distance, order = distance.sort(1)
    return distance, index.gather(1, order)


def memorisation(ours: Tensor, held_out: Tensor) -> dict[str, float]:
    """Whether generated images lie nearer to the training images than held-out images do.

    ratio: median distance to the nearest training image, of generated over held-out images;
    1 for fresh images, 0 for copies. nearer: the probability that a generated image is nearer
    than a held-out one, a half for fresh images, and p_value of so high a one by Mann-Whitney's
    test (Meehan et al. 2020, in one cell). These three see the bulk, and smoothness can bring it
    near without a copy: flat grey is nearer to noisy images than they are to each other.
    copied sees single images: the share that `copied` has, beside the held-out images' share,
    copied_floor. It misses copies of an image that the training set holds twice in slightly
    different form.

    ours, held_out: (N, 2), two_nearest of either among the training images.
    """
    near, usual = ours[:, 0].cpu(), held_out[:, 0].cpu()
    farther, p_value = mannwhitneyu(
        near.numpy(), usual.numpy(), alternative="less", method="asymptotic"
    )
    return {
        "ratio": float(near.quantile(0.5) / usual.quantile(0.5)),
        "nearer": 1 - float(farther) / (len(near) * len(usual)),
        "p_value": float(p_value),
        "copied": copied(ours),
        "copied_floor": copied(held_out),
    }


def copied(near: Tensor) -> float:
    """The share of images at most a third as far from the nearest image of a bank as from the
    second (Yoon et al. 2023). near: (N, 2), two_nearest of them."""
    first, second = near.T
    return float((first <= second / 3).double().mean())


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(rows, columns, a[rows], b[columns]) over all pairs of tiles, row by row."""
    for i, j in product(range(0, len(a), TILE), range(0, len(b), TILE)):
        rows, columns = slice(i, i + TILE), slice(j, j + TILE)
        yield rows, columns, _real(a[rows]), _real(b[columns])


def _real(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, by the product of matrices."""
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")


def _nearest(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k vectors of b nearest to each of a: distances (N, k), ascending, and indices (N, k)."""
    distance = torch.full((len(a), k), torch.inf, dtype=_real(a[:0]).dtype, device=a.device)
    index = torch.zeros((len(a), k), dtype=torch.long, device=a.device)
    for rows, columns, x, y in _tiles(a, b):
        near, where = _distances(x, y).topk(min(k, len(y)), largest=False)
        best = torch.cat([distance[rows], near], 1)
        number = torch.cat([index[rows], where + columns.start], 1)
        distance[rows], kept = best.topk(k, largest=False)
        index[rows] = number.gather(1, kept)
    return distance, index
