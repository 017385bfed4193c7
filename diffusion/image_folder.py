"""All images below a folder: what is one, and what is passed over and why."""

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from diffusion import captions, image_file
from diffusion.console import UserError
from diffusion.decoding import Labels, Listing, Reasons, also
from diffusion.folders import MARK, is_ours


class File(NamedTuple):
    """An image file as it was found."""

    name: str
    """Below the folder."""
    size: int
    """Bytes."""
    changed: tuple[int, int]
    """When its content and its entry changed last, in ns."""


@dataclass
class Survey:
    """What lies below a folder."""

    files: list[File] = field(default_factory=list)
    """The images, in the order of their names."""
    passed: Reasons = field(default_factory=lambda: defaultdict(list))
    """The files and folders that are no images of the user's."""


def listing(folder: Path) -> Listing:
    """The images below a folder, in the order of their names."""
    survey = look(folder)
    if not survey.files:
        raise UserError(
            f"{folder} holds no images: expected files such as .png, .jpg or .webp"
            + also(survey.passed)
        )
    key = hashlib.sha256()
    for file in survey.files:
        key.update(json.dumps(file).encode())

    def opened(i: int) -> Path:
        if not survey.files[i].size:
            raise image_file.Empty
        return folder / survey.files[i].name

    names = [file.name for file in survey.files]
    return Listing(
        name=str(folder.resolve()),
        place=str(folder),
        names=names,
        open=opened,
        key=key.hexdigest(),
        bytes=sum(file.size for file in survey.files),
        labels=lambda which: _labels(folder, [names[i] for i in which]),
        captions=lambda which: captions.of_folder(folder, [names[i] for i in which]),
        passed=survey.passed,
    )


def _labels(folder: Path, names: list[str]) -> Labels:
    """The class of each file: its first folder below `folder`, in alphabetical order."""
    firsts = [Path(name).parts[0] for name in names]
    if loose := [name for name, first in zip(names, firsts, strict=True) if name == first]:
        raise UserError(
            f"{len(loose):,} images of {folder} are in none of its folders ({loose[0]}), so they "
            "have no class: move them into one, or leave --num-classes out"
        )
    classes = sorted(set(firsts))
    number = {first: i for i, first in enumerate(classes)}
    return Labels([number[first] for first in firsts], classes)


def pictures_in(folder: Path) -> list[Path]:
    """The files in a folder that are pictures by their suffix, in order of their names."""
    suffixes = image_file.kinds()[1]
    return sorted(x for x in folder.iterdir() if x.suffix.lower() in suffixes and x.is_file())


def look(folder: Path) -> Survey:
    """Find the images below a folder, through links too, but each folder once.

    No data are hidden files and folders, what the suite's own commands wrote, and whatever is no
    regular file, which is not opened. UserError for a folder that is the suite's own.
    """
    if is_ours(folder):
        raise UserError(
            f"{folder} was made by a command of fewstep (it holds {MARK}, model.safetensors or "
            "results.jsonl), whose pictures are no training images: name a folder of your own, or "
            "copy the images to one"
        )
    survey, seen = Survey(), set()
    around = {_identity(parent) for parent in folder.resolve().parents}
    places, links = [folder], []
    while places or links:  # links last: what is reached without one has its plain name
        place = places.pop() if places else links.pop(0)
        name = str(place.relative_to(folder))
        try:
            if _identity(place) in seen:
                continue
            if _identity(place) in around:
                survey.passed["linked to a folder around this one"].append(name)
                continue
            seen.add(_identity(place))
            if place != folder and is_ours(place):
                survey.passed["made by fewstep"].append(name)
                continue
            with os.scandir(place) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            if place == folder:
                raise
            survey.passed["that could not be listed"].append(name)
            continue
        for entry in entries:
            path = place / entry.name
            if _is_folder(entry) and not entry.name.startswith("."):
                (links if entry.is_symlink() else places).append(path)
            else:
                _add(survey, entry, str(path.relative_to(folder)))
    survey.files.sort(key=lambda file: Path(file.name).parts)
    return survey


def _add(survey: Survey, entry: os.DirEntry, name: str) -> None:
    is_image = Path(name).suffix.lower() in image_file.kinds()[1]
    if entry.name.startswith("."):
        if is_image or _is_folder(entry):
            survey.passed["hidden"].append(name)
    elif not is_image:
        survey.passed["with other suffixes"].append(name)
    else:
        try:
            status, regular = entry.stat(), entry.is_file()
        except OSError:
            survey.passed["linked to nothing"].append(name)
            return
        if not regular:
            survey.passed["other than plain files"].append(name)
            return
        changed = status.st_mtime_ns, status.st_ctime_ns
        survey.files.append(File(name, status.st_size, changed))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _identity(place: Path) -> tuple[int, int]:
    status = place.stat()
    return status.st_dev, status.st_ino
