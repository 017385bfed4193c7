"""Vision transformers as feature extractors, from folders that transformers' save_pretrained wrote.

DINOv2 makes FD-DINOv2 as dgm-eval (Stein et al. 2023) and EDM2 (Karras et al. 2024) have it: the
class token after the last norm, of images resized to 224 x 224 as Pillow's bicubic does. CLIP makes
what dgm-eval takes of it: the class token after the last norm, before the projection.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import pretrained
from diffusion.checkpoint import weights_sha256

BATCH = 32


class Kind(NamedTuple):
    """A family of networks."""

    architecture: str
    """The class in transformers."""
    size: int | None
    """Pixels a side that images are resized to; None for those of the network's config."""
    mean: tuple[float, float, float]
    """The mean of each colour, with white = 1, that was taken off in training."""
    std: tuple[float, float, float]


KINDS = {
    "dinov2": Kind("Dinov2Model", 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": Kind(
        "CLIPVisionModel",
        None,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}


def is_named(choice: str) -> bool:
    """Whether it names one of them: dinov2:FOLDER or clip:FOLDER."""
    return choice.partition(":")[0] in KINDS and ":" in choice


def pixels(choice: str, size: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 (B, C, H, W) of 0..255 -> float32 (B, 3, size, size), as that kind was trained on."""
    kind = KINDS[choice.partition(":")[0]]
    mean, std = (255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (kind.mean, kind.std))

    def prepare(images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
        x = x.round().clamp(0, 255)  # as Pillow's, whose pixels are whole
        return (x - mean) / std

    return prepare


def network(choice: str, device: torch.device) -> tuple[Callable[[Tensor], Tensor], int, str]:
    """uint8 (B, C, H, W) of 0..255, C 1 or 3 -> float32 (B, D); D; and the sha256 of what makes
    them: the weights and the size that images are resized to."""
    name, _, folder = choice.partition(":")
    kind = KINDS[name]
    model = pretrained.network(Path(folder), kind.architecture, "features of a folder").to(device)
    size = kind.size or model.config.image_size
    prepare = pixels(choice, size, device)

    def features(images: Tensor) -> Tensor:
        return model(pixel_values=prepare(images)).pooler_output.float()

    def extract(images: Tensor) -> Tensor:
        return torch.cat([features(part) for part in images.split(BATCH)])

    identity = f"{weights_sha256(model.state_dict())} {size}"
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    return torch.no_grad()(extract), model.config.hidden_size, sha256
