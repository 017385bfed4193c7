"""Consistency models: `python -m distill.consistency --mode cd|ct|ict|ect|scm`."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.checkpoint import Card
from diffusion.config import FitConfig
from diffusion.console import UserError, run
from diffusion.data import Dataset
from diffusion.denoiser import Denoiser
from diffusion.model import Model, build, load
from diffusion.noise import seed32
from diffusion.runs import train_model
from diffusion.schedules import even
from diffusion.training import Average, Objective, frozen_copy
from distill.continuous import ContinuousConsistency, LogWeight, unit
from distill.discrete import DISTANCES, WEIGHTS, Consistency
from distill.frechet import Frechet, FrechetTerm, middle, of_data
from distill.pairs import (
    CURRICULA,
    Curriculum,
    LogNormal,
    Pairs,
    Share,
    even_lists,
    fixed,
    growing,
    segments,
    target_decay,
    tightening,
    uniform,
)
from distill.steps import STEPS
from students.start import StudentOptions, find_teacher, images_spent, settle, student_card
from teachers.ddpm import peek
from teachers.presets import preset

TOWARDS = {
    "euler": lambda teacher: lambda batch, x_t, t: teacher(x_t, t, batch.label),
    "data": lambda teacher: lambda batch, x_t, t: batch.x0,
}


@dataclass(frozen=True)
class Options(StudentOptions):
    """Make a student that goes from any noise level straight to an image, in one call or a few.

    An option left out takes the mode's default: the value that measured best, or the paper's. An
    option that a mode does not have is refused.
    """

    mode: Literal["cd", "ct", "ict", "ect", "scm"] = "cd"
    """How the student learns. cd: from the teacher's steps (Song et al. 2023). ect: from the data or
    the teacher's steps, in stages (Geng et al. 2024). scm: from the teacher in continuous time (Lu
    & Song 2024). These three start at the teacher's weights. ct, ict: from the data alone, starting
    at random weights (Song et al. 2023; Song & Dhariwal 2023)."""
    start: Path | None = None
    """The run or checkpoint whose weights the student starts from, such as distill.midtraining's.
    Its network must be the teacher's."""
    solver: Literal["heun", "euler", "data"] | None = None
    """How to get from one noise level to the next. heun, euler: by the teacher's step of second or
    first order; data: by the training image itself, without the teacher."""
    curriculum: Literal["fixed", "root", "doubling"] | None = None
    """cd, ct, ict: how the number of noise levels grows in training. fixed: not at all; root: as
    the root of the iterations (Song et al. 2023); doubling: in stages (Song & Dhariwal 2023)."""
    num_angles: int | None = None
    """cd, ct, ict: how many noise levels the student compares, in the end if the number grows."""
    target_ema: float | None = None
    """All but scm: how slowly the target follows the student, as the decay of an average of its
    weights (where --curriculum grows, at first). 0: the target is the student itself."""
    distance: Literal["l2", "pseudo-huber", "squared"] | None = None
    """All but scm: how the student's image and its target are compared. l2: their distance;
    squared: its square; pseudo-huber: a distance that is smooth at 0 (Song & Dhariwal 2023)."""
    weight: Literal["one", "gap", "sigma-gap", "karras"] | None = None
    """All but scm: how much each pair of noise levels, the angles t > s, counts. one: all alike;
    gap: 1 / (t - s); sigma-gap: 1 / (tan t - tan s); karras: tan^(-6/7) of the pair's middle, as
    sigma-gap falls on Karras' list of angles."""
    frechet: float | None = None
    """cd, ect: weight of a second loss that makes images sharper, the Fréchet distance of the
    student's images from real ones in features of the teacher's network (Mathiasen & Hvilshøj
    2020). 0: none."""
    segments: int | None = None
    """All but scm: into how many parts the noise levels are cut. The student goes from any level to
    the end of its part, and makes an image in so many calls (Heek et al. 2024). 1: a consistency
    model."""
    stages: int | None = None
    """ect: stages of equal length. From each to the next the gap between the two noise levels
    halves."""
    tangent_warmup: float | None = None
    """scm: share of the training over which the student's own derivatives gain their full
    weight."""
    fit: FitConfig = field(default_factory=FitConfig)

    @staticmethod
    def default(data: str) -> "Options":
        mode = MODES.get(peek("--mode", "cd"), MODES["cd"])
        chosen = preset(data)
        return Options(fit=getattr(chosen, mode.fit) or chosen.consistency)


