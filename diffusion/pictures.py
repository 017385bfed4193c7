"""Pictures of images: grids as PNG, small images enlarged so that pixels can be seen."""

import io
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from diffusion.files import write_atomic
from diffusion.folders import SIGN


def png(image: Tensor, texts: Mapping[str, str] | None = None) -> bytes:
    """(C, H, W) uint8, one or three channels, as PNG bytes. texts: what it says, by keyword."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    buffer, info = io.BytesIO(), PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """(N, C, H, W) uint8 -> one (3, H', W') uint8, each image at least 56 pixels high."""
    scale = math.ceil(56 / images.shape[-1])
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    columns = columns or math.ceil(math.sqrt(len(images)))
    return make_grid(images.cpu(), nrow=columns, padding=4, pad_value=255).to(torch.uint8)


def save_grid(
    path: Path,
    images: Tensor,
    texts: Mapping[str, str] | None = None,
    columns: int | None = None,
) -> None:
    """texts: what the file says, by keyword; if left out, that the suite made it."""
    write_atomic(path, png(grid(images, columns), {"Software": SIGN} if texts is None else texts))
