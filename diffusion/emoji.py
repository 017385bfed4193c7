"""Emoji: drawings of the same glyphs by several hands, read from npm packages.

A *glyph* is a base emoji by its code points. A vendor's package holds its drawing of each, 64x64
with transparency, and a JSON file with names and categories. Variants in five skin tones, nearly
half of a package, are left out: they differ from their base in one colour.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from diffusion import image_file
from diffusion.condition import Label
from diffusion.console import UserError, say
from diffusion.image_file import Form
from diffusion.images import InMemory, Source

VERSION = "16.0.0"
# A package of npm -> (its folder of drawings, the sha512 of its archive at that version).
VENDORS = {
    "emoji-datasource-google": (
        "google",
        "6517b17f3b3b315a0b9e6cd998db0ee132a19c0269e43fbe566e8fa54a47fe31"
        "104257a6a7797cf028d9f83a19d9f68cf51e10c5990e3c90a84fc0e53e17d0dc",
    ),
    "emoji-datasource-twitter": (
        "twitter",
        "ec5fae0ae1c7fbb427adcd793f9b676ef2a483d13ab65ce2e0c9d3dae5b54653"
        "78a4b613cdae9c3ff76cb487d20ccb698c52d6b997b05a0f2305bb8bd9ec842d",
    ),
}
REGISTRY = "https://registry.npmjs.org"  # npm's public one
CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)  # the classes; a package's tenth, Component, holds five swatches of skin tones
# Root mean square difference, in grey levels at 32x32, up to which two drawings are one:
# flags that countries share, families that a vendor draws alike. At 8 clocks would be, too.
SAME = 6.0
KEYS = ("name", "unified", "image", "short_name", "category", "sort_order")  # read of the JSON
PATIENCE = 30.0  # seconds until the registry must have answered, and between two of its bytes


class Drawings(NamedTuple):
    """All vendors' drawings of base glyphs, in Unicode's order, without duplicates."""

    images: Tensor
    """(N, 3, size, size) uint8, on white."""
    labels: Tensor
    """(N,) int64: which of CATEGORIES."""
    names: list[str]
    """A few words for each drawing, such as "red apple"."""
    held_out: Tensor
    """(N,) bool: the same for all drawings of a glyph, and for glyphs that are drawn alike."""


def load(data_dir: Path | None, cache: Path, download: bool, form: Form) -> Source:
    """Emoji of Google and Twitter, on white, of the form's size; a tenth of the glyphs is held out.

    Without a data_dir: from the cache, else from npm's registry.
    """
    form.check()
    images, labels, names, held_out = drawings(packages(data_dir, cache, download), form.size)
    sides = ~held_out, held_out
    train, test = (InMemory(images[part], {"label": labels[part]}) for part in sides)
    captions = [list(compress(names, part)) for part in sides]
    return Source(train, test, {"label": Label(len(CATEGORIES))}, captions)


def packages(data_dir: Path | None, cache: Path, download: bool) -> dict[str, Path]:
    """The packages at hand, by name: unpacked folders, or archives as `npm pack` leaves them.

    UserError where a data_dir holds none of them, or a download fails.
    """
    if data_dir:
        if not data_dir.is_dir():
            raise UserError(f"no folder {data_dir}: --data-dir names the one with npm's packages")
        places = {name: _place(data_dir, name) for name in VENDORS}
        if not any(places.values()):
            raise UserError(f"{data_dir} holds no emoji: {_mend()}")
        for name in (name for name, place in places.items() if place is None):
            say(f"{data_dir} holds no {name}: emoji are those of the other package alone")
        return {name: place for name, place in places.items() if place}
    files = {name: cache / "emoji" / f"{name}-{VERSION}.tgz" for name in VENDORS}
    for name, file in files.items():
        if not file.is_file():
            if not download:
                raise UserError(f"emoji are not on this disk: {_mend()}")
            _download(name, file)
    return files


def _place(data_dir: Path, name: str) -> Path | None:
    """The folder or the archive of a package in or below a folder; None where there is none."""
    folders = (data_dir, data_dir / "package", data_dir / name, data_dir / "node_modules" / name)
    for folder in folders:
        if (folder / "img" / VENDORS[name][0] / "64").is_dir():
            return folder
    return max(data_dir.glob(f"{name}-*.tgz"), default=None)


def _mend() -> str:
    names = " ".join(f"{name}@{VERSION}" for name in VENDORS)
    return f"type `npm pack {names}` in a folder, and name the folder with --data-dir"


def registry() -> str:
    """The registry that npm uses here, by its environment variable; else the public one."""
    variables = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
    chosen = next(filter(None, map(os.environ.get, variables)), REGISTRY)
    return chosen.rstrip("/")


def _download(name: str, file: Path) -> None:
    url = f"{registry()}/{name}/-/{file.name}"
    say(f"downloading {url} to {file}")
    pooch.get_logger().setLevel("ERROR")  # that line is enough
    # pooch's protocol of a downloader names the arguments otherwise than its own class does
    ask: Any = pooch.HTTPDownloader(timeout=PATIENCE)
    try:
        pooch.retrieve(url, f"sha512:{VENDORS[name][1]}", file.name, file.parent, downloader=ask)
    except (OSError, ValueError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{name} could not be downloaded: {_mend()} ({reason})") from error


def drawings(places: dict[str, Path], size: int) -> Drawings:
    """The base glyphs' drawings of these packages.

    What is drawn nearly alike (a flag that two countries share) is kept once, and glyphs of which
    that is so are trained on together or held out together.
    """
    glyphs, found = {}, []
    for name, place in places.items():
        about, pngs = _package(place, name)
        glyphs |= {entry["unified"]: entry for entry in about}
        found += [(entry["unified"], pngs[entry["image"]]) for entry in about]
    order = sorted(glyphs, key=lambda code: (glyphs[code]["sort_order"], code))
    number = {code: i for i, code in enumerate(order)}
    found.sort(key=lambda drawing: number[drawing[0]])  # stable: vendors stay in their order
    near = _alike(torch.stack([_read(png, 32) for _, png in found]))
    glyph = np.array([number[code] for code, _ in found])
    groups = _groups(len(order), glyph[near])
    kept = np.setdiff1d(np.arange(len(found)), near[:, 1])
    codes = [found[i][0] for i in kept]
    return Drawings(
        images=torch.stack([_read(found[i][1], size) for i in kept]),
        labels=torch.tensor([CATEGORIES.index(glyphs[code]["category"]) for code in codes]),
        names=[_caption(glyphs[code]) for code in codes],
        held_out=torch.from_numpy(groups[glyph[kept]] % 10 == 9),
    )


def _caption(glyph: dict) -> str:
    """Its name in Unicode, in small letters."""
    return (glyph["name"] or glyph["short_name"].replace("-", " ")).lower()


def _alike(images: Tensor) -> np.ndarray:
    """(pairs, 2) the numbers i < j of images that differ by at most SAME."""
    flat = images.flatten(1).float()
    near = torch.cdist(flat, flat) <= SAME * flat.shape[1] ** 0.5
    return near.triu(1).nonzero().numpy()


def _groups(count: int, pairs: np.ndarray) -> np.ndarray:
    """(count,) the group of each, where the two of a pair are in one; numbered as they come."""
    table = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(table, directed=False)[1]


def _read(png: bytes, size: int) -> Tensor:
    return image_file.read(BytesIO(png), Form(size)).pixels


def _package(place: Path, name: str) -> tuple[list[dict], dict[str, bytes]]:
    """A package's base glyphs that it draws, as its JSON has them, and its PNG files by name."""
    vendor = VENDORS[name][0]
    folder = f"img/{vendor}/64/"
    try:
        files = {path.removeprefix(folder): content for path, content in _files(place, folder)}
        about = json.loads(files.pop("emoji.json"))
        chosen = [
            {key: entry[key] for key in KEYS}
            for entry in about
            if entry["category"] in CATEGORIES and entry[f"has_img_{vendor}"]
        ]
        lacking = [entry["image"] for entry in chosen if entry["image"] not in files]
    except (OSError, tarfile.TarError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place} is not a whole {name}: {_mend()}") from error
    if lacking or not chosen:
        raise UserError(f"{place} lacks {len(lacking)} of {name}'s drawings: {_mend()}")
    return chosen, files


def _files(place: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """(name below the package, content) of emoji.json and of the PNG files in that folder."""
    if place.is_dir():
        for path in (place / "emoji.json", *sorted((place / folder).glob("*.png"))):
            yield path.relative_to(place).as_posix(), path.read_bytes()
        return
    with tarfile.open(place) as archive:  # nothing is unpacked to the disk
        for member in archive:
            path = member.name.partition("/")[2]
            drawing = path.startswith(folder) and path.endswith(".png")
            content = archive.extractfile(member) if drawing or path == "emoji.json" else None
            if content:
                yield path, content.read()
