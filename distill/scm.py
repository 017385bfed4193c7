"""Consistency in continuous time (Lu & Song 2024): `python -m distill.consistency --mode scm`.

f does not change along the ODE. Their TrigFlow is the circle at sigma_data = 1, their F the
velocity, and f the denoiser: f(x_t, t) = cos(t) x_t - sin(t) F(x_t, t).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diffusion.batches import Batch
from diffusion.circle import FROM_X0, add_noise, broadcast, x0_loss
from diffusion.config import FitConfig
from diffusion.model import Model
from diffusion.training import Followers, Method, Nets, Player, Turn
from distill import shared
from distill.pairs import Angles, LogNormal
from distill.steps import Denoise

# The paper's P_mean = -1 and P_std at its sigma_data = 1/2: tan t is twice its sigma.
NOISE = LogNormal(mean=-0.3, std=1.4)


@dataclass(frozen=True)
class Loss:
    """How the student's change along the ODE is brought to 0."""

    solver: Literal["euler", "data"] = "euler"
    """What gives the direction of the ODE. euler: the teacher; data: the training image itself,
    without the teacher."""
    tangent_warmup: float = 0.1
    """Share of the training over which the student's own derivatives gain their full weight."""


@dataclass(frozen=True)
class Options(shared.ConsistencyOptions):
    """scm: learn the way from any noise level straight to an image from the teacher in continuous
    time (Lu & Song 2024)."""

    loss: Loss = Loss()


FITS = {data: replace(fit, learning_rate=1e-4) for data, fit in shared.FITS.items()}
# after distill.midtraining; at 5e-4 it walks away, and at this after more iterations
FITS["digits"] = FitConfig(iterations=300, learning_rate=1e-4, warmup=20, ema=0.99)
PRESETS = {data: Options(fit=fit) for data, fit in FITS.items()}


@dataclass(frozen=True)
class ContinuousConsistency:
    """df/dt = 0 along the ODE towards `towards`: Lu & Song 2024, algorithm 1, said of f.

    Their regression of F to F- + g is the velocity-weighted one of f to f- - sin(t) g, for
    f = cos(t) x_t - sin(t) F: one step back along the change that f makes.
    """

    towards: Callable[[Batch, Tensor, Tensor], Tensor]
    """(batch, x_t, t) -> the x0 that the ODE heads for: the teacher's, or the data's."""
    angles: Callable[[Tensor], Tensor]
    """level -> t in (0, pi/2]."""
    warmup: float = 0.0
    """The share of the training over which f's own derivatives gain their full weight."""
    normalise: Callable[[Tensor], Tensor] = lambda g: g
    log_weight: Callable[[Tensor], Tensor] | None = None
    """t -> (B,); its own loss is added. None: 0."""
    followers: Followers = field(default_factory=dict)

    def __call__(self, student: nn.Module, batch: Batch, progress: float) -> Tensor:
        t = self.angles(batch.level)
        x_t = add_noise(batch.x0, batch.eps, t)
        share = min(1.0, progress / self.warmup) if self.warmup else 1.0
        with torch.no_grad():
            x0 = self.towards(batch, x_t, t)
            # Past a wrapper that synchronises gradients: here there are none to synchronise.
            network = partial(getattr(student, "module", student), condition=batch.condition)
            f = partial(network, dropout=batch.dropout())  # the same masks for both passes
            g = self.normalise(tangent(f, x_t, t, x0, share))
        f = student(x_t, t, batch.condition, dropout=batch.dropout())
        loss = x0_loss(f, f.detach() - broadcast(t.sin(), g) * g, t, "v")
        if self.log_weight is None:
            return loss
        w = self.log_weight(t)
        return w.exp() * loss - w


