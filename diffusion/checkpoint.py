"""Checkpoints: a safetensors file with a card (JSON) that says how to use it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, with_config
from torch import Tensor
from typing_extensions import TypedDict

from diffusion import older
from diffusion.console import UserError
from diffusion.files import bytes_of, load_tensors, save_tensors
from diffusion.plan import Plan
from diffusion.typed import CLOSED, OPEN, Amount, Count, Sha256, Text, checked, parse

FORMAT = 2


def weights_sha256(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes: the identity of a network, whatever its file says."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


@with_config(OPEN)
class Settings(TypedDict, total=False, extra_items=Any):
    """A training's settings, as far as a resumed run reads them one by one."""

    iterations: Count
    warmup: Count
    minutes: float | None
    precision: Text
    images: dict[str, Any]


@with_config(OPEN)
class Training(TypedDict, total=False, extra_items=Any):
    """What a card says of a training; a method may say more."""

    settings: Settings
    iterations: Count
    images: Count
    total_images: Count
    passes: Count
    seconds: Amount


@with_config(CLOSED)
@dataclass(frozen=True)
class Card:
    """What a checkpoint says of itself: enough to rebuild it, sample from it and trace its line."""

    method: Text
    """The method's name, for tables to show; nothing depends on it."""
    plans: Annotated[tuple[Plan, ...], Field(min_length=1, max_length=1000)]
    """The ways to make images that it was trained for, each of another number of steps; the first
    is the usual one."""
    abilities: tuple[Text, ...]
    """What a solver may ask of it, as diffusion.samplers.Solver needs it; none where its plans are
    all that it was trained for."""
    net: dict[str, Any]
    """The network: its name and its shape."""
    denoiser: dict[str, Any]
    """What the denoiser makes of the network's output."""
    condition: dict[str, dict[str, Any]]
    """The conditions that the network takes: by name, the kind of each."""
    codec: dict[str, Any]
    """How pixels become x0: the codec's name and settings."""
    data: dict[str, Any]
    """The images' name and shape."""
    shift: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """How far few steps, its students' and solvers', are moved towards noise: schedules.shifted."""
    shifted: bool = False
    """Whether the angles of `plans` are shifted already. A teacher's own list is not."""
    parent: Sha256 | None = None
    """sha256 of the weights that it was distilled from."""
    origin: Sha256 | None = None
    """sha256 of the weights of the teacher that its line began with: parents of parents. None in a
    card from before there was `origin`."""
    training: Training = field(default_factory=lambda: Training())
    """Settings, iterations, images seen and seconds."""
    format: Literal[2] = FORMAT

    @property
    def sampler(self) -> str:
        """The sampler of its plans."""
        return self.plans[0].sampler

    @property
    def guidance(self) -> float | None:
        """The guidance weight of its plans; None for none."""
        return self.plans[0].guidance

    @property
    def longest(self) -> Plan:
        """The card's plan of the most steps."""
        return max(self.plans, key=lambda plan: plan.num_steps)

    def plan(self, num_steps: int) -> Plan | None:
        """The card's plan of that many steps, where it has one."""
        return next((plan for plan in self.plans if plan.num_steps == num_steps), None)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Card":
        """The inverse of to_json, of a card of any format. UserError names what does not fit."""
        try:
            card = parse(text)
        except ValueError as error:
            raise UserError(f"the card is no JSON ({error})") from error
        if not isinstance(card, dict):
            raise UserError("the card is no JSON object")
        if card.get("format") == 1:
            card = older.card(checked(older.CARD, card, "the card"))
        if card.get("format") != FORMAT:
            raise UserError(f"the card is of format {card.get('format')!r:.40}, expected {FORMAT}")
        return checked(CARD, card, "the card")


CARD = TypeAdapter(Card)


def save(path: Path, weights: dict[str, Tensor], card: Card) -> str:
    """Write weights and card; returns the weights' sha256."""
    sha256, text = weights_sha256(weights), card.to_json()
    save_tensors(path, weights, {"card": text, "sha256": _seal(sha256, text)})
    return sha256


def _seal(sha256: str, card: str) -> str:
    """sha256 over the weights' sha256 and the card: a flipped bit in either is noticed."""
    return hashlib.sha256(f"{sha256} {card}".encode()).hexdigest()


def load(path: Path) -> tuple[dict[str, Tensor], Card, str]:
    """Weights, card and the weights' sha256 of a checkpoint or of a run's folder, verified."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"no checkpoint at {file}: expected a run's folder or a .safetensors file")
    weights, metadata = load_tensors(file)
    if "card" not in metadata:
        raise UserError(
            f"{file} has no card: expected a checkpoint that a command of fewstep wrote"
        )
    sha256 = weights_sha256(weights)
    if metadata.get("sha256") != _seal(sha256, metadata["card"]):
        raise UserError(
            f"{file} is damaged: its weights and card do not match their sha256; take another "
            "copy, or train it again"
        )
    try:
        return weights, Card.from_json(metadata["card"]), sha256
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} has a card that cannot be read ({error})") from error
