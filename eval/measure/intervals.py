"""95 % intervals of a Fréchet distance, of other figures and of ratios.

What an interval of a distance covers is the drawing of the generated images, which is also what a
seed of the noise changes; several seeds are so many more images. It holds the expected distance of
so many images of this model; less the bias, it holds the distance of infinitely many. The real
images are one and the same for all rows, and are taken as they are.

How: to first order the distance of N images moves with each of them by its influence (von Mises
1947; Hampel 1974), which is known in closed form. Near zero, where the first order vanishes, the
second takes over: a kernel of pairs of images, whose diagonal is the bias and whose square is the
variance (Serfling 1980, sec. 5.5 and 6.4). An influence is taken at the measured moments, not at
the true ones, which counts the second order's variance twice too often; it is subtracted once. And
since the first order's variance grows with the distance, the interval is the set of distances that
the measured one does not contradict (a score interval, Wilson 1927), not a symmetric one.
tests/test_intervals.py holds it against Gaussians whose distance is known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, sqrt

import torch
from scipy.stats import t as student
from torch import Tensor

from eval.measure.metrics import Moments
from eval.results.records import BLOCKS, Uncertainty

LEVEL = 0.95
GROUPS = 20  # of the jackknife
Z = 1.959964  # normal quantile at (1 + LEVEL) / 2

Interval = tuple[float, float]


def uncertainty(rows: Tensor, fake: Moments, real: Moments) -> Uncertainty:
    """The uncertainty of frechet_distance(fake, real), from a part of the fake images.

    With S and R the covariances and G G^T = R, the roots of G^T S G's eigenvalues are lam, its
    eigenvectors U, and an image's deviation x from the mean m has coordinates u = U^T G^T x. The
    influence is 2 x.(m - m_R) + |x|^2 - sum u_i^2 / lam_i, for the derivative of the distance by S
    is I - T, T the optimal map from one Gaussian to the other (Olkin & Pukelsheim 1982). The
    second derivative makes the kernel x.y + 1/2 sum_ij u_i u_j v_i v_j / (lam_i lam_j (lam_i +
    lam_j)), centred; its sum over i and j is an integral over s of squares, since 1 / a is that
    of exp(-a s), and the trapezoid rule in log s gives it to 1 in 1000.

    rows: (n, D) features of the first n of the images, in order. fake: moments of all of them.
    """
    x, factor = rows.to(fake.mean.device, torch.float64) - fake.mean, real.root
    squares, vectors = torch.linalg.eigh(factor.T @ fake.covariance @ factor)
    lam = squares.clamp(min=1e-12 * float(squares[-1])).sqrt().clamp(min=1e-150)
    u = x @ (factor @ vectors)
    influence = 2 * x @ (fake.mean - real.mean) + x.square().sum(1) - (u.square() / lam).sum(1)
    kernel, end = x @ x.T, -log(2 * float(lam[-1]))
    for tau in torch.arange(end - 8, 3 - log(2 * float(lam[0])), 1.0):
        part = u * (torch.exp(-tau.exp() * lam / 2) / lam.sqrt())
        kernel += 0.5 * float(tau.exp()) * (part @ part.T).square()
    kernel -= kernel.mean(0)
    kernel -= kernel.mean(1, keepdim=True)
    n, trace = len(x), kernel.diagonal()
    growth = 4 * float(torch.linalg.eigvalsh(kernel)[-1]) / n / fake.count
    pairs = float(kernel.square().sum() - trace.square().sum()) / (n * (n - 1))
    first, second = float(influence.var()) / fake.count, 2 * pairs / fake.count**2
    sums = torch.stack([part.mean() for part in influence.tensor_split(min(BLOCKS, n))])
    scale = sqrt(max(first - second, second)) / float(sums.std()) if sums.std() > 0 else 0.0
    blocks = ((sums - sums.mean()) * scale).tolist()
    bias = float(trace.sum()) / (n - 1) / fake.count
    return Uncertainty(bias, first, second, growth, [float(f"{value:.3g}") for value in blocks])


def pooled(each: Sequence[Uncertainty]) -> Uncertainty:
    """The uncertainty of the mean distance of several seeds; the blocks of one after another's."""
    count = len(each)
    return Uncertainty(
        sum(one.bias for one in each) / count,
        sum(one.first for one in each) / count**2,
        sum(one.second for one in each) / count**2,
        sum(one.growth for one in each) / count**2,
        [value / count for one in each for value in one.influence],
    )


def distance_interval(distance: float, known: Uncertainty) -> Interval:
    """The interval of the expected distance of as many images; less known.bias, that of the
    distance itself.

    It holds each distance theta with |distance - bias - theta| <= Z sqrt(growth theta + second).
    The variance grows from `second` at 0: as measured where the distance is well above its noise,
    and near zero, where that is noise itself, as fast as it can.
    """
    estimate, noise = distance - known.bias, sqrt(known.second)
    rise, run = max(known.first - 2 * known.second, 0.0), max(estimate, 0.0) + noise / 2
    growth = (rise + noise / 2 * known.growth) / run if run > 0 else 0.0
    shift = Z**2 * growth / 2
    half = sqrt(max(shift**2 + Z**2 * (growth * estimate + known.second), 0.0))
    middle = distance + shift
    return middle - half, middle + half


