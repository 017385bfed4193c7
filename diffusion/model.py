"""A trained model: a denoiser and the card that says how to sample from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from diffusion import checkpoint, codec, condition, foreign, networks
from diffusion.checkpoint import Card
from diffusion.codec import Codec
from diffusion.condition import INSTEAD, Condition, Guidance, Kinds, Label
from diffusion.console import UserError, doing, first_line
from diffusion.data import ImageSpec
from diffusion.denoiser import Denoiser, DenoiserConfig
from diffusion.dry import check_fit
from diffusion.machine import layout, this_device
from diffusion.networks import NetworkConfig
from diffusion.noise import Noise
from diffusion.plan import MOST_GUIDANCE, Plan, plan
from diffusion.registry import rebuilt
from diffusion.samplers import SOLVERS, sample, solvers_for
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

    @cached_property
    def spec(self) -> ImageSpec:
        return ImageSpec(**self.card.data)

    @cached_property
    def codec(self) -> Codec:
        return codec.from_json(self.card.codec)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an x0."""
        return self.codec.shape(self.spec.shape)

    def of_images(self, spec: ImageSpec) -> "Model":
        """The model, as one of these images where its maker names none."""
        if self.spec.name or self.spec.shape != spec.shape:
            return self
        return replace(self, card=replace(self.card, data=asdict(spec)))

    @property
    def kinds(self) -> Kinds:
        """The kinds of the conditions that its network takes."""
        return self.denoiser.kinds

    @property
    def schedule(self) -> Tensor:
        """The angles of its longest plan, (N + 1,) float64."""
        return torch.tensor(self.card.longest.angles, dtype=torch.float64)

    @property
    def solvers(self) -> list[str]:
        """The solvers that may run it at any number of steps; the first is the usual one."""
        return solvers_for(self.card.abilities)

    def plan(
        self,
        num_steps: int | None = None,
        sampler: str | None = None,
        shift: float | None = None,
        guidance: float | None = None,
    ) -> Plan:
        """The plan for a number of steps: its own, or a solver's.

        shift: of a solver's angles, by default the card's. guidance: the weight, by default the
        card's. Raises UserError where it was not trained for so many steps and no solver may run
        it, where a shift is given for its own angles, or for a weight that it cannot be guided by.
        """
        return self.guided(self._plan(num_steps, sampler, shift), guidance)

    def _plan(self, num_steps: int | None, sampler: str | None, shift: float | None) -> Plan:
        card, solvers = self.card, self.solvers
        if shift is not None:
            check_shift(shift)
        if num_steps is None:
            usual = sampler in (None, card.sampler)
            num_steps = card.plans[0].num_steps if usual else 50
        if num_steps < 1:
            raise UserError(f"--steps must be at least 1, got {num_steps}")
        trained = card.plan(num_steps)
        if sampler in (None, card.sampler) and trained:
            if shift is not None:
                raise UserError(
                    f"--shift moves a solver's steps, and {num_steps} steps of {card.sampler} are "
                    f"this {card.method} model's own: leave it out, or name another --sampler or "
                    "--steps"
                )
            return trained
        if sampler is None and solvers:
            sampler = solvers[0]
        if sampler in solvers:
            solver = SOLVERS[sampler]
            # angles out of the list bear its shift; spread anew up to its end they bear none
            already = card.shift if card.shifted and solver.space is respace else 1.0
            asked = card.shift if shift is None else shift
            angles = shifted(solver.angles(self.schedule, num_steps), asked / already)
            note = "" if shift is None else f"shift {shift:g}"
            return plan(sampler, angles, card.guidance, note)
        counts = ", ".join(str(each.num_steps) for each in card.plans)
        raise UserError(
            f"this {card.method} model samples by {card.sampler} in {counts} steps, "
            f"not by {sampler or card.sampler} in {num_steps}"
        )

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The least and the greatest guidance weight; both 1 where it takes no condition."""
        return _weights(self.kinds)

    def guided(self, plan: Plan, guidance: float | None) -> Plan:
        """The plan at that guidance weight; None leaves its own.

        Raises UserError for a weight that the model cannot be guided by.
        """
        if guidance is None:
            return plan
        low, high = self.guidance_range
        if not self.kinds:
            raise UserError(
                "--guidance needs a model with classes or captions, and this one has none: leave "
                "it out"
            )
        if not low <= guidance <= high:
            raise UserError(f"--guidance must be from {low:g} to {high:g}, got {guidance:g}")
        return plan.guided(guidance)

    def calls_per_step(self, plan: Plan) -> int:
        """2 where the plan's guidance is made of two network calls, else 1."""
        return 1 if "guidance" in self.kinds or plan.guidance in (None, 1) else 2

    def calls(self, plan: Plan) -> int:
        """Network calls that the plan makes for each image."""
        return SOLVERS[plan.sampler].calls(plan.num_steps) * self.calls_per_step(plan)

    def conditions(self, indices: Tensor, given: Condition | None = None) -> dict[str, Tensor]:
        """The condition of images number `indices` (B,): what is given, and for the rest what its
        kind has for them; empty where the network takes none."""
        return condition.usual(self.kinds, indices, given)

    def inputs(self, plan: Plan, indices: Tensor, given: Condition | None) -> Condition | None:
        """The network's inputs beside x_t and t, of images number `indices` (B,): their condition,
        with the guidance weight where the plan has one.

        given: conditions (B, ...) by name, in place of what is usual for these images; and under
        INSTEAD and a name what guidance of two calls leads away from, in place of nothing.
        """
        condition, weight = self.conditions(indices, given), plan.guidance
        if self.calls_per_step(plan) == 2:
            named = (given or {}).items()
            condition |= {k: v.to(indices.device) for k, v in named if k.startswith(INSTEAD)}
        if condition and weight not in (None, 1):  # 1 is the denoiser's own, in one call
            condition["guidance"] = torch.full(indices.shape, float(weight), device=indices.device)
        return condition or None

    def x0(
        self, plan: Plan, seed: int | Tensor, indices: Tensor, given: Condition | None = None
    ) -> Tensor:
        """Images number `indices` (B,) of the seed: (B, C, H, W) float32 on the indices' device.

        seed: one for all, or each image's (B,). given: as `inputs` takes it.
        """
        noise, angles = Noise(seed, indices, self.shape), plan.on(indices.device)
        condition = self.inputs(plan, indices, given)
        return sample(self.denoiser, noise, plan.sampler, angles, condition)

    def sample(
        self, plan: Plan, seed: int, indices: Tensor, given: Condition | None = None
    ) -> Tensor:
        """Those images as pixels, (B, C, H, W) uint8."""
        return self.codec.decode(self.x0(plan, seed, indices, given))


