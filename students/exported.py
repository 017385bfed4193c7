"""What students.export wrote, as what makes images: an .onnx or .pt2 file, or weights.

Each says of itself what its checkpoint's card says, and the plan that it was exported with.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter, with_config
from torch import Tensor

from diffusion import codec, condition, foreign
from diffusion.checkpoint import Card
from diffusion.condition import Condition
from diffusion.console import UserError, first_line
from diffusion.data import ImageSpec
from diffusion.files import load_tensors, metadata
from diffusion.model import Model, of_card
from diffusion.plan import Plan
from diffusion.typed import CLOSED, Positive, Sha256, Text, checked, parse
from students.api import Checkpoint, ImageModel
from students.graph import inputs

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

KEY = "fewstep"  # in a file's metadata, what it says of itself
Run = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
Format = Literal["onnx", "torch", "diffusers", "safetensors"]
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "weights.safetensors"}
WEIGHTS = "network/diffusion_pytorch_model.safetensors"  # in a folder for diffusers
Precision = Literal["fp32", "fp16", "bf16", "int8"]


@with_config(CLOSED)
@dataclass(frozen=True)
class About:
    """What an export says of itself."""

    format: Format
    precision: Precision
    """The number format of the weights and, in a graph, of its arithmetic."""
    plan: Plan
    """What it was exported to do."""
    inputs: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)]
    """The names of a graph's inputs, the noise first."""
    draws: Positive
    """Standard normal images that one image takes: they are the channels of the noise."""
    sha256: Sha256
    """Identity of the checkpoint's weights."""
    card: Card

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes, place: Path) -> "About":
        """The inverse of to_json. UserError names what does not fit."""
        try:
            values = parse(text)
        except ValueError as error:
            raise UserError(f"{place}: what it says of itself is no JSON ({error})") from error
        return checked(ABOUT, values, str(place))


ABOUT = TypeAdapter(About)


class Exported(ImageModel):
    """A graph that makes images by one plan alone."""

    def __init__(self, about: About, name: str, device: torch.device, run: Run):
        """run: inputs by name -> (images (B, H, W, C) uint8, x0), on the device."""
        self.about, self.name, self.device, self.run = about, name, device, run
        self.method, self.sha256 = about.card.method, about.sha256
        self.spec = ImageSpec(**about.card.data)
        self.kinds = condition.from_json(about.card.condition)
        self.latent = codec.from_json(about.card.codec).shape(self.spec.shape)

    def plan(
        self, steps: int | None = None, sampler: str | None = None, guidance: float | None = None
    ) -> Plan:
        own = self.about.plan
        if steps not in (None, own.num_steps) or sampler not in (None, own.sampler):
            raise UserError(
                f"{self.name} was exported to make images by {own.sampler} in {own.num_steps} "
                "steps and no others: leave them out, or export its checkpoint again"
            )
        if guidance in (None, own.guidance or 1.0):
            return own
        if "guidance" not in self.about.inputs:
            raise UserError(
                f"{self.name} was exported without guidance: leave it out, or export its "
                "checkpoint again with --guidance"
            )
        return own.guided(guidance)

    def inputs(
        self, plan: Plan, seed: int | Tensor, numbers: Tensor, given: Condition
    ) -> dict[str, Tensor]:
        """What its graph is given for images of these numbers, by name."""
        conditions = condition.usual(self.kinds, numbers, given)
        made = inputs(conditions, plan, seed, numbers, self.latent, self.about.draws)
        return {name: made[name] for name in self.about.inputs}

    def make(self, plan: Plan, seed: int | Tensor, numbers: Tensor, condition: Condition) -> Tensor:
        images, x0 = self.run(self.inputs(plan, seed, numbers, condition))
        if not x0.isfinite().all():
            raise UserError(f"{self.name} makes images that are not finite (NaN or infinite)")
        return images.permute(0, 3, 1, 2)


def onnx_session(
    path: Path, refusal: str = "does not load in onnxruntime", threads: int = 0
) -> "InferenceSession":
    """The file in onnxruntime, on the CPU. threads: 0 for as many as it chooses."""
    try:
        from onnxruntime import InferenceSession, SessionOptions
    except ImportError:
        raise UserError(
            "an .onnx file needs onnxruntime, which is not here: pip install onnxruntime"
        ) from None
    settings = SessionOptions()
    settings.log_severity_level = 3  # errors: a graph's unused values are its maker's business
    settings.intra_op_num_threads = threads
    try:
        return InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # a wrong file fails in as many ways as there are files
        raise UserError(f"{path} {refusal} ({first_line(error):.200})") from error