@dataclass(frozen=True)
class Mode:
    from_teacher: bool
    """Whether the student begins, without --start, at the teacher's weights: else at random ones."""
    objective: Callable[[Options, Model, nn.Module], Objective]
    defaults: dict
    """The options that the mode has, with their defaults; it refuses those of other modes."""
    fit: str = "consistency"
    """Which of a dataset's presets it trains by."""


def borders(teacher: Model, num_steps: int) -> Tensor:
    """The angles of a student's steps, that many, ascending from 0."""
    return even(teacher.schedule, num_steps, teacher.card.shift)


def matching(
    options: Options, teacher: Model, student: nn.Module, pairs: Pairs, curriculum: Curriculum
) -> Consistency:
    # in training mode, so that its dropout mask is the student's
    target = frozen_copy(student).to(teacher.device).train() if options.target_ema else None

    def decay(done: int, progress: float) -> float:
        return target_decay(options.target_ema, curriculum, progress)

    return Consistency(
        step=STEPS[options.solver](teacher.denoiser),
        pairs=pairs,
        distance=DISTANCES[options.distance],
        weight=WEIGHTS[options.weight],
        target=target,
        averages=(Average(target, decay),) if target else (),
        ends=segments(borders(teacher, options.segments).to(teacher.device)),
    )


def discrete(options: Options, teacher: Model, student: nn.Module, share: Share) -> Consistency:
    curriculum = CURRICULA[options.curriculum](options.num_angles)
    lists = even_lists(teacher.schedule.to(teacher.device), curriculum, teacher.card.shift)
    return matching(options, teacher, student, growing(lists, share), curriculum)


def staged(options: Options, teacher: Model, student: nn.Module) -> Consistency:
    pairs = tightening(float(teacher.schedule[-1]), options.stages, ICT)
    return matching(options, teacher, student, pairs, fixed(1))


def continuous(options: Options, teacher: Model, student: nn.Module) -> ContinuousConsistency:
    if options.solver not in TOWARDS:
        raise UserError(
            f"--solver must be {' or '.join(TOWARDS)} with --mode scm, got {options.solver}: in "
            "continuous time every solver's step is Euler's"
        )
    top = float(teacher.schedule[-1])
    student.log_weight = LogWeight().to(teacher.device)  # trained with the student
    return ContinuousConsistency(
        towards=TOWARDS[options.solver](teacher.denoiser),
        angles=lambda level: SCM.tan(level, top).atan(),
        warmup=options.tangent_warmup,
        normalise=unit,
        log_weight=student.log_weight,
    )


def with_frechet(
    aim: Consistency, options: Options, teacher: Model, dataset: Dataset
) -> Consistency:
    """The objective with the further loss that --frechet asks for."""
    features = middle(teacher, options.fit.compile)
    real = of_data(features, dataset, options.fit.flip, teacher.device)
    frechet = Frechet(real, math.prod(dataset.spec.shape))
    term = FrechetTerm(options.frechet, features, frechet)
    return replace(aim, frechet=term, averages=(*aim.averages, frechet))


# The papers' P_mean and P_std at their sigma_data = 1/2: tan t is twice their sigma.
ICT = LogNormal(mean=-0.4, std=2.0)
SCM = LogNormal(mean=-0.3, std=1.4)

MODES = {
    "cd": Mode(
        from_teacher=True,
        fit="distillation",
        objective=partial(discrete, share=uniform),
        defaults={
            "solver": "heun",
            "curriculum": "fixed",
            "num_angles": 16,
            "segments": 1,
            "target_ema": 0.95,
            "distance": "l2",
            "weight": "one",
            "frechet": 0.0,
        },
    ),
    "ct": Mode(
        from_teacher=False,
        objective=partial(discrete, share=uniform),
        defaults={
            "solver": "data",
            "curriculum": "root",
            # The paper's 150 and 0.9 are for 800,000 iterations: in the thousands of here its targets
            # are too slow to carry the data from the first pair to the last.
            "num_angles": 80,
            "segments": 1,
            "target_ema": 0.1,
            "distance": "l2",
            "weight": "one",
        },
    ),
    "ict": Mode(
        from_teacher=False,
        objective=partial(discrete, share=ICT.share),
        defaults={
            "solver": "data",
            "curriculum": "doubling",
            "num_angles": 160,  # the paper's 1280 is for 400,000 iterations
            "segments": 1,
            "target_ema": 0.0,
            "distance": "pseudo-huber",
            "weight": "karras",
        },
    ),
    "ect": Mode(
        from_teacher=True,
        objective=staged,
        defaults={
            "solver": "data",
            "stages": 4,
            "segments": 1,
            "target_ema": 0.0,
            "distance": "pseudo-huber",
            "weight": "sigma-gap",
            "frechet": 0.0,
        },
    ),
    "scm": Mode(
        from_teacher=True,
        objective=continuous,
        defaults={"solver": "euler", "tangent_warmup": 0.1},
        fit="continuous",
    ),
}