def build(net: NetworkConfig, config: DenoiserConfig, kinds: Kinds, precision: str) -> Denoiser:
    """A new denoiser; a network's shape that a user gave is checked before."""
    network = net.build(_outputs(net, config), kinds)
    return Denoiser(network, precision, layout(), config, kinds)


def _outputs(net: NetworkConfig, config: DenoiserConfig) -> int:
    """Channels that the denoiser reads of its network."""
    return net.channels * (1 + config.learned_variance)


def of_card(card: Card, precision: str, weights: Mapping[str, Tensor] | None = None) -> Denoiser:
    """A new denoiser such as the card describes, of random weights where none are given.

    UserError for a card whose parts do not fit each other, or do not fit the weights; that is
    noticed before the network is built.
    """
    kinds = condition.from_json(card.condition)
    config = DenoiserConfig.from_json(card.denoiser)
    net, spec = networks.from_json(card.net), rebuilt(ImageSpec, card.data, "data")
    _check_card(card, net, codec.from_json(card.codec).shape(spec.shape), kinds)
    if weights is not None:
        check_fit(lambda: net.build(_outputs(net, config), kinds), weights)
    try:
        denoiser = build(net, config, kinds, precision)
        if weights is not None:
            denoiser.net.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(
            f"the weights do not fit the card's network ({first_line(error)})"
        ) from error
    return denoiser