def says(session: "InferenceSession") -> str | None:
    """What an .onnx file says of itself; None for a file that students.export did not write."""
    return session.get_modelmeta().custom_metadata_map.get(KEY)


def load_onnx(path: Path, device: torch.device) -> Exported:
    session = onnx_session(path, threads=torch.get_num_threads())
    said = says(session)
    if said is None:
        raise UserError(f"{path}: expected an .onnx file that students.export wrote")
    return of_session(session, About.from_json(said, path), path, device)


def of_session(
    session: "InferenceSession", about: About, path: Path, device: torch.device
) -> Exported:
    def run(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        made = session.run(None, {name: each.cpu().numpy() for name, each in rows.items()})
        images, x0 = (torch.from_numpy(np.asarray(each)).to(device) for each in made)
        return images, x0

    return Exported(about, str(path), device, run)


def load_torch(path: Path, device: torch.device, trust: bool) -> Exported:
    """A .pt2 file. It can run code of its maker when it is loaded: UserError without trust."""
    if not trust:
        raise UserError(
            f"{path} can run code of its maker when it is loaded: take an .onnx export, or "
            "load(..., trust=True) if you know its maker"
        )
    from torch.export.passes import move_to_device_pass  # slow to import

    extra = {f"{KEY}.json": ""}
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.export.load(path, extra_files=extra)
            module = move_to_device_pass(program, str(device)).module()
    except Exception as error:
        raise UserError(
            f"{path} does not load as a torch.export file ({first_line(error):.200})"
        ) from error

    return of_module(module, About.from_json(extra[f"{KEY}.json"], path), path, device)


def of_aot(path: Path, about: About) -> Exported:
    """A package that AOTInductor compiled: machine code of whoever made it, for one device."""
    from torch._inductor import aoti_load_package

    with warnings.catch_warnings(action="ignore"):
        module = aoti_load_package(str(path))
    return of_module(module, about, path, torch.device("cpu"))


def of_module(
    module: Callable[..., tuple[Tensor, Tensor]], about: About, path: Path, device: torch.device
) -> Exported:
    @torch.no_grad()
    def run(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return module(*rows.values())

    return Exported(about, str(path), device, run)


def model_of(
    about: About, weights: dict[str, Tensor], precision: str, device: torch.device
) -> Model:
    """The model of weights that were exported, whatever their number format."""
    wide = {
        name: each.float() if each.is_floating_point() else each for name, each in weights.items()
    }
    denoiser = of_card(about.card, precision, wide).to(device).eval().requires_grad_(False)
    return Model(denoiser, about.card, about.sha256)


def load_weights(path: Path, device: torch.device, precision: str) -> "Planned":
    """A .safetensors file that students.export wrote."""
    weights, values = load_tensors(path)
    about = About.from_json(values[KEY], path)
    return Planned(model_of(about, weights, precision, device), str(path), about.plan)


def load_folder(path: Path, about: About, device: torch.device, precision: str) -> "Planned":
    """A folder for diffusers, of which the weights are read and no code is run."""
    if about.card.net["name"] == "diffusers":
        weights, _, _ = foreign.of_diffusers(str(path))
    else:
        named, _ = load_tensors(path / WEIGHTS)
        weights = {name.removeprefix("net."): each for name, each in named.items()}
    return Planned(model_of(about, weights, precision, device), str(path), about.plan)


class Planned(Checkpoint):
    """A model whose usual plan is the one that it was exported with."""

    def __init__(self, model: Model, name: str, usual: Plan):
        super().__init__(model, name)
        self.usual = usual

    def plan(
        self, steps: int | None = None, sampler: str | None = None, guidance: float | None = None
    ) -> Plan:
        if steps is None and sampler is None:
            return self.model.guided(self.usual, guidance)
        return super().plan(steps, sampler, guidance)


def load(path: Path, device: torch.device, precision: str, trust: bool) -> ImageModel | None:
    """What students.export wrote at that path, a file or its folder; None for anything else."""
    described = path / f"{KEY}.json"
    if path.is_dir() and described.is_file():
        about = About.from_json(described.read_bytes(), described)
        if about.format == "diffusers":
            return load_folder(path, about, device, precision)
        path = path / FILES[about.format]
    if path.suffix == ".onnx":
        return load_onnx(path, device)
    if path.suffix == ".pt2":
        return load_torch(path, device, trust)
    if path.suffix == ".safetensors" and path.is_file() and KEY in metadata(path):
        return load_weights(path, device, precision)
    return None
