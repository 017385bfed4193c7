"""Networks of the library diffusers, read as (x_t, t, condition) -> prediction.

A module built here is diffusers' own class with another `forward`: its weights have the names and
the shapes that diffusers gives them, so that they go back as they are.

**Levels.** A discrete schedule is a table of alpha_bar_k, k = 0, 1, ... . Its x_k = sqrt(alpha_bar)
x0 + sqrt(1 - alpha_bar) eps is our x_t at t = atan2(sqrt(1 - alpha_bar), sqrt(alpha_bar)). Between
two angles of the table the network's timestep k goes in a straight line with the angle, and below
the first it stays 0. Flow matching (Lipman et al. 2023) has x_s = (1 - s) x0 + s eps, which is x_t
over (cos t + sin t) at s = sin t / (cos t + sin t), and timestep s times its number of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffusion.circle import broadcast
from diffusion.condition import Condition, Guidance, Kinds, Label, Text, is_token
from diffusion.console import UserError

Architecture = Literal["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"]
DISCRETE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
)
FLOW = ("FlowMatchEulerDiscreteScheduler",)
Prediction = Literal["eps", "v", "x0", "flow"]
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
# Settings with which a network does not fit: the values with which it does.
PLAIN: dict[str, tuple] = {
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "class_embeddings_concat": (False, None),
}
GUIDANCE_WIDTH = 256  # of a guidance weight's embedding where the network has none: LCM's


def library() -> ModuleType:
    """diffusers. UserError where it is not installed."""
    try:
        import diffusers
        from diffusers.utils import logging
    except ImportError:
        raise UserError(
            "a network of diffusers needs that library, which is not here: pip install "
            "'fewstep[diffusers]'"
        ) from None
    logging.set_verbosity_error()
    return diffusers


@dataclass(frozen=True)
class Levels:
    """What a scheduler's config says of noise levels, and of what the network predicts."""

    prediction: Prediction
    angles: Tensor
    """(N,) float64, ascending: of timesteps 0, 1, ..., or of the flow's s = 1 / N, 2 / N, ..., 1
    shifted as its config has it."""


def levels(scheduler: Mapping[str, Any]) -> Levels:
    """The noise levels of a scheduler_config.json. UserError for one that is not supported."""
    kind = scheduler.get("_class_name")
    if kind not in DISCRETE + FLOW:
        raise UserError(
            f"its scheduler is {kind!r:.80}, expected one of {', '.join(DISCRETE + FLOW)}"
        )
    try:
        with torch.device("cpu"):
            made = getattr(library(), kind).from_config(dict(scheduler))
    except (TypeError, ValueError, NotImplementedError, ArithmeticError) as error:
        raise UserError(f"its scheduler's config is refused by diffusers ({error})") from error
    described = made.config
    prediction = described.get("prediction_type", "flow_prediction" if kind in FLOW else "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(
            f"its network predicts {prediction!r:.80}, expected one of {', '.join(PREDICTIONS)}"
        )
    for name, plain in (("invert_sigmas", False), ("timestep_type", "discrete")):
        if described.get(name, plain) != plain:
            raise UserError(
                f"its scheduler's {name} is {described[name]!r:.80}, expected {plain!r}"
            )
    if PREDICTIONS[prediction] == "flow":
        number = described.num_train_timesteps
        s = torch.arange(1, number + 1, dtype=torch.float64) / number
        shift = described.get("shift") or described.get("flow_shift") or 1.0
        s = shift * s / (1 + (shift - 1) * s)
        angles = torch.atan2(s, 1 - s)
    else:
        alpha_bar = made.alphas_cumprod.double()
        angles = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())
    if not (angles[0] > 0 and (angles.diff() > 0).all()):
        raise UserError(
            "its scheduler's noise levels do not ascend: expected alpha_bar to fall at every step"
        )
    return Levels(PREDICTIONS[prediction], angles)


