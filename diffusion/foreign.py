"""Checkpoints of other makers, by a prefix: each is read once into weights and a card like ours.

`diffusers:PATH` is a folder that `save_pretrained` of diffusers wrote, or a name on the Hugging
Face hub; `edm:PACKAGE.MODULE:FUNCTION` a denoiser of the user's own code. What is read is a teacher
like any other: everything behind the card is the same.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion import autoencoder, codec, condition, networks, text_encoder
from diffusion.checkpoint import Card, weights_sha256
from diffusion.codec import Codec, Scale
from diffusion.condition import Kind, Label, Text
from diffusion.console import UserError, first_line, say
from diffusion.data import ImageSpec
from diffusion.denoiser import DenoiserConfig
from diffusion.latents import Latents
from diffusion.networks import edm
from diffusion.networks.diffusers import DiffusersConfig, Levels, levels, library
from diffusion.plan import plan
from diffusion.schedules import karras
from diffusion.text_encoder import TextEncoder

Checkpoint = tuple[dict[str, Tensor], Card, str]  # weights, card, the weights' sha256
PIXELS = Scale(127.5, 127.5)  # images from -1 to 1, as diffusers trains on them
LEAST_SIGNAL = 1e-3  # cos t below which eps says nothing of x0
MODEL_FOLDERS = ("unet", "transformer", "model")


def door(path: Path, trust: bool = False) -> Callable[[], Checkpoint] | None:
    """What reads the checkpoint that the path names by a prefix; None for a path of the disk.

    trust: whether a file may be loaded that may run code.
    """
    prefix, colon, place = str(path).partition(":")
    if not colon or prefix not in DOORS:
        return None
    return lambda: DOORS[prefix](place, trust)


def name_of(path: Path) -> str:
    """The name of its students' folder: the last part of a folder, a file or a module."""
    place = str(path).partition(":")[2]
    return Path(place.partition(":")[0]).name.removesuffix(edm.EXPORTED).rpartition(".")[2]


def of_edm(place: str, trust: bool = False) -> Checkpoint:
    """A denoiser D(x, sigma) of images from -1 to 1."""
    exported = place.endswith(edm.EXPORTED)
    if exported:
        place = str(Path(place).resolve())
    if trust or not exported:  # a module is the user's own: he has just named it
        networks.trust(place)
    weights, net, classes = edm.described(place)
    kinds: dict[str, Kind] = {"label": Label(classes)} if classes else {}
    card = Card(
        method="teacher",
        plans=(plan("ddim", karras(1000, net.sigma_min, net.sigma_max)),),
        abilities=("denoise",),
        net=networks.to_json(net),
        denoiser=DenoiserConfig().to_json(),
        condition=condition.to_json(kinds),
        codec=codec.to_json(PIXELS),
        data=asdict(ImageSpec("", net.channels, net.size, classes=classes > 0)),
    )
    return weights, card, weights_sha256(weights)


def of_diffusers(place: str, trust: bool = False) -> Checkpoint:
    """A network of diffusers, or a whole pipeline. UserError for what is not supported."""
    folder = _on_disk(place)
    inside = next((name for name in MODEL_FOLDERS if (folder / name).is_dir()), "")
    config = _json(folder / inside / "config.json", "a network's config")
    scheduler = _json(_scheduler(folder), "a scheduler's config")
    architecture = config.get("_class_name")
    known = networks.diffusers.CONDITIONS
    if architecture not in known:
        raise UserError(
            f"{folder}: its network is {architecture!r:.80}, expected one of {', '.join(known)}"
        )
    try:
        noise, shape = levels(scheduler), _shape(config)
        net = DiffusersConfig(*shape, architecture, _plain(config), _plain(scheduler))
        net.check()
        denoiser, kinds = _denoiser(scheduler, noise), _label(config)
        seen = _codec(folder, net.channels)
        spec = _images(seen, net, classes="label" in kinds)
        weights = _weights(folder / inside, architecture)
        if architecture == "UNet2DConditionModel":
            encoder = _encoder(folder, config)
            kinds["text"] = Text(encoder.most, encoder.width, encoder.name, encoder.sha256)
            weights["null_text"] = encoder([""], encoder.most)[0].float()
            home = str((folder / "text_encoder").resolve())
            spec = replace(spec, text_encoder=home, text_sha256=encoder.sha256)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    variance = denoiser.learned_variance
    ancestral = "ancestral-learned" if variance else "ancestral"
    sampler = ancestral if scheduler["_class_name"] == "DDPMScheduler" else "ddim"
    card = Card(
        method="teacher",
        plans=(plan(sampler, _usable(noise, folder)),),
        abilities=("denoise", "variance") if variance else ("denoise",),
        net=networks.to_json(net),
        denoiser=denoiser.to_json(),
        condition=condition.to_json(kinds),
        codec=codec.to_json(seen),
        data=asdict(spec),
    )
    return weights, card, weights_sha256(weights)


def _on_disk(place: str) -> Path:
    """The folder, or a copy of the hub's files."""
    folder = Path(place)
    if folder.is_dir():
        return folder
    if place.count("/") != 1 or place.startswith((".", "/", "~")):
        raise UserError(f"there is no folder {place}: expected one that save_pretrained wrote")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # no network, no such name, no leave to read it
        raise UserError(
            f"there is no folder {place}, and the Hugging Face hub does not give {place!r} ("
            f"{first_line(error)}): expected a folder that save_pretrained wrote, or a name on the "
            "hub"
        ) from error


