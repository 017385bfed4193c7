"""What the modes of distill.consistency share: their common options, and a student's training."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion.checkpoint import Card
from diffusion.config import FitConfig
from diffusion.console import UserError, check_limits, count
from diffusion.denoiser import Denoiser
from diffusion.model import Model, load, of_card
from diffusion.noise import seed32
from diffusion.plan import MOST_STEPS, plan
from diffusion.registry import Entry
from diffusion.runs import train_model
from diffusion.schedules import even
from diffusion.training import Method, Objective, one_network
from distill.discrete import Consistency
from distill.frechet import frechet_term
from distill.pairs import Angles
from students.start import StudentOptions, begin, images_spent, student_card

# How a student of consistency or guidance trains on each dataset, if its method does not say else.
FITS = {
    "digits": FitConfig(iterations=1000, learning_rate=2e-3, warmup=20, ema=0.99),
    "fashion-mnist": FitConfig(iterations=20_000, learning_rate=2e-4, warmup=200, ema=0.999),
    "cifar10": FitConfig(
        iterations=200_000, batch_size=128, learning_rate=1e-4, warmup=1000, ema=0.9999, flip=True
    ),
    "emoji": FitConfig(minutes=13, batch_size=64, learning_rate=5e-4, ema=0.99),
    "folder": FitConfig(minutes=15, batch_size=64, learning_rate=5e-4, ema=0.99),
    "folder, GPU": FitConfig(minutes=60, batch_size=128, learning_rate=2e-4, ema=0.99),
}


@dataclass(frozen=True, kw_only=True)
class ConsistencyOptions(StudentOptions):
    """Options of every mode."""

    start: Path | None = None
    """The run or checkpoint whose weights the student starts from, such as distill.midtraining's.
    Its network must be the teacher's."""
    loss: Entry
    """The mode's settings, as its default."""


LIMITS = {
    "num_angles": count(2, 10 * MOST_STEPS),
    "target_ema": ("in [0, 1)", lambda decay: 0 <= decay < 1),
    "segments": count(1, MOST_STEPS),
    "stages": count(1, 100),
    "frechet": ("at least 0, at most 1e6", lambda weight: 0 <= weight <= 1e6),
    "tangent_warmup": ("in [0, 1]", lambda share: 0 <= share <= 1),
}


def check_loss(loss: Entry) -> None:
    """UserError for settings of a mode's loss that it cannot be trained with."""
    check_limits(loss, {name: limit for name, limit in LIMITS.items() if hasattr(loss, name)})
    segments, num_angles = getattr(loss, "segments", 1), getattr(loss, "num_angles", 0)
    if num_angles % segments:
        raise UserError(
            f"--num-angles must be a multiple of --segments {segments}, so that every segment's "
            f"border is trained, got {num_angles}"
        )
    if segments > 1 and getattr(loss, "frechet", 0):
        raise UserError(
            f"--frechet goes with --segments 1, got {segments}: what a student says within a "
            "segment is no image, and has no image's features; leave one of the two out"
        )


def angles_of(teacher: Model) -> Angles:
    """num_steps -> the angles of so many equal steps, where the teacher's shift says."""

    def angles(num_steps: int) -> Tensor:
        return even(teacher.schedule, num_steps, teacher.card.shift).to(teacher.device)

    return angles


def train(
    mode: str,
    options: ConsistencyOptions,
    objective: Callable[..., Objective],
    from_teacher: bool = True,
    method: Callable[..., Method] = one_network,
) -> Model:
    """The mode's student: loaded where it is finished, else trained.

    objective: (loss, teacher's denoiser, student, angles) -> the mode's objective.
    from_teacher: whether the student begins, without --start, at the teacher's weights: else at
    random ones. method: (student, objective) -> what is trained.
    """
    check_loss(options.loss)
    options, teacher, dataset, out = begin(options, "consistency")
    if teacher.denoiser.config.prediction == "x0":
        raise UserError(
            f"{options.teacher} predicts x0, and nothing makes it leave a clean image as it is, "
            "which consistency rests on: train a teacher with --prediction v"
        )
    student, before = first_weights(options, teacher, from_teacher)
    settings, angles = asdict(options.loss), angles_of(teacher)
    segments, frechet = settings.get("segments", 1), settings.get("frechet", 0.0)
    name = f"{'multistep' if segments > 1 else 'consistency'}-{mode}"
    name, earlier = name + ("-frechet" if frechet else ""), {}
    if before and options.start:
        name = f"{before.card.method}+{name}"
        earlier["start"] = before.sha256
    if before and images_spent(before):
        earlier["earlier_images"] = images_spent(before)
    # a student of segments rotates over each; one of a single segment takes any number of calls
    several = segments > 1
    card = Card(
        method=name,
        plans=tuple(
            plan("ddim" if several else "consistency", angles(n), teacher.card.guidance)
            for n in ((segments,) if several else (1, 2, 4, 8))
        ),
        abilities=() if several else ("jump",),
        training={"mode": mode, **earlier, **settings},
        **student_card(teacher),
    )
    aim = objective(options.loss, teacher.denoiser, student, angles)
    if frechet:
        assert isinstance(aim, Consistency)
        aim = aim.joined_by(frechet_term(frechet, teacher, dataset, options.fit))
    return train_model(out, method(student, aim), dataset, options.fit, card)


def first_weights(
    options: ConsistencyOptions, teacher: Model, from_teacher: bool
) -> tuple[Denoiser, Model | None]:
    """The student before its training, and the model whose weights it has."""
    if options.start:
        start = load(options.start, options.fit.precision)
        if network_of(start) != network_of(teacher):
            raise UserError(
                f"--start {options.start} has another network or other images than the teacher: "
                "name a run that was made from this teacher"
            )
        return start.denoiser.requires_grad_(True), start
    if from_teacher:
        return deepcopy(teacher.denoiser).requires_grad_(True), teacher
    torch.manual_seed(seed32(options.fit.seed))
    return of_card(teacher.card, options.fit.precision), None


def network_of(model: Model) -> tuple:
    """What two models must have in common for one to go on from the other's weights."""
    card = model.card
    return card.net, card.denoiser, card.condition, card.codec, model.spec