@dataclass(frozen=True)
class DiffusersConfig:
    """A network of diffusers, by the JSON that diffusers itself keeps of it."""

    channels: Annotated[int, Field(ge=1, le=1024)]
    size: Annotated[int, Field(ge=1, le=65536)]
    architecture: Architecture
    config: dict[str, Any] = field(default_factory=dict)
    """Its config.json."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Its scheduler_config.json, which says what its timesteps stand for."""

    def check(self) -> None:
        """UserError for a network that cannot be read as a prediction on the circle."""
        for name, plain in PLAIN.items():
            if self.config.get(name, plain[0]) not in plain:
                raise UserError(
                    f"its {name} is {self.config[name]!r:.80}: expected {plain[0]!r} of a "
                    f"{self.architecture}"
                )

    def build(self, outputs: int, kinds: Kinds) -> nn.Module:
        """The network; its output is cut, or filled up with ones, to so many channels."""
        self.check()
        if taken := kinds.keys() - CONDITIONS[self.architecture]:
            raise UserError(
                f"a {self.architecture} of diffusers takes no {min(taken)}: choose another network"
            )
        config = self.as_built(kinds)
        network = on_the_circle(self.architecture).from_config(config)
        network.settle(self, outputs, kinds)
        if config != self.config:  # at first a guidance weight changes nothing
            nn.init.zeros_(network.time_embedding.cond_proj.weight)
        return network

    def as_built(self, kinds: Kinds) -> dict[str, Any]:
        """The config.json of a network that takes conditions of these kinds."""
        guided = isinstance(kinds.get("guidance"), Guidance)
        width = self.config.get("time_cond_proj_dim") or GUIDANCE_WIDTH
        return {**self.config, "time_cond_proj_dim": width} if guided else self.config


CONDITIONS: dict[str, set[str]] = {
    "UNet2DModel": {"label"},
    "UNet2DConditionModel": {"label", "text", "guidance"},
    "DiTTransformer2DModel": {"label"},
}


class OnTheCircle(nn.Module):
    """The `forward` that a class of diffusers is given: (x_t, t, condition or None) -> prediction.

    x_t (B, C, H, W), t (B,) float32 radians -> (B, outputs, H, W): eps, v or x0, and after it the
    share of a learned variance.
    """

    levels: Tensor
    null_text: Tensor
    time_embedding: Any
    from_config: ClassVar[Callable[[dict[str, Any]], "OnTheCircle"]]

    def settle(self, config: DiffusersConfig, outputs: int, kinds: Kinds) -> None:
        """Take down what `forward` needs beside the network itself."""
        known = levels(config.scheduler)
        self.channels, self.outputs = config.channels, outputs
        self.flow = len(known.angles) if known.prediction == "flow" else None
        self.ranged = config.scheduler.get("variance_type") == "learned_range"
        self.guided = "guidance" in kinds
        # float32 as t comes, so that an angle of the table is exactly its own timestep
        self.register_buffer("levels", known.angles.float(), persistent=False)
        for module in self.modules():
            if type(module) is upsampling():
                module.__class__ = traced_upsampling()
        label, text = kinds.get("label"), kinds.get("text")
        self.unknown = label.num_classes if isinstance(label, Label) else None
        if isinstance(label, Label):
            self.settle_labels(label.num_classes)
        if isinstance(text, Text):
            shape = text.tokens, text.width
            self.register_buffer("null_text", torch.zeros(shape))

    def settle_labels(self, num_classes: int) -> None:
        """Where no row of the embedding is for an unknown class, the mean of all stands for it."""
        for name, module in list(self.named_modules()):
            if hasattr(module, "dropout_prob"):  # DiT's own: the loop drops labels, and it alone
                setattr(module, "dropout_prob", 0.0)  # noqa: B010
            if name == "class_embedding" and isinstance(module, nn.Embedding):
                size = module.num_embeddings, module.embedding_dim
                self.class_embedding = MeanForUnknown(*size)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        condition = condition or {}
        cos, sin = broadcast(t.cos(), x), broadcast(t.sin(), x)
        given = x if self.flow is None else x / (cos + sin)
        output = super().forward(
            given, self.timestep(t), **self.inputs(condition, t), return_dict=False
        )[0]
        prediction, more = output[:, : self.channels], output[:, self.channels : self.outputs]
        if self.flow is not None:  # u = eps - x0, at x_s, as v at x_t
            prediction = ((cos - sin) * x + prediction) / (cos + sin)
        if self.ranged:  # -1 to 1 between the posterior's variance and the forward step's
            more = (more + 1) / 2
        lacking = self.outputs - output.shape[1]
        if lacking > 0:  # the forward step's variance (fixed_large) is the whole share
            more = torch.ones_like(prediction)
        return torch.cat([prediction, more], dim=1)

    def timestep(self, t: Tensor) -> Tensor:
        """(B,) angles -> (B,) timesteps, float32."""
        if self.flow is not None:
            return self.flow * t.sin() / (t.cos() + t.sin())
        # as torch.searchsorted, which ONNX lacks
        above = (self.levels < t.detach()[:, None]).sum(1).clamp(1, len(self.levels) - 1)
        low, high = self.levels[above - 1], self.levels[above]
        return (above - 1 + (t - low) / (high - low)).clamp(0, len(self.levels) - 1)

    def inputs(self, condition: Condition, t: Tensor) -> dict[str, Tensor]:
        """What the condition is to the network, by diffusers' names."""
        given = {}
        if self.unknown is not None:
            label = condition.get("label")
            given["class_labels"] = (
                torch.full_like(t, self.unknown).long() if label is None else label
            )
        if hasattr(self, "null_text"):
            null = self.null_text.expand(t.shape[0], -1, -1)
            text = condition.get("text", torch.zeros_like(null)).to(null)
            says = is_token(text).any(dim=1)[:, None, None]
            given["encoder_hidden_states"] = text = torch.where(says, text, null)
            given["encoder_attention_mask"] = is_token(text)
        if self.guided:
            weight = condition.get("guidance", torch.ones_like(t))
            width = self.time_embedding.cond_proj.in_features
            given["timestep_cond"] = embedded_weight(weight, width)
        return given


