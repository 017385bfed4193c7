"""A trained model: a denoiser and the card that says how to sample from it."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion import checkpoint
from diffusion.checkpoint import Card
from diffusion.console import UserError
from diffusion.data import ImageSpec
from diffusion.denoiser import Condition, Denoiser
from diffusion.machine import layout, this_device
from diffusion.networks import UNet, UNetConfig
from diffusion.noise import Noise
from diffusion.samplers import SOLVERS, sample
from diffusion.schedules import check_shift, respace, shifted


@dataclass(frozen=True)
class Model:
    denoiser: Denoiser
    card: Card
    sha256: str
    """Identity of the weights."""

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(**self.card.data)

    @property
    def schedule(self) -> Tensor:
        """The angles of its longest plan, (N + 1,) float64."""
        return torch.tensor(self.card.plans[max(self.card.plans)], dtype=torch.float64)

    def plan(
        self, num_steps: int | None = None, sampler: str | None = None, shift: float | None = None
    ) -> tuple[str, Tensor]:
        """The sampler and angles (ascending) for a number of steps: its own, or a solver's.

        shift: of a solver's angles, by default the card's. Raises UserError where it was not
        trained for so many steps and no solver may run it, or a shift is told of its own.
        """
        card = self.card
        if shift is not None:
            check_shift(shift)
        if num_steps is None:
            num_steps = next(iter(card.plans)) if sampler in (None, card.sampler) else 50
        if num_steps < 1:
            raise UserError(f"--steps must be at least 1, got {num_steps}")
        if sampler in (None, card.sampler) and num_steps in card.plans:
            if shift is not None:
                raise UserError(
                    f"--shift moves a solver's steps, and {num_steps} steps of {card.sampler} are this "
                    f"{card.method} model's own: leave it out, or name another --sampler or --steps"
                )
            return card.sampler, torch.tensor(card.plans[num_steps], dtype=torch.float64)
        if sampler is None and card.solvers:
            sampler = card.solvers[0]
        if sampler in card.solvers:
            solver = SOLVERS[sampler]
            # angles out of the list bear its shift; spread anew up to its end they bear none
            already = card.shift if card.shifted and solver.space is respace else 1.0
            asked = card.shift if shift is None else shift
            return sampler, shifted(solver.angles(self.schedule, num_steps), asked / already)
        counts = ", ".join(map(str, card.plans))
        raise UserError(
            f"this {card.method} model samples by {card.sampler} in {counts} steps, "
            f"not by {sampler or card.sampler} in {num_steps}"
        )

    def calls_per_step(self, guidance: float | None = None) -> int:
        """2 where guidance is made of two network calls, else 1."""
        weight = self.card.guidance if guidance is None else guidance
        return 1 if self.denoiser.guidance or weight in (None, 1) else 2

    def condition(
        self, label: Tensor | None, guidance: float | None = None
    ) -> Tensor | Condition | None:
        """What the denoiser is given for classes (B,) and a guidance weight, by default the card's.

        Raises UserError for a weight that the model cannot be guided by.
        """
        if guidance is not None and label is None:
            raise UserError(
                "--guidance needs a model with classes, and this one has none: leave it out"
            )
        weight = self.card.guidance if guidance is None else guidance
        if weight is None or label is None:
            return label
        low, high = self.denoiser.guidance or (0, math.inf)
        if not low <= weight <= high or weight == math.inf:
            raise UserError(f"--guidance must be from {low:g} to {high:g}, got {weight:g}")
        if weight == 1:  # the denoiser's own, in one call
            return label
        return Condition(label, torch.full(label.shape, float(weight), device=label.device))

    def x0(
        self,
        plan: tuple[str, Tensor],
        seed: int,
        indices: Tensor,
        label: Tensor | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Images number `indices` (B,) of the seed: (B, C, H, W) float32 on the indices' device.

        label: (B,) classes, None for unconditional. guidance: its weight, by default the card's.
        """
        sampler, angles = plan
        noise, condition = Noise(seed, indices, self.spec.shape), self.condition(label, guidance)
        return sample(self.denoiser, noise, sampler, angles.to(indices.device), condition)

    def sample(
        self,
        plan: tuple[str, Tensor],
        seed: int,
        indices: Tensor,
        label: Tensor | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """The same as uint8."""
        return self.spec.to_uint8(self.x0(plan, seed, indices, label, guidance))


def build(net: dict | UNetConfig, precision: str) -> Denoiser:
    """A new denoiser of that configuration, which networks.check_net has seen where a user gave it."""
    if isinstance(net, dict):
        net = UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in net.items()})
    return Denoiser(UNet(net), precision, layout())


def load(path: Path, precision: str = "fp32", device: torch.device | None = None) -> Model:
    """The model of a checkpoint or of a run's folder, for inference, on this process's device."""
    weights, card, sha256 = checkpoint.load(path)
    try:
        denoiser = build(card.net, precision)
        denoiser.net.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: the weights do not fit the card's network ({reason})") from error
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(
                f"{path}: the weights are not finite (NaN or infinite, first in {name}): the training "
                "that made them failed; train again, with a lower --learning-rate"
            )
    return Model(denoiser.to(device or this_device()).eval().requires_grad_(False), card, sha256)


def require_same_images(spec: ImageSpec, model: Model, path: Path) -> None:
    """UserError for a model of other images: by their sha256, or by their name where one has none."""
    known = spec.sha256 and model.spec.sha256
    same = spec.sha256 == model.spec.sha256 if known else spec.name == model.spec.name
    if not same or spec.shape != model.spec.shape:
        other = "other images of " if not same and spec.name == model.spec.name else ""
        raise UserError(
            f"{path} was trained on {other}{model.spec.name} images of shape {model.spec.shape}, "
            f"expected {spec.name} of shape {spec.shape}"
        )
