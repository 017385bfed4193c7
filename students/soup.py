"""One student of several: `python -m students.soup RUN RUN … --out RUN` (Wortsman et al. 2022)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from diffusion.checkpoint import Card
from diffusion.console import UserError, run, say
from diffusion.folders import check_claim, claim
from diffusion.model import Model, load
from diffusion.owner import owned
from diffusion.runs import leave, require_same
from students.start import images_spent

FARTHEST = 0.4  # students of one teacher were 0.12 to 0.2 apart, a fresh network 0.78


@dataclass(frozen=True)
class Options:
    """Average the weights of students of one teacher: often better than each, and as fast as one.

    The students may differ in their training seed or settings (Wortsman et al. 2022).
    """

    students: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more runs or checkpoints. They must have one teacher, network and sampler, and the
    same angles."""
    out: Path = Path("runs/soup")
    """The folder for the average."""


def average(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor, in its own type. Wortsman et al. 2022, the uniform soup."""
    return {
        name: torch.stack([each[name].double() for each in weights]).mean(0).to(first.dtype)
        for name, first in weights[0].items()
    }


def distance(weights: list[dict[str, Tensor]]) -> float:
    """How far apart networks are: 0 for copies, 1 where their weights have nothing in common.

    Their distance from their mean, over what it would be were they orthogonal and of one size.
    """
    flat = torch.stack([torch.cat([value.flatten() for value in w.values()]) for w in weights])
    apart = (flat - flat.mean(0)).norm() / flat.norm()
    return float(apart) / math.sqrt(1 - 1 / len(weights))


def check_alike(models: list[Model], paths: tuple[Path, ...]) -> None:
    """UserError for students whose average would be no student.

    Halved students of several seeds have several parents, each its chain's student before: what
    must agree is the teacher that the chains began with.
    """
    if len({model.sha256 for model in models}) < max(2, len(models)):
        raise UserError(f"expected two or more different students, got {' '.join(map(str, paths))}")
    for model, path in zip(models, paths, strict=True):
        refused = f"{path} cannot be averaged with {paths[0]}"
        for name in ("net", "denoiser", "condition", "codec", "data", "sampler", "guidance"):
            mine, firsts = getattr(model.card, name), getattr(models[0].card, name)
            if mine != firsts:
                raise UserError(f"{refused}: its {name} is {mine}, not {firsts}")
        plans, firsts = (
            {plan.num_steps: plan.angles for plan in each.card.plans} for each in (model, models[0])
        )
        if plans.keys() != firsts.keys():
            raise UserError(f"{refused}: it has {[*plans]} steps of its own, not {[*firsts]}")
        if other := [steps for steps in plans if plans[steps] != firsts[steps]]:
            steps = other[-1]
            raise UserError(
                f"{refused}: its {steps} steps are at other angles ({_few(plans[steps])}, not "
                f"{_few(firsts[steps])}), as another --shift makes them"
            )
        origin, first_origin = _origin(model.card), _origin(models[0].card)
        if origin != first_origin:
            hint = "; of older halved students only the one before is known, not the teacher"
            hint = "" if model.card.origin and models[0].card.origin else hint
            raise UserError(
                f"{refused}: its teacher has the weights {origin!s:.8}, not "
                f"{first_origin!s:.8}{hint}"
            )


def _origin(card: Card) -> str | None:
    """The teacher that the student's line began with; its parent where an older card says less."""
    return card.origin or card.parent


def _few(angles: Sequence[float]) -> str:
    return " ".join(f"{angle:.4f}" for angle in angles[:5]) + " …" * (len(angles) > 5)


def soup(options: Options) -> Model:
    """The average of these students: loaded where it is finished, else made.

    Its angles are the first student's.
    """
    check_claim(options.out)
    models = [load(path) for path in options.students]
    check_alike(models, options.students)
    settings = {"soup": [model.sha256 for model in models]}
    if (options.out / "model.safetensors").exists():
        before = load(options.out)
        require_same(options.out, before.card.training.get("settings", {}), settings)
        say(f"{options.out}  finished before")
        return before
    weights = [model.denoiser.net.state_dict() for model in models]
    apart = distance(weights)
    if apart > FARTHEST:
        raise UserError(
            f"these networks are too far apart to be averaged ({apart:.2f}, at most {FARTHEST}): "
            "expected students that began at the same weights, as cd, ect and progressive do, not "
            "ct or ict"
        )
    with owned(options.out):
        claim(options.out)
        _make(options, models, weights, settings)
    say(f"{options.out}  of {len(models)} students, {apart:.2f} apart")
    return load(options.out)


def _make(
    options: Options, models: list[Model], weights: list[dict[str, Tensor]], settings: dict
) -> None:
    card = models[0].card
    models[0].denoiser.net.load_state_dict(average(weights))
    images = sum(images_spent(model) for model in models)
    seconds = sum(model.card.training.get("seconds", 0) for model in models)
    training = {"settings": settings, "total_images": images, "seconds": seconds}
    leave(
        options.out,
        models[0].denoiser,
        replace(card, method=f"{card.method}-soup", training=training),
    )


def main() -> None:
    soup(tyro.cli(Options, prog="python -m students.soup"))


if __name__ == "__main__":
    run(main)
