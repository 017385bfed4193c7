"""The way back: a model whose teacher was read as diffusers:PATH, as diffusers writes one."""

from pathlib import Path

import torch

from diffusion import networks
from diffusion.console import UserError
from diffusion.model import Model
from diffusion.networks.diffusers import DiffusersConfig, OnTheCircle, levels, library

PIPELINES = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}


def to_diffusers(model: Model, folder: Path) -> list[float]:
    """Write the model as diffusers' save_pretrained would: the network, and a scheduler.

    A teacher keeps its scheduler. A student's is DDIM's on the same noise levels, spaced from the
    noisy end ("trailing"). Returns the timesteps of the model's usual plan, from noise to data. Of
    a network that predicts with bounds (clip_sample), its images are diffusers' own with
    use_clipped_model_output. UserError for a network that is not of diffusers.
    """
    net = networks.from_json(model.card.net)
    if not isinstance(net, DiffusersConfig):
        raise UserError(
            f"its network is {model.card.net['name']}, which diffusers does not know: a model "
            "whose teacher was read as diffusers:PATH goes back"
        )
    library_ = library()
    network = getattr(library_, net.architecture).from_config(net.as_built(model.kinds))
    adapted = model.denoiser.net
    assert isinstance(adapted, OnTheCircle)
    weights = adapted.state_dict()
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    kind, config = net.scheduler["_class_name"], dict(net.scheduler)
    if model.card.parent and levels(net.scheduler).prediction != "flow":
        kind = "DDIMScheduler"
        bounds = model.denoiser.config.bounds
        config |= {"timestep_spacing": "trailing", "set_alpha_to_one": True}
        config |= {"clip_sample": bounds is not None}
    scheduler = getattr(library_, kind).from_config(config)
    if net.architecture == "UNet2DModel" and kind in PIPELINES:
        getattr(library_, PIPELINES[kind])(network, scheduler).save_pretrained(folder)
    else:
        part = "transformer" if "Transformer" in net.architecture else "unet"
        network.save_pretrained(folder / part)
        scheduler.save_pretrained(folder / "scheduler")
    angles = model.card.plans[0].on(torch.device("cpu"))[1:].flip(0)
    return adapted.timestep(angles.float().to(model.device)).tolist()