def _json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no {path}: expected {what}, as save_pretrained writes it")
    try:
        described = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(described, dict):
        raise UserError(f"{path}: expected a JSON object")
    return described


def _scheduler(folder: Path) -> Path:
    places = (folder / "scheduler", folder, folder.parent / "scheduler")
    files = [place / "scheduler_config.json" for place in places]
    return next((file for file in files if file.is_file()), files[0])


def _plain(described: dict[str, Any]) -> dict[str, Any]:
    """Without what diffusers notes of the file itself, such as where it was read from, and without
    the infinities that stand for no limit, which JSON has not."""
    kept = {
        name: value
        for name, value in described.items()
        if not name.startswith("_") and value not in (math.inf, -math.inf)
    }
    return kept | {"_class_name": described["_class_name"]}


def _shape(config: dict[str, Any]) -> tuple[int, int]:
    """The channels and the size of its images."""
    size, channels = config.get("sample_size"), config.get("in_channels")
    if isinstance(size, list) and len({*size}) == 1:
        size = size[0]
    if not isinstance(size, int) or not isinstance(channels, int):
        raise UserError(
            f"its sample_size is {size!r:.40} and its in_channels {channels!r:.40}: expected the "
            "side of square images, and a number"
        )
    return channels, size


def _codec(folder: Path, channels: int) -> Codec:
    """Pixels from -1 to 1, or a pipeline's latents, scaled as its network takes them."""
    if not (folder / "vae").is_dir():
        return PIXELS
    place = f"{autoencoder.FOREIGN}{(folder / 'vae').resolve()}"
    network = autoencoder.load(place)
    if network.latent_channels != channels:
        raise UserError(
            f"its network takes {channels} channels, and its autoencoder makes "
            f"{network.latent_channels}: expected as many"
        )
    config = _json(folder / "vae" / "config.json", "an autoencoder's config")
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    mean, std = (float(shift),) * channels, (1 / float(scale),) * channels
    return Latents(autoencoder.absolute(place), network.sha256, network.factor, mean, std)


def _images(seen: Codec, net: DiffusersConfig, classes: bool) -> ImageSpec:
    """The shape of its images, of which nothing else is known."""
    if isinstance(seen, Latents):
        pixels = autoencoder.load(seen.autoencoder, seen.sha256).channels, net.size * seen.factor
        return ImageSpec("", *pixels, classes=classes)
    return ImageSpec("", net.channels, net.size, classes=classes)


def _label(config: dict[str, Any]) -> dict[str, Kind]:
    """The classes that the network takes."""
    transformer = config["_class_name"] == "DiTTransformer2DModel"
    classes = config.get("num_embeds_ada_norm" if transformer else "num_class_embeds")
    return {"label": Label(classes)} if classes else {}


def _encoder(folder: Path, config: dict[str, Any]) -> TextEncoder:
    """What turns prompts into what the network takes."""
    place = folder / "text_encoder"
    if not place.is_dir():
        raise UserError(
            "its network takes texts, but no text_encoder/ is beside it: expected a whole "
            "pipeline's folder, with text_encoder/ and tokenizer/"
        )
    encoder = text_encoder.load(place)
    if encoder.width != config.get("cross_attention_dim"):
        raise UserError(
            f"its network takes texts of width {config.get('cross_attention_dim')!r:.40}, and its "
            f"text encoder makes {encoder.width}"
        )
    return encoder


def _denoiser(scheduler: dict[str, Any], noise: Levels) -> DenoiserConfig:
    """What its scheduler makes of the network's output."""
    kind = scheduler["_class_name"]
    clip = scheduler.get("clip_sample", kind in ("DDPMScheduler", "DDIMScheduler"))
    reach = float(scheduler.get("clip_sample_range", 1.0))
    variance = scheduler.get("variance_type") if kind == "DDPMScheduler" else None
    if variance not in (None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"):
        raise UserError(
            f"its variance_type is {variance!r:.80}: expected fixed_small, fixed_large or "
            "learned_range"
        )
    return DenoiserConfig(
        prediction="v" if noise.prediction == "flow" else noise.prediction,
        learned_variance=variance in ("fixed_large", "learned_range"),
        bounds=(-reach, reach) if clip else None,
    )


def _usable(noise: Levels, folder: Path) -> Tensor:
    """The angles of its plan, from 0 to its last at which the network says something of x0."""
    angles, signal = noise.angles, noise.angles.cos()
    if noise.prediction == "eps":
        angles = angles[signal >= LEAST_SIGNAL]
        if left_out := len(signal) - len(angles):
            say(
                f"{folder}: its last {left_out} noise levels are left out, where eps says nothing "
                "of the image"
            )
    if float(angles[-1].cos()) > 1e-6:
        say(
            f"{folder}: its schedule ends before pure noise, at cos t = "
            f"{float(angles[-1].cos()):.3g}; all its plans begin there"
        )
    return torch.cat([angles.new_zeros(1), angles])


def _weights(folder: Path, architecture: str) -> dict[str, Tensor]:
    """The network's weights in float32, by diffusers' names of today."""
    kind = getattr(library(), architecture)
    try:
        network = kind.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    except Exception as error:  # a wrong file fails in as many ways as there are files
        raise UserError(
            f"{folder}: diffusers cannot read the network ({first_line(error)})"
        ) from error
    return {name: value.contiguous() for name, value in network.state_dict().items()}


DOORS: dict[str, Callable[[str, bool], Checkpoint]] = {"diffusers": of_diffusers, "edm": of_edm}
