"""How every student begins: from its teacher's weights, on its teacher's data."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import tyro

from diffusion import data as datasets
from diffusion.config import FitConfig, check
from diffusion.console import UserError
from diffusion.data import Dataset
from diffusion.folders import check_claim
from diffusion.model import Model, load
from diffusion.schedules import check_shift
from teachers import ddpm


@dataclass(frozen=True)
class StudentOptions:
    """What all distillation commands ask."""

    teacher: Path = Path("runs/digits/teacher")
    """The teacher's run or checkpoint; the default one is trained first where there is none."""
    data: str | None = None
    """The dataset, where it is not where the teacher's was."""
    data_dir: Path | None = None
    """Where a named dataset's files are."""
    out: Path | None = None
    """The run's folder; a sibling of the teacher's unless told."""
    shift: float | None = None
    """Of the student's angles: above 1, more of them where noise is heavy. The teacher's unless told."""

    @staticmethod
    def parse(options: type[Self], prog: str) -> Self:
        """Options from the command line; their defaults are those measured for the teacher's data."""
        teacher = Path(ddpm.peek("--teacher", str(StudentOptions.teacher)))
        data = load(teacher).spec.name if _trained(teacher) else "digits"
        config = (tyro.conf.OmitArgPrefixes,)
        return tyro.cli(options, prog=prog, default=options.default(data), config=config)


def find_teacher(
    options: StudentOptions,
    method: str,
    fit: FitConfig,
    check_out: Callable[[Path], None] = check_claim,
) -> tuple[Model, Dataset, Path]:
    """The teacher on its device, its data, and the folder for the run, which check_out lets pass."""
    home = options.teacher.parent if options.teacher.is_file() else options.teacher
    out = options.out or home.parent / method
    check_out(out)
    if not _trained(options.teacher) and options.teacher == StudentOptions.teacher:
        ddpm.train_teacher(ddpm.Options.default("digits"))
    check(fit)
    teacher = load(options.teacher, fit.precision)
    if options.shift is not None:
        check_shift(options.shift)
        teacher = replace(teacher, card=replace(teacher.card, shift=options.shift))
    if fit.compile:
        teacher.denoiser.net.compile()
    spec = teacher.spec
    dataset = datasets.load(options.data or spec.name, options.data_dir, spec.size, spec.channels)
    if dataset.spec.shape != spec.shape:
        raise UserError(
            f"{options.teacher} makes images of shape {spec.shape}, "
            f"but {dataset.spec.name}'s are of shape {dataset.spec.shape}"
        )
    dataset = replace(dataset, spec=replace(spec, name=dataset.spec.name))  # the teacher's scale
    return teacher, dataset, out


def images_spent(model: Model) -> int:
    """Images that this student, and those that it goes on from, took gradients of; 0 of a teacher."""
    training = model.card.training
    return training.get("total_images", training.get("images", 0)) if model.card.parent else 0


def _trained(teacher: Path) -> bool:
    return teacher.is_file() or (teacher / "model.safetensors").exists()


def student_card(teacher: Model) -> dict:
    """What a student's card takes over from its teacher's."""
    card = teacher.card
    taken = {"net": card.net, "guidance": card.guidance, "shift": card.shift}
    origin = card.origin if card.parent else teacher.sha256
    line = {"parent": teacher.sha256, "origin": origin}
    return {**taken, "data": asdict(teacher.spec), **line}