def jackknife(figure: Callable[[Tensor], dict[str, float]], count: int) -> dict[str, float]:
    """Standard errors of figures of `count` images, by leaving out each of GROUPS groups in turn
    (Tukey 1958; Efron & Stein 1981, by whom it errs to the large side).

    figure: of the images whose indices (K,) it is given.
    """
    index = torch.arange(count)
    groups = index.tensor_split(min(GROUPS, count))
    kept = torch.ones(count, dtype=torch.bool)
    values: dict[str, list[float]] = {}
    for group in groups:
        kept[group] = False
        for name, value in figure(index[kept]).items():
            values.setdefault(name, []).append(value)
        kept[group] = True
    errors = {}
    for name, some in values.items():
        if len(some) == len(groups):
            spread = torch.tensor(some, dtype=torch.float64).var(correction=0)
            errors[name] = float((spread * (len(groups) - 1)).sqrt())
    return errors


def quantile(freedom: float) -> float:
    """Student's t at LEVEL, two-sided."""
    return float(student.ppf((1 + LEVEL) / 2, freedom))


@dataclass(frozen=True)
class Estimate:
    """A figure with its variance, and what it shares with others of the same noise."""

    value: float
    variance: float
    blocks: list[float]
    """The blocks that Uncertainty has; empty where nothing is shared."""
    freedom: float = BLOCKS - 1
    """Degrees of freedom of the variance."""

    def covariance(self, other: "Estimate") -> float:
        """The covariance of their blocks, where these are of the same images' noise."""
        if len(self.blocks) != len(other.blocks):
            return 0.0
        products = sum(a * b for a, b in zip(self.blocks, other.blocks, strict=True))
        return products / (min(BLOCKS, len(self.blocks)) - 1) if self.blocks else 0.0

    def interval(self) -> Interval:
        """Symmetric, by Student's t."""
        half = quantile(self.freedom) * sqrt(self.variance)
        return self.value - half, self.value + half

    def less(self, other: "Estimate") -> "Estimate":
        """The difference, of which the other shares nothing with a third."""
        both = self.variance + other.variance - 2 * self.covariance(other)
        return Estimate(
            self.value - other.value, max(both, 0.0), [], min(self.freedom, other.freedom)
        )


def tied(a: Estimate, b: Estimate) -> bool:
    """Whether the interval of their difference holds 0."""
    low, high = a.less(b).interval()
    return low <= 0 <= high


NO_FLOOR = Estimate(0.0, 0.0, [])


def ratio_interval(a: Estimate, b: Estimate, floor: Estimate = NO_FLOOR) -> Interval | None:
    """The ratios (a - floor) / (b - floor) that the figures do not contradict.

    By Fieller (1954): all rho with (a - rho b)^2 <= t^2 Var(a - rho b). None where they are no
    bounded interval, since b is not known to differ from 0.
    """
    top, bottom = (each.value - floor.value for each in (a, b))
    top_variance, bottom_variance = (each.variance + floor.variance for each in (a, b))
    shared = a.covariance(b) + floor.variance
    squared = quantile(min(a.freedom, b.freedom)) ** 2
    leading = bottom**2 - squared * bottom_variance
    if leading <= 0:
        return None
    middle = top * bottom - squared * shared
    inside = middle**2 - leading * (top**2 - squared * top_variance)
    half = sqrt(max(inside, 0.0))
    return (middle - half) / leading, (middle + half) / leading


def of_trainings(each: Sequence[Estimate]) -> Estimate:
    """The mean of several trainings of one recipe, as an estimate of what such a training gives.

    Trainings are a random effect: the variance of their mean, as it is seen, holds what differs
    between trainings and between their images. What the noise that they share does to all of them
    alike is added, as the mean covariance of their blocks; without blocks, as all of it. Degrees of
    freedom by Satterthwaite (1946). One training alone stands for itself.
    """
    count = len(each)
    if count == 1:
        return each[0]
    value = sum(one.value for one in each) / count
    between = sum((one.value - value) ** 2 for one in each) / (count - 1) / count
    pairs = [a.covariance(b) for i, a in enumerate(each) for b in each[:i]]
    common = max(sum(pairs) / len(pairs), 0.0)
    if not any(one.blocks for one in each):
        common = sum(one.variance for one in each) / count
    total = between + common
    freedom: float = count - 1
    if total > 0:
        freedom = total**2 / (between**2 / (count - 1) + common**2 / (BLOCKS - 1))
    lengths = {len(one.blocks) for one in each}
    blocks = [sum(values) / count for values in zip(*(one.blocks for one in each), strict=False)]
    return Estimate(value, total, blocks if len(lengths) == 1 else [], freedom)
