"""Samplers: (denoise, noise, angles) -> x0 (B, C, H, W).

denoise: (x_t, t scalar) -> x0, or with variance=True, which ancestral-learned alone asks, (x0,
share) as diffusion.denoiser has it. noise: an iterator over standard normal images; its first is
where sampling starts. angles: (N + 1,) float64, ascending from 0. Every solver here is a rotation
towards some x0; they differ in which x0. The last, to s = 0, ends at that x0 itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion.circle import FROM_X0, add_noise, broadcast, rotate
from diffusion.condition import Condition
from diffusion.schedules import even, respace, truncated

Denoise = Callable[[Tensor, Tensor], Tensor]
Noises = Iterator[Tensor]


def descent(angles: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps t -> s from the noisy end down to the first angle above 0."""
    for i in range(len(angles) - 1, 1, -1):
        yield angles[i], angles[i - 1]


def ddim(denoise: Denoise, noise: Noises, angles: Tensor, eta: float = 0.0) -> Tensor:
    """Song et al. 2021, eq. 12 and 16: N calls. eta = 0 is deterministic, 1 is ancestral DDPM."""
    x = next(noise)
    for t, s in descent(angles):
        x0 = denoise(x, t)
        x = renewing_step(x, x0, t, s, next(noise), eta) if eta else rotate(x, x0, t, s)
    return denoise(x, angles[1])


def ancestral_learned(denoise: Callable, noise: Noises, angles: Tensor) -> Tensor:
    """Ancestral steps whose variance the network chooses (Nichol & Dhariwal 2021, eq. 15): N calls.

    beta is (sin t / sin s)^2 times the posterior's variance, so that exp(log-variance / 2) is the
    posterior's deviation times (sin t / sin s)^share: ancestral sampling itself at a share of 0.
    The best share of short steps is Var[x0 | x_t] / sin^2 t, whatever their length, so that one
    learnt on 1000 steps serves fewer.
    """
    x = next(noise)
    for t, s in descent(angles):
        x0, share = denoise(x, t, variance=True)
        x = renewing_step(x, x0, t, s, broadcast(t.sin() / s.sin(), share) ** share * next(noise))
    return denoise(x, angles[1])


def heun(denoise: Denoise, noise: Noises, angles: Tensor) -> Tensor:
    """Second order, 2 N - 1 calls: Karras et al. 2022, algorithm 1 (no churn), on the circle.

    Their trapezoid rule is in sigma = tan t; here it is in cot t, where a rotation's x0 is the
    plain mean of D at both ends. That is finite at t = pi/2, and at few calls far better (on
    8x8 digits at 7 calls, a Frechet distance of 1.3 where theirs gives 3.5 to 7). The last step
    needs no second call: D(x, 0) = x.
    """
    x = next(noise)
    for t, s in descent(angles):
        x0 = denoise(x, t)
        x0_s = denoise(rotate(x, x0, t, s), s)
        x = rotate(x, (x0 + x0_s) / 2, t, s)
    return denoise(x, angles[1])