@cache
def on_the_circle(architecture: Architecture) -> type[OnTheCircle]:
    """The class of diffusers of that name with OnTheCircle's forward. Under its own name: diffusers
    writes that into a config."""
    return type(architecture, (OnTheCircle, getattr(library(), architecture)), {})


def upsampling() -> Any:
    """The class of diffusers that doubles a side."""
    library()
    from diffusers.models.upsampling import Upsample2D

    return Upsample2D


@cache
def traced_upsampling() -> Any:
    """That class, which asks for no number of images where it is traced: it makes large inputs
    contiguous for faults of PyTorch, and a graph of that branch would have no other batch. Here
    every input is."""
    plain: Any = upsampling()

    def forward(self: Any, x: Tensor, output_size: Any = None, *more: Any, **named: Any) -> Tensor:
        usual = self.norm is None and self.interpolate and not self.use_conv_transpose
        if not (torch.compiler.is_compiling() and usual):
            return plain.forward(self, x, output_size, *more, **named)
        scale = 2.0 if output_size is None else None
        x = F.interpolate(x.contiguous(), size=output_size, scale_factor=scale, mode="nearest")
        conv = getattr(self, "conv" if self.name == "conv" else "Conv2d_0")
        return conv(x) if self.use_conv else x

    return type("Upsample2D", (plain,), {"forward": forward})


class MeanForUnknown(nn.Embedding):
    """An embedding in which the number after the last stands for the mean of all rows."""

    def forward(self, input: Tensor) -> Tensor:
        rows = torch.cat([self.weight, self.weight.mean(0, keepdim=True)])
        return F.embedding(input, rows)


def embedded_weight(weight: Tensor, width: int) -> Tensor:
    """(B,) guidance weights -> (B, width), as diffusers' pipelines embed them for such networks.

    Sines and cosines of 1000 (weight - 1) at frequencies from 1 down to 1/10000.
    """
    half = width // 2
    falling = torch.arange(half, device=weight.device, dtype=torch.float32) / (half - 1)
    phase = 1000 * (weight.float() - 1)[:, None] * 10_000**-falling
    return F.pad(torch.cat([phase.sin(), phase.cos()], dim=1), (0, width % 2))
