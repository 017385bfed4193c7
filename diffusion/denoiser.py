"""Denoiser: a network that predicts v, x0 or eps, read as an x0. Precision is decided here."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from tyro.conf import Suppress

from diffusion.circle import TO_X0, broadcast
from diffusion.condition import Condition, Kinds, with_null
from diffusion.console import UserError
from diffusion.registry import rebuilt

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # fp16 only samples: its sums are too short


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise ValueError("the bounds should ascend")
    return bounds


Level = Annotated[float, Field(ge=-1e9, le=1e9)]
Bounds = Annotated[tuple[Level, Level], AfterValidator(_ascending)]


@dataclass(frozen=True)
class DenoiserConfig:
    """What a denoiser makes of its network's output."""

    prediction: Literal["v", "x0", "eps"] = "v"
    """What the network predicts: v, the velocity between image and noise; x0, the image; eps, the
    noise. eps fails at few steps, and needs a schedule that ends before pure noise."""
    learned_variance: bool = False
    """Predict as well how much noise the random (ancestral) steps add (Nichol & Dhariwal 2021)."""
    bounds: Suppress[Bounds | None] = None
    """Least and greatest value of x0, which is clamped to them. teachers.ddpm --clamp sets it."""

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(described: dict) -> "DenoiserConfig":
        return rebuilt(DenoiserConfig, described, "denoiser")