def _check_card(card: Card, net: NetworkConfig, shape: tuple[int, ...], kinds: Kinds) -> None:
    """UserError where what the card says of the network, the images or the plans is at odds."""
    if (net.channels, net.size, net.size) != shape:
        raise UserError(
            f"net: expected images of shape {shape}, as its data and codec make, got "
            f"{(net.channels, net.size, net.size)}"
        )
    for i, each in enumerate(card.plans):
        if each.sampler not in SOLVERS:
            raise UserError(
                f"plans.{i}.sampler: expected one of {', '.join(SOLVERS)}, got {each.sampler!r:.80}"
            )
        if each.guidance is not None and not kinds:
            raise UserError(f"plans.{i}.guidance: expected none of a model without conditions")
        low, high = _weights(kinds)
        if each.guidance not in (None, 1) and not low <= each.guidance <= high:
            raise UserError(
                f"plans.{i}.guidance: expected it from {low:g} to {high:g}, got {each.guidance:g}"
            )


def _weights(kinds: Kinds) -> tuple[float, float]:
    """The least and the greatest guidance weight of a model with these conditions."""
    ranges = [(kind.low, kind.high) for kind in kinds.values() if isinstance(kind, Guidance)]
    return next(iter(ranges), (0.0, MOST_GUIDANCE) if kinds else (1.0, 1.0))


def read(path: Path, trust: bool = False) -> tuple[dict[str, Tensor], Card, str]:
    """Weights, card and the weights' sha256 of a checkpoint, ours or another maker's."""
    other = foreign.door(path, trust)
    return other() if other else checkpoint.load(path)


def load(
    path: Path,
    precision: str = "fp32",
    device: torch.device | None = None,
    autoencoder: Path | None = None,
    trust: bool = False,
) -> Model:
    """The model of a checkpoint, of a run's folder or of another maker's network by its prefix, for
    inference, on this process's device.

    trust: whether a file of another maker may be loaded that may run code.
    """
    with doing(f"reading {path}"):
        weights, card, sha256 = read(path, trust)
    try:
        card = replace(card, codec=codec.located(card.codec, path, autoencoder))
        denoiser = of_card(card, precision, weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(
                f"{path}: the weights are not finite (NaN or infinite, first in {name}): the "
                "training that made them failed; train again, with a lower --learning-rate"
            )
    return Model(denoiser.to(device or this_device()).eval().requires_grad_(False), card, sha256)


def of_classes(model: Model, num_classes: int) -> Model:
    """The model, told the classes of such images: 0 for none.

    Another maker's network of one class more has that, its last, for an unknown one. UserError for
    a model of other classes.
    """
    label, card = model.kinds.get("label"), model.card
    if not (num_classes and isinstance(label, Label)) or label.num_classes == num_classes:
        return model
    if label.num_classes != num_classes + 1 or card.net.get("architecture") is None or card.parent:
        raise UserError(
            f"the model knows {label.num_classes} classes, and the images have {num_classes}: "
            "choose images with as many"
        )
    kinds = condition.to_json({**model.kinds, "label": Label(num_classes)})
    card = replace(card, condition=kinds)
    weights = model.denoiser.net.state_dict()
    denoiser = of_card(card, model.denoiser.precision, weights).to(model.device)
    return replace(model, denoiser=denoiser.eval().requires_grad_(False), card=card)


def require_same_images(spec: ImageSpec, model: Model, path: Path) -> None:
    """UserError for a model of other images, by their sha256, or their name where one has none."""
    known = spec.sha256 and model.spec.sha256
    same = spec.sha256 == model.spec.sha256 if known else spec.name == model.spec.name
    if not same or spec.shape != model.spec.shape:
        other = "other images of " if not same and spec.name == model.spec.name else ""
        raise UserError(
            f"{path} was trained on {other}{model.spec.name} images of shape {model.spec.shape}, "
            f"expected {spec.name} of shape {spec.shape}"
        )
