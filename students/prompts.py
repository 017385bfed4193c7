"""Prompts: texts that a model is asked for, as the condition of the images of a call."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffusion.captions import EncoderPlace, load_encoder, read_text
from diffusion.condition import INSTEAD, Text
from diffusion.console import UserError
from diffusion.model import Model
from diffusion.plan import Plan


@dataclass(frozen=True, eq=False)
class Prompts:
    """Texts that images take in turn: image i has text i, and after the last the first again."""

    texts: tuple[str, ...]
    rows: Tensor
    """(P, L, D) float32."""
    negative: Tensor | None = None
    """(1, L, D): what guidance leads away from."""

    def condition(self, numbers: Tensor) -> dict[str, Tensor]:
        """What images of these numbers (B,) are told."""
        condition = {"text": self.rows[(numbers % len(self.texts)).to(self.rows.device)]}
        if self.negative is not None:
            condition[INSTEAD + "text"] = self.negative.expand(len(numbers), -1, -1)
        return condition

    def text(self, number: int) -> str:
        """What an image of that number is asked to show."""
        return self.texts[number % len(self.texts)]


def from_file(path: Path) -> tuple[str, ...]:
    """The lines that are not empty."""
    lines = read_text(path).splitlines()
    if not (texts := tuple(" ".join(line.split()) for line in lines if line.strip())):
        raise UserError(f"{path} is empty: expected a prompt in each line")
    return texts


def encode(
    model: Model,
    plan: Plan,
    texts: Sequence[str],
    negative: str | None = None,
    folder: Path | None = None,
) -> Prompts:
    """The texts as the model's encoder has them. folder: where that is, if it has moved.

    UserError for a model that takes no texts, for a negative one that it cannot be led away from,
    and where the encoder is not at hand.
    """
    kind = model.kinds.get("text")
    if not isinstance(kind, Text):
        raise UserError(
            "--prompt needs a model of captions, trained with --text-encoder, and this one is "
            "none: leave it out"
        )
    if negative is not None and "guidance" in model.kinds:
        raise UserError(
            "--negative-prompt leads a guided step's second network call, and this student does "
            "both in one: leave it out, or name its teacher"
        )
    if negative is not None and plan.guidance in (None, 1):
        raise UserError("--negative-prompt acts by --guidance: give a weight above 1, such as 3")
    place = folder or Path(model.spec.text_encoder)
    if not (folder or model.spec.text_encoder):
        raise UserError(
            f"the model's prompts are encoded by {kind.encoder}: name its folder with "
            "--text-encoder"
        )
    encoder = load_encoder(EncoderPlace(place, kind.sha256))
    rows = encoder.prompts([*texts, *([] if negative is None else [negative])], kind)
    rows = rows.to(model.device)
    count = len(texts)
    return Prompts(tuple(texts), rows[:count], rows[count:] if negative is not None else None)