class Denoiser(nn.Module):
    """D(x_t, t) = cos(t) x_t - sin(t) v(x_t, t), or what TO_X0 makes of a prediction of x0 or eps.

    With v, D(x, 0) = x holds exactly. At unit variance this is the preconditioning of Karras et
    al. 2022, table 1, and the boundary condition of a consistency model (Song et al. 2023, section
    3) at no cost. With x0, D is the network itself: it leaves D(x, 0) = x to be learnt. With eps,
    D = (x_t - sin(t) eps) / cos(t): an error of eps counts tan(t) times, and at t = pi/2 the
    network says nothing of x0: `check_prediction` refuses such a schedule.

    A mean of images lies within their range. With bounds x0 is clamped there, in training too
    (`Inward`), and D(x, 0) = x holds within them: the network need not find the exact level of a
    black background, but only one no brighter.

    With a guidance weight among its conditions, D is the guided x0 (`guide`): a network that takes
    the weight makes it in one call, any other in two, as one call of twice the batch. Without one,
    guidance is 1.

    Asked for the variance too, it returns (x0, share) of a network that learns it: an ancestral
    step t -> s then has variance beta^share beta'^(1 - share), where beta is the forward step's
    and beta' the posterior's (Nichol & Dhariwal 2021, eq. 15). Guidance leaves the share as it is
    without. All of this is in `forward`, for gradients are synchronised of no other call.
    """

    passes: ClassVar[int] = 0
    """Images that any denoiser's network was called on in this process."""

    def __init__(
        self,
        net: nn.Module,
        precision: str = "fp32",
        layout: torch.memory_format = torch.contiguous_format,
        config: DenoiserConfig | None = None,
        kinds: Kinds | None = None,
    ):
        """net: (x_t (B, C, H, W), t (B,) float32, condition or None) -> prediction (B, C, H, W), or
            (B, 2 C, H, W) with the share of a learned variance.
        precision: "fp32", or of HALF (autocast of the network alone; angles and sums stay float32).
        layout: of weights and activations; channels_last is the fast one on GPUs with tensor cores,
            while on CPUs group norm makes it the slow one (1.3 times at 8x8).
        kinds: of the conditions that the network takes.
        """
        super().__init__()
        self.net = net.to(memory_format=layout)
        self.precision, self.layout = precision, layout
        self.config, self.kinds = config or DenoiserConfig(), dict(kinds or {})

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | None = None,
        variance: bool = False,
        dropout: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x0 (B, C, H, W) float32, or (x0, share) of that shape both.

        t: (B,) or scalar radians. dropout: a generator whose seed the masks are drawn by, in
        training, so that two passes by it have the same masks. It is torch's own that is seeded: so
        any network's dropout layers are repeated, and compiled code stays whole.
        """
        if variance and not self.config.learned_variance:
            raise UserError(
                "this network does not predict a variance: train a teacher with --learned-variance"
            )
        count, condition = x_t.shape[0], condition or None  # len() would fix a traced batch's size
        t = t.expand(count)
        if not condition or "guidance" not in condition or "guidance" in self.kinds:
            x0, share = self._predict(x_t, t, condition, dropout)
        else:
            plain = {name: rows for name, rows in condition.items() if name != "guidance"}
            both = with_null(plain, self.kinds)
            x0, share = self._predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both, dropout)
            x0, share = guide(x0[:count], x0[count:], condition["guidance"]), share[:count]
        return (x0, share) if variance else x0

    def compile_network(self) -> None:
        """torch.compile it for sampling; on a GPU as CUDA graphs, which wait for no launch."""
        on_gpu = next(self.net.parameters()).is_cuda
        self.net.compile(mode="reduce-overhead" if on_gpu else None)

    def call(
        self,
        function: Callable,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | None = None,
        dropout: torch.Generator | None = None,
    ) -> Any:
        """What the network, or a part of it, makes in this denoiser's precision and layout."""
        if not torch.compiler.is_compiling():
            Denoiser.passes += len(x_t)
        if dropout and self.training:  # a network's own dropout layers draw from torch's generator
            torch.manual_seed(dropout.initial_seed())
        half = HALF.get(self.precision)
        with torch.autocast(x_t.device.type, half, enabled=half is not None):
            x_t = x_t.contiguous(memory_format=self.layout)
            return function(x_t, t.float(), condition)

    def _predict(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | None,
        dropout: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """x0, and what the network puts out beyond its prediction."""
        output = self.call(self.net, x_t, t, condition, dropout)
        # always a copy: a CUDA graph's next call writes where this one's output lies, while an x0
        # or a share that is a view of it may be kept for the steps to come (dpm-solver++, heun)
        output = output.to(torch.float32, copy=True)
        channels, bounds = x_t.shape[1], self.config.bounds
        x0 = TO_X0[self.config.prediction](x_t, output[:, :channels], t)
        if bounds:
            x0 = Inward.apply(x0, *bounds) if self.training else x0.clamp(*bounds)
        return x0, output[:, channels:]


class Inward(torch.autograd.Function):
    """x.clamp(low, high), but a gradient that pulls what is outside back in passes, too.

    The clamp's own is 0 there, and what once got out would stay. Forward-mode derivatives, which
    are no pull, are the clamp's own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (x,), (low, high) = gradients, ctx.saved_tensors, ctx.bounds
        outward = (x < low) & (gradient > 0) | (x > high) & (gradient < 0)
        return gradient.masked_fill(outward, 0), None, None

    @staticmethod
    def jvp(ctx: Any, *changes: Tensor) -> Tensor:
        (change, *_), (x,), (low, high) = changes, ctx.saved_tensors, ctx.bounds
        return change.masked_fill((x < low) | (x > high), 0)


def guide(conditional: Tensor, unconditional: Tensor, weight: Tensor) -> Tensor:
    """unconditional + weight (conditional - unconditional): Ho & Salimans 2022, eq. 6, in x0.

    x0, eps and v are affine in each other, with the same coefficients for both terms, so this is
    their guidance of eps, at w = weight - 1. Exact at weights 0 and 1. weight: (B,).
    """
    return torch.lerp(unconditional, conditional, broadcast(weight, conditional))


def check_prediction(prediction: str, angles: Tensor) -> None:
    """UserError for a schedule at whose noisy end such a network says nothing of x0.

    angles: ascending.
    """
    signal = float(angles[-1].cos())
    if prediction == "eps" and signal < 1e-3:
        raise UserError(
            "--prediction eps needs a schedule that ends before pure noise, where eps says nothing "
            f"of x0 (cos t at least 0.001), got an end of cos t = {signal:.1g}: take --schedule "
            "linear or karras, or --prediction v"
        )