LIMITS = {
    "num_angles": ("at least 2", lambda n: n >= 2),
    "target_ema": ("in [0, 1)", lambda decay: 0 <= decay < 1),
    "segments": ("at least 1", lambda n: n >= 1),
    "stages": ("at least 1", lambda n: n >= 1),
    "frechet": ("at least 0", lambda weight: 0 <= weight < math.inf),
    "tangent_warmup": ("in [0, 1]", lambda share: 0 <= share <= 1),
}


def settings(options: Options) -> dict:
    """The mode's options, as given or by default. UserError for an option that it does not have."""
    defaults = MODES[options.mode].defaults
    optional = {name for mode in MODES.values() for name in mode.defaults}
    told = {name: getattr(options, name) for name in optional}
    told = {name: value for name, value in told.items() if value is not None}
    for name in sorted(told.keys() - defaults.keys()):
        takes = ", ".join(f"--{name.replace('_', '-')}" for name in defaults)
        raise UserError(
            f"--mode {options.mode} has no --{name.replace('_', '-')}: it takes {takes}"
        )
    chosen = defaults | told
    for name, (words, holds) in LIMITS.items():
        if name in chosen and not holds(chosen[name]):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be {words}, got {chosen[name]}")
    if chosen.get("num_angles", 0) % chosen.get("segments", 1):
        raise UserError(
            f"--num-angles must be a multiple of --segments {chosen['segments']}, so that every "
            f"segment's border is trained, got {chosen['num_angles']}"
        )
    if chosen.get("frechet") and chosen["segments"] > 1:
        raise UserError(
            f"--frechet goes with --segments 1, got {chosen['segments']}: what a student says "
            "within a segment is no image, and has no image's features; leave one of the two out"
        )
    return chosen


def beginning(options: Options, teacher: Model) -> tuple[Denoiser, Model | None]:
    """The student before its training, and the model whose weights it has."""
    if options.start:
        start = load(options.start, options.fit.precision)
        if (start.card.net, start.card.data) != (teacher.card.net, teacher.card.data):
            raise UserError(
                f"--start {options.start} has another network or other images than the teacher: "
                "name a run that was made from this teacher"
            )
        return start.denoiser.requires_grad_(True), start
    if MODES[options.mode].from_teacher:
        return deepcopy(teacher.denoiser).requires_grad_(True), teacher
    torch.manual_seed(seed32(options.fit.seed))
    return build(teacher.card.net, options.fit.precision), None


def sampling(teacher: Model, segments: int) -> dict:
    """How the student samples, for its card: any number of calls, or a rotation over each segment."""
    if segments > 1:
        plans = {segments: borders(teacher, segments).tolist()}
        return {"sampler": "ddim", "plans": plans, "solvers": ()}
    plans = {n: borders(teacher, n).tolist() for n in (1, 2, 4, 8)}
    return {"sampler": "consistency", "plans": plans, "solvers": ("consistency",)}


def distill(options: Options) -> Model:
    """The consistency student of these options: loaded where it is finished, else trained."""
    chosen = settings(options)
    options = replace(options, **chosen)
    options = settle(options, "consistency")
    teacher, dataset, out = find_teacher(options, "consistency", options.fit)
    if teacher.denoiser.prediction == "x0":
        raise UserError(
            f"{options.teacher} predicts x0, and nothing makes it leave a clean image as it is, "
            "which consistency rests on: train a teacher with --prediction v"
        )
    student, before = beginning(options, teacher)
    parts = chosen.get("segments", 1)
    kind, further = (
        "multistep" if parts > 1 else "consistency",
        "-frechet" if options.frechet else "",
    )
    method, earlier = f"{kind}-{options.mode}{further}", {}
    if options.start:
        method, earlier = f"{before.card.method}+{method}", {"start": before.sha256}
    if before and images_spent(before):
        earlier["earlier_images"] = images_spent(before)
    card = Card(
        method=method,
        **sampling(teacher, parts),
        training={"mode": options.mode, **earlier, **chosen},
        **student_card(teacher),
    )
    aim = MODES[options.mode].objective(options, teacher, student)
    if options.frechet:
        aim = with_frechet(aim, options, teacher, dataset)
    return train_model(out, student, aim, dataset, options.fit, card)


def main() -> None:
    distill(StudentOptions.parse(Options, "python -m distill.consistency"))


if __name__ == "__main__":
    run(main)