def tangent(f: Callable, x_t: Tensor, t: Tensor, x0: Tensor, share: float = 1.0) -> Tensor:
    """g = cos(t) df/dt on the ODE dx/dt = v, the velocity that x0 stands for; (B, C, H, W).

    f's inputs move by cos(t) sin(t) (v, 1), as in their section 4.1, so that nothing overflows
    where dx/dt would, and sin(t) is divided out of what f makes of it. `share` weighs the part
    that takes derivatives: without it, g = cos(t)^2 (v - F) = cos(t)^2 (f - x0) / sin(t) is that
    of diffusion training (their r, algorithm 1).
    """
    speed, sin = t.cos() * t.sin(), t.sin()
    along = broadcast(speed, x_t) * FROM_X0["v"](x_t, x0, t)
    value, change = derivative(f, (x_t, t), (along, speed))
    whole = change / broadcast(sin, change)
    start = broadcast(t.cos().square() / sin, value) * (value - x0)
    return torch.lerp(start, whole, share)


@torch.no_grad()
def derivative(
    call: Callable, inputs: tuple[Tensor, ...], directions: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """call(*inputs) and its derivative along the directions, by one forward-mode pass."""
    # fused attention kernels have no forward mode, the plain products that they replace do;
    # and compiled code drops the derivative, in some versions without a word
    eager = torch.compiler.set_stance("force_eager")
    with eager, forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _Float32Norms():
        duals = (forward_ad.make_dual(*pair) for pair in zip(inputs, directions, strict=True))
        value, change = forward_ad.unpack_dual(call(*duals))
        return value, change


class _Float32Norms(TorchFunctionMode):
    """Normalisation in float32, as autocast has it on CUDA but not on CPUs.

    Between bfloat16 activations and float32 statistics, a layer's derivative would be of another
    type than its value, which no layer after it takes.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in (F.group_norm, F.layer_norm) and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def unit(g: Tensor, c: float = 0.1) -> Tensor:
    """g / (|g| + c) per image (Lu & Song 2024, section 4.1), |g| the root mean square.

    So c means the same for images of any size; log_weight takes up the constant.
    """
    norm = g.flatten(1).square().mean(1).sqrt()
    return g / broadcast(norm + c, g)


class LogWeight(nn.Module):
    """w(t) as a cosine series, 0 at first: least of e^w loss - w where e^-w is the loss at t.

    Lu & Song 2024, section 4.2. A player beside the student, which no checkpoint keeps.
    """

    def __init__(self, terms: int = 8):
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(terms))

    def forward(self, t: Tensor) -> Tensor:
        order = torch.arange(len(self.coefficients), device=t.device)
        return (2 * t[:, None] * order).cos().float() @ self.coefficients


TOWARDS = {
    "euler": lambda teacher: lambda batch, x_t, t: teacher(x_t, t, batch.condition),
    "data": lambda teacher: lambda batch, x_t, t: batch.x0,
}


def objective(
    loss: Loss, teacher: Denoise, student: nn.Module, angles: Angles
) -> ContinuousConsistency:
    """df/dt = 0 at log-normal angles."""
    top = float(angles(1)[-1])
    return ContinuousConsistency(
        towards=TOWARDS[loss.solver](teacher),
        angles=lambda level: NOISE.tan(level, top).atan(),
        warmup=loss.tangent_warmup,
        normalise=unit,
    )


@dataclass(frozen=True)
class Weighted:
    """The student's loss, each angle weighted by what the player "log_weight" learns of it."""

    objective: ContinuousConsistency

    def __call__(self, nets: Nets, batch: Batch, turn: Turn) -> Tensor:
        objective = replace(self.objective, log_weight=nets["log_weight"])
        return objective(nets["student"], batch, turn.progress)


def method(student: nn.Module, objective: ContinuousConsistency) -> Method:
    """The student, and beside it the weights of its loss."""
    players = {"student": Player(student), "log_weight": Player(LogWeight())}
    return Method(players, Weighted(objective))


def distill(options: Options) -> Model:
    """The student of these options: loaded where it is finished, else trained."""
    return shared.train("scm", options, objective, method=method)
