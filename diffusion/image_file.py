"""One image file, of whatever kind -> pixels of one form: upright, opaque, 8 bits a channel."""

import logging
import re
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, PngImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from diffusion.console import UserError

Aspect = Literal["crop", "pad"]
MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
# Pillow lists these among images: pages, films, tables, and what starts another program.
NO_PICTURES = {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# To be decoded of one file; a JPEG is decoded at down to an eighth of its width.
MOST_PIXELS = 2**28
LARGE = 2**25  # pixels, above which one file at a time is decoded: 4 bytes a pixel, and a copy
TURNS = {  # an EXIF orientation -> what shows the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ACROSS = {TURNS[orientation] for orientation in (5, 6, 7, 8)}  # they swap width and height
PILLOWS_LIMITS = (  # and what they are while a folder is read
    (Image, "MAX_IMAGE_PIXELS", None),
    (PngImagePlugin, "MAX_TEXT_CHUNK", 2**28),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 2**28),
)
_alone = threading.Lock()


@dataclass(frozen=True)
class Form:
    """What every image of a folder is brought to."""

    size: int = 32
    """Pixels of its height and of its width."""
    channels: int = 3
    """1 for grey, 3 for colour."""
    background: str = "white"
    """The colour behind what is transparent, and beside what is padded: a name, or #rrggbb."""
    aspect: Aspect = "crop"
    """What becomes of an image that is no square. crop: its middle is taken; pad: all of it is, and
    the background lies beside."""

    def check(self) -> None:
        """UserError for a form that no image can be brought to."""
        if self.channels not in MODES or self.size < 1:
            raise UserError(
                "a folder's images have --channels 1 or 3 and a --size of at least 1, "
                f"got {self.channels} and {self.size}"
            )
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise UserError(
                "--background must be a colour such as white, black or #rrggbb, "
                f"got {self.background!r}"
            )


class Picture(NamedTuple):
    """An image in the form that was asked for, and what it was before."""

    pixels: Tensor
    """(C, size, size) uint8."""
    mode: str
    """What its file holds, in Pillow's words, such as RGB or I;16."""
    size: tuple[int, int]
    """Width and height, upright."""
    turned: bool
    """By its EXIF tag."""


class Empty(Exception):
    """A file of no bytes."""


@cache
def kinds() -> tuple[list[str], frozenset[str]]:
    """Pillow's names of the formats that are read, and the suffixes of their files."""
    suffixes = Image.registered_extensions()  # loads all formats
    names = [name for name in Image.ID if name not in NO_PICTURES]
    return names, frozenset(suffix for suffix, name in suffixes.items() if name in names)


def read(path: Path | BinaryIO, form: Form) -> Picture:
    """The file's image: its middle, as large a square as it holds, or all of it; antialiased.

    Raises whatever its decoder does; `reason` has the words for it.
    """
    with Image.open(path, formats=kinds()[0]) as image:
        mode, size = image.mode, image.size
        # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, if that is more than this
        reduced = image.draft(None, (4 * form.size, 4 * form.size))
        pixels = image.width * image.height
        if pixels > MOST_PIXELS:
            raise Image.DecompressionBombError
        with _alone if pixels > LARGE else nullcontext():
            image.load()
            # a width of 900 is 112.5 then: the last column is no whole one
            measures, turn = reduced[1][2:] if reduced else image.size, _turn(image)
            pixels = _formed(image, measures, turn, form)
    return Picture(pixels, mode, size[::-1] if turn in ACROSS else size, turn is not None)


def _formed(
    image: Image.Image,
    measures: tuple[float, float],
    turn: Image.Transpose | None,
    form: Form,
) -> Tensor:
    """The pixels of a loaded image of that width and height."""
    mode = MODES[form.channels]
    image = _shallow(image)
    clear = image.has_transparency_data
    needed = "RGBA" if clear else mode
    image = image if image.mode == needed else image.convert(needed)  # which would copy it
    # what is taken of its width and height, in its own pixels and in the form's
    taken = [min(measures)] * 2 if form.aspect == "crop" else measures
    width, height = (max(1, round(form.size * each / max(taken))) for each in taken)
    left, top = ((measure - each) / 2 for measure, each in zip(measures, taken, strict=True))
    box = left, top, left + taken[0], top + taken[1]
    # a mean over whole pixels first, down to 4 times the size: no different to the eye
    image = image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=4.0)
    whole = Image.new(needed, (form.size, form.size), form.background)
    corner = (form.size - width) // 2, (form.size - height) // 2
    if clear:
        whole.alpha_composite(image, corner)
        whole = whole.convert(mode)
    else:
        whole.paste(image, corner)
    if turn is not None:
        whole = whole.transpose(turn)
    pixels = torch.from_numpy(np.array(whole))
    return pixels.reshape(form.size, form.size, form.channels).permute(2, 0, 1)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What shows it upright; nothing where its EXIF cannot be read, as in every viewer."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def _shallow(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel; only a grey one can have more.

    Of 16 bits, 0 is black and 65535 white. Integers of 32 bits, and floats, do not say what is
    white: it is the least of 1, 255, 4095 and 65535 that none of the image's values exceeds.
    Floats may exceed it by a tenth, and 0 by a tenth of their largest: a filter's overshoot, which
    is cut off. Other values go from their own least, as black, to their own largest, as white.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    floats, deep = image.mode == "F", image.mode.startswith("I;16") or image.format == "PPM"
    levels = np.asarray(image if floats else image.convert("I"))
    tiff = isinstance(image, TiffImageFile) and image.mode == "I"
    if tiff and 2 not in image.tag_v2.get(339, ()):
        levels = levels.view(np.uint32)  # Pillow has no such mode
    low, high = 0, 65535
    if floats or not deep:
        finite = levels[np.isfinite(levels)]
        if not finite.size:
            raise ValueError("none of its values is a finite number")
        least, most = float(finite.min()), float(finite.max())
        slack = 0.1 if floats else 0.0
        tops = [top for top in (1, 255, 4095, 65535) if most <= (1 + slack) * top]
        low, high = (0, tops[0]) if tops and least >= -slack * most else (least, most)
    scaled = (levels.astype(np.float32) - low) * (255 / ((high - low) or 1))
    scaled = np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).clip(0, 255)
    grey = Image.fromarray(scaled.round().astype(np.uint8))
    hidden = image.info.get("transparency")  # the level that is transparent
    if hidden is not None:
        grey.putalpha(Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8)))
    return grey


@contextmanager
def unlimited() -> Generator[None]:
    """Pillow reads long texts in PNGs and large images meanwhile, and warns of nothing."""
    log = logging.getLogger("PIL")
    level, before = log.level, [getattr(module, name) for module, name, _ in PILLOWS_LIMITS]
    for module, name, limit in PILLOWS_LIMITS:
        setattr(module, name, limit)
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for (module, name, _), limit in zip(PILLOWS_LIMITS, before, strict=True):
            setattr(module, name, limit)
        log.setLevel(level)


def reason(error: Exception) -> str:
    """Why a file was not read, to follow a number: "2 cut short"."""
    text = str(getattr(error, "strerror", None) or error)
    text = re.sub(r"\s*\(.*|\n.*", "", text) or type(error).__name__
    text = re.sub(r"\d+", "...", text)[:80]  # one reason for all files, whatever their sizes
    match error:
        case Empty():
            return "empty"
        case PermissionError():
            return "without permission to read"
        case UnidentifiedImageError():
            return "not recognised as images"
        case Image.DecompressionBombError():
            return f"of more than {MOST_PIXELS / 1e6:.0f} megapixels"
        case MemoryError():
            return "too large for the memory"
    return "cut short" if "truncated" in text else f'with the error "{text}"'
