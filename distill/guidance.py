"""Distillation of classifier-free guidance (Meng et al. 2023): `python -m distill.guidance`.

Stage one of two: a network that takes the guidance weight as an input does in one call what a
guided teacher does in two. It samples as the teacher does; `python -m distill.progressive
--teacher runs/NAME/guided` then halves its steps, at every weight of the range at once.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import networks
from diffusion.batches import Batch
from diffusion.checkpoint import Card
from diffusion.circle import add_noise, x0_loss
from diffusion.condition import Guidance as Weight
from diffusion.condition import to_json
from diffusion.console import UserError, run
from diffusion.denoiser import Denoiser
from diffusion.model import Model, build
from diffusion.networks import NetworkConfig
from diffusion.noise import seed32
from diffusion.runs import train_model
from diffusion.training import Followers, one_network
from distill import shared
from students.start import StudentOptions, begin, parse, student_card
from teachers.levels import uniform


@dataclass(frozen=True)
class Options(StudentOptions):
    """Make a student that does a guided teacher's two calls a step in one (Meng et al. 2023).

    The guidance weight becomes an input of the network."""

    teacher: Path = Path("runs/digits-classes/teacher")
    """The run or checkpoint of a teacher that was trained with --num-classes or
    --text-encoder."""
    guidance: tuple[float, float] = (1.0, 4.0)
    """The least and the greatest weight that the student learns. 1 is no guidance and must be
    within."""
    own_guidance: float = 1.5
    """The weight that the student samples with if students.generate is given no --guidance. On
    digits 1.5 is the least weight measured at which every image is of its class."""


PRESETS = {data: Options(fit=fit) for data, fit in shared.FITS.items()}


@dataclass(frozen=True)
class Guidance:
    """The student's x0 = the teacher's guided x0, at a weight of its own for each image.

    Meng et al. 2023, section 3, stage one, with velocity's weighting. The weight
    is one of the batch's conditions, which a teacher without such an input answers in two calls.
    """

    teacher: nn.Module
    angles: Tensor
    """(N + 1,) float64, ascending from 0: the teacher's."""
    followers: Followers = field(default_factory=dict)

    def __call__(self, student: nn.Module, batch: Batch, progress: float) -> Tensor:
        t = uniform(self.angles, batch.level)
        x_t = add_noise(batch.x0, batch.eps, t)
        with torch.no_grad():
            target = self.teacher(x_t, t, batch.condition)
        x0 = student(x_t, t, batch.condition, dropout=batch.dropout())
        return x0_loss(x0, target, t, "v")


def with_guidance_input(
    teacher: Denoiser, net: NetworkConfig, guidance: tuple[float, float], seed: int
) -> Denoiser:
    """The teacher's network and weights with a guidance input, which changes nothing as yet.

    net: the shape of the teacher's network.
    """
    torch.manual_seed(seed32(seed))
    kinds = {**teacher.kinds, "guidance": Weight(*guidance)}
    student = build(net, teacher.config, kinds, teacher.precision)
    missing, unexpected = student.net.load_state_dict(teacher.net.state_dict(), strict=False)
    if unexpected or not missing:
        raise UserError(
            "the teacher's network takes no guidance weight: choose one that does, as the U-Net"
        )
    return student


def distill(options: Options) -> Model:
    """The guided student of these options: loaded where it is finished, else trained."""
    low, high = options.guidance
    if not 0 <= low <= 1 <= high < float("inf") or low == high:
        raise UserError(
            "--guidance must be a least and a greatest weight, from 0 on and with 1 in their "
            f"range, such as 1 4, got {low:g} {high:g}"
        )
    if not low <= options.own_guidance <= high:
        raise UserError(
            f"--own-guidance must be in --guidance's range {low:g} to {high:g}, "
            f"got {options.own_guidance:g}"
        )
    options, teacher, dataset, out = begin(options, "guided")
    if not teacher.kinds:
        raise UserError(
            f"{options.teacher} knows no classes and no captions to guide towards: train a "
            "teacher with --num-classes or --text-encoder"
        )
    if "guidance" in teacher.kinds:
        raise UserError(
            f"{options.teacher} takes its guidance weight as an input already: give it to "
            "distill.progressive, or name its own teacher"
        )
    net = networks.from_json(teacher.card.net)
    student = with_guidance_input(teacher.denoiser, net, options.guidance, options.fit.seed)
    inherited: dict[str, Any] = student_card(teacher) | {
        "condition": to_json(student.kinds),
        "denoiser": student.config.to_json(),
        "shifted": teacher.card.shifted,  # its plans are the teacher's
    }
    # a variance is not trained here
    learned = teacher.card.sampler == "ancestral-learned"
    sampler = "ancestral" if learned else teacher.card.sampler
    card = Card(
        method="guided",
        plans=tuple(
            replace(plan, sampler=sampler, guidance=options.own_guidance)
            for plan in teacher.card.plans
        ),
        abilities=tuple(each for each in teacher.card.abilities if each != "variance"),
        training={"own_guidance": options.own_guidance},
        **inherited,
    )
    objective = Guidance(teacher.denoiser, teacher.schedule.to(teacher.device))
    return train_model(out, one_network(student, objective), dataset, options.fit, card)


def main() -> None:
    distill(parse(PRESETS, "python -m distill.guidance"))


if __name__ == "__main__":
    run(main)