def dpm_solver(denoise: Denoise, noise: Noises, angles: Tensor) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2: N calls, second order, last step first order.

    The x0 is extrapolated linearly in lambda = -log tan t from this call and the one before.
    """
    x, lambdas, calls = next(noise), -angles.tan().log(), []
    for i in range(len(angles) - 1, 1, -1):
        t, s = angles[i], angles[i - 1]
        calls = [*calls[-1:], denoise(x, t)]
        x = rotate(x, _predicted(calls, lambdas[i - 1 : i + 2]), t, s)
    return denoise(x, angles[1])


def unipc(denoise: Denoise, noise: Noises, angles: Tensor) -> Tensor:
    """UniPC-2 (B2, data prediction), Zhao et al. 2023, algorithms 5 and 6: N calls, third order.

    Its predictor is DPM-Solver++(2M). Each call but the last also corrects the step that led to
    it, which is made again with the parabola through three calls; the first step has two, and
    takes their mean as heun does.
    """
    start = x = next(noise)
    lambdas, calls = -angles.tan().log(), []
    for i in range(len(angles) - 1, 1, -1):
        t, s = angles[i], angles[i - 1]
        calls = [*calls[-2:], denoise(x, t)]
        if len(calls) > 1:
            start = rotate(start, _corrected(calls, lambdas[i : i + 3]), angles[i + 1], t)
        x = rotate(start, _predicted(calls, lambdas[i - 1 : i + 2]), t, s)
    return denoise(x, angles[1])


def _predicted(calls: list[Tensor], lambdas: Tensor) -> Tensor:
    """The x0 half a step on, on the line in lambda through the last two calls.

    lambdas: of the step's end, of the last call and of the one before, as angles ascend.
    """
    if len(calls) < 2:
        return calls[-1]
    then, now, before = lambdas
    ratio = (then - now) / (now - before)
    return torch.lerp(calls[-2], calls[-1], broadcast(1 + ratio / 2, calls[-1]))


def _corrected(calls: list[Tensor], lambdas: Tensor) -> Tensor:
    """The mean x0 of a step made, weighted by e^lambda, on the parabola through three calls.

    The last two were made at the step's ends, u = 0 and 1; the first before it, at u < 0. lambdas:
    of the three calls from the last to the first, as angles ascend.
    """
    if len(calls) < 3:
        return (calls[0] + calls[1]) / 2
    then, now, before = lambdas
    h = then - now
    u = (before - now) / h
    mean = -1 / torch.expm1(-h) - 1 / h
    mean_square = -1 / torch.expm1(-h) - 2 * mean / h
    rise = calls[2] - calls[1]
    bend = broadcast(1 / u, rise) * (calls[0] - calls[1]) - rise
    curved = (mean_square - mean) / (u - 1)
    return calls[1] + broadcast(mean, rise) * rise + broadcast(curved, rise) * bend


def predictor_corrector(
    denoise: Denoise, noise: Noises, angles: Tensor, ratio: float = 0.16
) -> Tensor:
    """Song et al. 2021b, algorithms 3 and 5: ancestral steps, each followed by a Langevin step.

    2 N - 1 calls. Their factor alpha_i of the Langevin step's length, 0.98 to 1 on their 1000
    steps, is left out: on few steps it would leave out the corrector.
    """
    x = next(noise)
    for t, s in descent(angles):
        x = renewing_step(x, denoise(x, t), t, s, next(noise))
        x = langevin_step(x, FROM_X0["score"](x, denoise(x, s), s), next(noise), ratio)
    return denoise(x, angles[1])


def stochastic(denoise: Denoise, noise: Noises, angles: Tensor) -> Tensor:
    """Two steps down the list in one rotation, one back up by fresh noise: N calls.

    The sampler of Meng et al. 2023, section 3.3, for models distilled to deterministic steps
    twice as long as the list's.
    """
    x = next(noise)
    for i in range(len(angles) - 1, 1, -1):
        t, u, s = angles[i], angles[i - 1], angles[i - 2]
        x = diffuse(rotate(x, denoise(x, t), t, s), next(noise), s, u)
    return denoise(x, angles[1])


def consistency(denoise: Denoise, noise: Noises, angles: Tensor) -> Tensor:
    """Song et al. 2023, algorithm 1: N calls, each to x0, with fresh noise in between."""
    x0 = denoise(next(noise), angles[-1])
    for t in angles[1:-1].flip(0):
        x0 = denoise(add_noise(x0, next(noise), t), t)
    return x0


def renewing_step(
    x: Tensor, x0: Tensor, t: Tensor, s: Tensor, z: Tensor, eta: float = 1.0
) -> Tensor:
    """A rotation t -> s on which a share of the noise's amplitude is drawn anew.

    Song et al. 2021, eq. 16; eta = 1 samples DDPM's posterior (Ho et al. 2020, eq. 7).
    """
    fresh = eta * ((t - s).sin() * (t + s).sin()).sqrt() / (t.sin() * s.cos())
    kept = (1 - fresh.square()).clamp(min=0).sqrt()
    eps = broadcast(kept, x) * FROM_X0["eps"](x, x0, t) + broadcast(fresh, x) * z
    return add_noise(x0, eps, s)


def diffuse(x_s: Tensor, z: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """A sample of x_t given x_s, s <= t: the forward process (Ho et al. 2020, eq. 2)."""
    added = ((t - s).sin() * (t + s).sin()).sqrt() / s.cos()
    return broadcast(t.cos() / s.cos(), x_s) * x_s + broadcast(added, z) * z


def langevin_step(x: Tensor, score: Tensor, z: Tensor, ratio: float) -> Tensor:
    """x + e score + sqrt(2 e) z, e = 2 (ratio |z| / |score|)^2 (Song et al. 2021b, algorithm 5).

    The norms are each image's own, where theirs are the batch's means: no image depends on others.
    """
    size = 2 * (ratio * z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)).square()
    return x + broadcast(size, x) * score + broadcast((2 * size).sqrt(), x) * z


def one_call(steps: int) -> int:
    return steps


def two_calls(steps: int) -> int:
    """Two a step, but one for the last."""
    return 2 * steps - 1


@dataclass(frozen=True)
class Solver:
    """A sampler, what it asks of a model, and how it spends a budget of network calls."""

    run: Callable[[Callable, Noises, Tensor], Tensor]
    """(denoise, noise, angles ascending from 0) -> x0."""
    needs: frozenset[str]
    """The abilities of a model that it may run at any angles. denoise: D(x_t, t) is the mean of the
    images that x_t may be from; jump: f(x_t, t) is where the ODE ends; variance: it predicts one
    too."""
    calls: Callable[[int], int] = one_call
    """Sampler steps -> the network calls that it claims."""
    space: Callable[[Tensor, int], Tensor] = respace
    """(schedule, number of steps) -> angles."""

    def steps(self, nfe: int) -> int:
        """The most sampler steps, but at least 1, that so many network calls pay for."""
        affordable = (steps for steps in range(nfe, 1, -1) if self.calls(steps) <= nfe)
        return next(affordable, 1)

    def angles(self, schedule: Tensor, nfe: int) -> Tensor:
        return self.space(schedule, self.steps(nfe))


DENOISE, JUMP = frozenset({"denoise"}), frozenset({"jump"})

# The first that a model can be run by is the one for a number of steps that is not its own.
SOLVERS = {
    "ddim": Solver(ddim, DENOISE),
    "heun": Solver(heun, DENOISE, two_calls),
    "dpm-solver++": Solver(dpm_solver, DENOISE),
    "unipc": Solver(unipc, DENOISE),
    "truncated": Solver(ddim, DENOISE, space=truncated),
    "stochastic": Solver(stochastic, DENOISE),
    "ancestral": Solver(partial(ddim, eta=1.0), DENOISE),
    "predictor-corrector": Solver(predictor_corrector, DENOISE, two_calls),
    "ancestral-learned": Solver(ancestral_learned, DENOISE | {"variance"}),
    "consistency": Solver(consistency, JUMP, space=even),
}


def solvers_for(abilities: Sequence[str]) -> list[str]:
    """The solvers that may run a model of these abilities at any number of steps."""
    return [name for name, solver in SOLVERS.items() if solver.needs <= {*abilities}]


@torch.no_grad()
def sample(
    denoiser: Callable,
    noise: Noises,
    sampler: str,
    angles: Tensor,
    condition: Condition | None = None,
) -> Tensor:
    """x0 (B, C, H, W) by the sampler of that name. angles: ascending from 0, on the noise's device.

    condition: with the guidance weight, where there is one.
    """

    def denoise(x_t: Tensor, t: Tensor, **variance: bool) -> Any:
        return denoiser(x_t, t, condition, **variance)

    return SOLVERS[sampler].run(denoise, noise, angles)
