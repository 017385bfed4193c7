"""How every student begins: from its teacher's weights, on its teacher's data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from diffusion import data as datasets
from diffusion import foreign, networks
from diffusion.config import FitConfig, check
from diffusion.console import UserError
from diffusion.data import Dataset
from diffusion.folders import check_claim
from diffusion.model import Model, load, of_classes, read
from diffusion.runs import settled
from diffusion.schedules import check_shift
from teachers import ddpm
from teachers.presets import for_data


@dataclass(frozen=True)
class StudentOptions:
    """Options of every distillation command."""

    teacher: Path = Path("runs/digits/teacher")
    """The teacher's run or checkpoint, or another maker's model: diffusers:PATH, a folder that its
    save_pretrained wrote, or edm:PACKAGE.MODULE:FUNCTION, a denoiser of your own code. The default
    teacher is trained first if there is none."""
    data: str | None = None
    """The folder that the teacher's images are in now, if it has moved. Of another maker's teacher:
    the dataset, or the folder of images, that its students are trained on."""
    data_dir: Path | None = None
    """The folder that holds a named dataset's files."""
    text_encoder: Path | None = None
    """The folder that the encoder of the images' captions is in now, if it has moved."""
    autoencoder: Path | None = None
    """Where the autoencoder of a teacher in latents is now, if it has moved."""
    trust: bool = False
    """Load a --teacher edm:FILE.pt2. Such a file can run any code of its maker on this machine, as
    a program can: trust one only if you made it or know who did."""
    out: Path | None = None
    """The run's folder. If left out: a folder beside the teacher's, named after the method."""
    shift: float | None = None
    """Where the student's steps are: above 1, more of them where noise is heavy. If left out: as
    the teacher has it. A student that teaches keeps its own."""
    fit: FitConfig = field(default_factory=FitConfig)


Options = TypeVar("Options", bound=StudentOptions)


def parse(
    presets: Mapping[str, Options],
    prog: str,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
) -> Options:
    """Options from the command line; those left out are the preset's for the teacher's data."""
    teacher = Path(ddpm.peek("--teacher", str(StudentOptions.teacher)))
    chosen = preset_for(presets, teacher, ddpm.peek("--data", ""))
    return ddpm.parse(chosen, prog, arguments, description)


def preset_for(presets: Mapping[str, Options], teacher: Path, data: str = "") -> Options:
    """The preset for the data of that teacher; for digits where it is not trained yet.

    data: of another maker's teacher, which names none.
    """
    if foreign.door(teacher):
        return for_data(presets, data)
    return for_data(presets, read(teacher)[1].data["name"] if _trained(teacher) else "digits")


def begin(
    options: Options, method: str, check_out: Callable[[Path], None] = check_claim
) -> tuple[Options, Model, Dataset, Path]:
    """The options, the teacher on its device, its data, and the run's folder.

    The options' `fit` has what `--precision auto` and `--minutes` stand for on this machine.
    check_out: raises UserError for a folder that the run must not be left in.
    """
    out = options.out or home_of(options.teacher) / method
    fit = settled(options.fit, out, *sorted(out.glob("*/")))
    check_out(out)
    if not _trained(options.teacher) and options.teacher == StudentOptions.teacher:
        ddpm.train_teacher(ddpm.Options.default("digits"))
    check(fit)
    decoder, trust = options.autoencoder, options.trust
    teacher = load(options.teacher, fit.precision, autoencoder=decoder, trust=trust)
    if options.shift is not None:
        check_shift(options.shift)
        if teacher.card.shifted and options.shift != teacher.card.shift:
            raise UserError(
                f"--shift {options.shift:g} does not fit {options.teacher}, a student whose angles "
                f"are shifted by {teacher.card.shift:g} already: leave --shift out, or distil its "
                "teacher"
            )
        teacher = replace(teacher, card=replace(teacher.card, shift=options.shift))
    dataset = datasets.reload(teacher.spec, options.data, options.data_dir, options.text_encoder)
    teacher = of_classes(teacher, dataset.num_classes)
    if fit.compile:
        teacher.denoiser.net.compile()
    place = {name: getattr(dataset.spec, name) for name in ("name", "sha256", "text_encoder")}
    spec = replace(teacher.spec, **place)
    dataset = replace(dataset, spec=spec, codec=teacher.codec)  # the teacher's scale
    # its students' cards say where its images are now
    if teacher.spec.sha256 or not teacher.spec.name:
        teacher = replace(teacher, card=replace(teacher.card, data=asdict(dataset.spec)))
    return replace(options, fit=fit), teacher, dataset, out


def images_spent(model: Model) -> int:
    """Images that this student and those before it took gradients of; 0 for a teacher."""
    training = model.card.training
    return training.get("total_images", training.get("images", 0)) if model.card.parent else 0


def home_of(teacher: Path) -> Path:
    """The folder that the teacher's students are left in: its own run's, or runs/NAME."""
    if foreign.door(teacher):
        return ddpm.run_folder(foreign.name_of(teacher))
    return (teacher.parent if teacher.is_file() else teacher).parent


def _trained(teacher: Path) -> bool:
    if foreign.door(teacher):
        return True
    return teacher.is_file() or (teacher / "model.safetensors").exists()


def student_card(teacher: Model) -> dict[str, Any]:
    """What a student's card takes over from its teacher's; its plans are shifted.

    UserError for a teacher whose network no student can have.
    """
    card = teacher.card
    if getattr(networks.from_json(card.net), "exported", False):
        raise UserError(
            "the teacher's network is an exported program, which is not trained further: make a "
            "network say the same by python -m distill.match, and distil that one"
        )
    return {
        "net": card.net,
        "denoiser": card.denoiser,
        "condition": card.condition,
        "codec": card.codec,
        "shift": card.shift,
        "shifted": True,
        "data": asdict(teacher.spec),
        "parent": teacher.sha256,
        "origin": card.origin if card.parent else teacher.sha256,
    }
