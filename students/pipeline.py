"""A model as a folder that diffusers loads: its own classes where it has them, else ours."""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from diffusion import networks
from diffusion.codec import Scale
from diffusion.console import UserError
from diffusion.files import write_atomic
from diffusion.model import Model
from diffusion.networks.diffusers import DiffusersConfig, library
from students.bundle import bundle
from students.exported import WEIGHTS, About
from students.graph import inputs
from students.to_diffusers import to_diffusers

SOURCE = "students.circle_pipeline"
PARTS = {  # a component's folder and its file -> its class
    ("", "pipeline"): "CirclePipeline",
    ("network", "network"): "CircleNetwork",
    ("scheduler", "scheduler"): "CircleScheduler",
}
SAMPLERS = ("ddim", "truncated", "ancestral", "consistency")  # which a scheduler of ours steps by


def write(model: Model, about: About, folder: Path) -> dict[str, str]:
    """Write the folder; what is in each of its files.

    UserError for a model that no pipeline of diffusers can hold.
    """
    if isinstance(networks.from_json(model.card.net), DiffusersConfig):
        to_diffusers(model, folder)
        return {"model_index.json": "diffusers' own pipeline, network and scheduler"}
    _write_ours(model, about, folder)
    return {
        "model_index.json": "the parts of the pipeline, for diffusers",
        "pipeline.py": "the pipeline: noise to images",
        "network/": "the network: its code, its shape, its weights",
        "scheduler/": "the scheduler: its code, its angles",
    }


def _write_ours(model: Model, about: About, folder: Path) -> None:
    plan, codec, denoiser = about.plan, model.codec, model.denoiser
    if plan.sampler not in SAMPLERS:
        raise UserError(
            f"a folder for diffusers steps by one of {', '.join(SAMPLERS)}, got {plan.sampler}: "
            "give another --sampler, or --to onnx"
        )
    if not isinstance(codec, Scale):
        raise UserError("a folder for diffusers holds models of pixels alone: give --to onnx")
    library()  # where it is missing, that is said now
    import students.circle_pipeline  # noqa: F401  whose source is bundled; it imports diffusers

    kind, shape = type(denoiser.net), dict(model.card.net)
    network = {(SOURCE, "NETWORK"): (kind.__module__, kind.__name__)}
    about_code = "A model of fewstep for diffusers. Written by students.export."
    for (place, name), entry in PARTS.items():
        code = bundle((SOURCE, entry), network, about_code)
        write_atomic(folder / place / f"{name}.py", code)
    config = denoiser.config
    _json(folder / "network" / "config.json", {
        "_class_name": "CircleNetwork",
        "shape": {key: value for key, value in shape.items() if key != "name"},
        "outputs": shape["channels"] * (1 + config.learned_variance),
        "kinds": model.card.condition,
        "prediction": config.prediction,
        "bounds": config.bounds,
    })  # fmt: skip
    _json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "CircleScheduler", "sampler": plan.sampler, "angles": plan.angles,
    })  # fmt: skip
    _json(folder / "model_index.json", {
        "_class_name": ["pipeline", "CirclePipeline"],
        "network": ["network", "CircleNetwork"],
        "scheduler": ["scheduler", "CircleScheduler"],
        "mean": codec.mean,
        "std": codec.std,
        "guidance": plan.guidance,
    })  # fmt: skip
    weights = {f"net.{k}": v.cpu().contiguous() for k, v in denoiser.net.state_dict().items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS, {"format": "pt"})
    if levels := differs(model, about, folder):
        raise UserError(
            f"the diffusers export is refused: its images differ from PyTorch's by up to {levels} "
            "grey levels of the same noise; nothing is left of it"
        )


def differs(model: Model, about: About, folder: Path) -> int:
    """The most grey levels by which diffusers' images of the folder differ from the model's, of the
    same noise."""
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pipeline = library().DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    numbers = torch.arange(7)
    made = inputs({}, about.plan, 0, numbers, model.shape, about.draws)["noise"]
    noise = torch.stack(made.chunk(about.draws, dim=1))
    images = pipeline(len(numbers), noise=noise, output_type="np").images
    exact = model.sample(about.plan, 0, numbers.to(model.device)).permute(0, 2, 3, 1).cpu().numpy()
    return int(np.abs(images.astype(int) - exact.astype(int)).max())


def _json(path: Path, values: dict) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")
