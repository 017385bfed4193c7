"""An invisible watermark, and who finds it again: `python -m students.watermark PICTURES`.

The method is dwtDctSvd of invisible-watermark: bits in the largest singular values of a wavelet's
cosine transform, in a colour channel, each bit in many blocks of the picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from diffusion.console import UserError, run, say
from diffusion.image_file import MODES
from diffusion.image_folder import pictures_in

METHOD = "dwtDctSvd"
MARK = b"few1"
"""32 bits that say: made by fewstep."""
BITS = 8 * len(MARK)
SMALLEST = 256  # pixels of a side, below which the library refuses
ENOUGH = 26
"""Bits that must agree. Of a picture without a mark, half agree: 26 by chance once in 3,700."""


def check(size: int, channels: int = 3) -> None:
    """UserError for images that are too small for the method, or grey."""
    if channels != 3:
        raise UserError(
            "--watermark is in the colours, and this model's images are grey: leave it out"
        )
    if size < SMALLEST:
        raise UserError(
            f"--watermark needs images of at least {SMALLEST}x{SMALLEST} pixels, and these have "
            f"{size}x{size}: leave it out"
        )
    _library()


def _library() -> tuple[Any, Any]:
    """The encoder's class and the decoder's."""
    try:
        from imwatermark import WatermarkDecoder, WatermarkEncoder
    except ImportError:
        raise UserError(
            "a watermark needs invisible-watermark: pip install fewstep[watermark]"
        ) from None
    return WatermarkEncoder, WatermarkDecoder


def marked(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 with the mark."""
    check(min(images.shape[2:]), images.shape[1])
    encoder = _library()[0]()
    encoder.set_watermark("bytes", MARK)
    made = [
        encoder.encode(np.ascontiguousarray(rgb[..., ::-1]), METHOD)[..., ::-1]
        for rgb in images.permute(0, 2, 3, 1).cpu().numpy()
    ]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def agreeing(rgb: np.ndarray) -> int:
    """How many of the mark's 32 bits a picture (H, W, 3) uint8 holds."""
    check(min(rgb.shape[:2]))
    decoder = _library()[1]("bytes", BITS)
    payload = decoder.decode(np.ascontiguousarray(rgb[..., ::-1]), METHOD)
    bits = [np.unpackbits(np.frombuffer(each, np.uint8)) for each in (payload, MARK)]
    return int((bits[0] == bits[1]).sum())


@dataclass(frozen=True)
class Options:
    """Say which pictures bear the watermark of students.generate --watermark."""

    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Pictures, or folders of them."""


def main() -> None:
    from PIL import Image

    options = tyro.cli(Options, prog="python -m students.watermark")
    for place in options.pictures:
        for path in pictures_in(place) if place.is_dir() else [place]:
            try:
                rgb = np.asarray(Image.open(path).convert(MODES[3]))
            except OSError as error:
                raise UserError(f"{path} cannot be read as a picture ({error})") from error
            count = agreeing(rgb)
            word = "marked" if count >= ENOUGH else "no mark"
            say(f"{path}  {word}, {count} of {BITS} bits agree")


if __name__ == "__main__":
    run(main)
