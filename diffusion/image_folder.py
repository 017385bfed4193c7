"""All images below a folder: what is one, what is passed over and why, and their pixels' cache."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import PIL
import torch
from torch import Tensor

from diffusion import image_file
from diffusion.checkpoint import weights_sha256
from diffusion.console import UserError, say, track
from diffusion.files import Damaged, Unwritable, load_tensors, save_tensors
from diffusion.folders import MARK, is_ours
from diffusion.image_file import Form

VERSION = 1  # the way that pixels are made of a file: another number makes the caches anew
SLOW = 2**24  # bytes of files, above which progress is shown
REASONS, NAMES = 8, 4  # that a line gives at most, and names of files for each

Reasons = dict[str, list[str]]
"""Why files or folders were left out -> their names below the folder."""


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


def read(folder: Path, form: Form, cache: Path) -> tuple[Tensor, list[str]]:
    """Images (N, C, size, size) uint8, and their files' names below the folder, in whose order they
    are. One line says what was taken.

    cache: a folder; what was decoded before is not decoded again while the files are the same.
    """
    form.check()
    survey = look(folder)
    if not survey.files:
        raise UserError(
            f"{folder} holds no images: expected files such as .png, .jpg or .webp"
            + _also(survey.passed)
        )
    asked = [VERSION, PIL.__version__, asdict(form), survey.files]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    place = json.dumps([str(folder.resolve()), asdict(form)])
    path = cache / f"{hashlib.sha256(place.encode()).hexdigest()[:16]}.safetensors"
    images, skipped = _cached(path, key) or _decoded(folder, survey, form, path, key)
    count, total = sum(map(len, skipped.values())), len(survey.files)
    why = f": {_listed(skipped)}" if count else ""
    if count == total:
        raise UserError(f"none of the {total} image files in {folder} could be read{why}")
    say(
        f"{folder}: {total:,} image{'s' * (total > 1)} found, {total - count:,} "
        f"taken, {count:,} skipped{why}{_also(survey.passed)}"
    )
    left_out = {name for names in skipped.values() for name in names}
    return images, [file.name for file in survey.files if file.name not in left_out]


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


def _decoded(
    folder: Path, survey: Survey, form: Form, path: Path, key: str
) -> tuple[Tensor, Reasons]:
    """The images, written to the cache too, and why files were skipped."""
    images = torch.empty(len(survey.files), form.channels, form.size, form.size, dtype=torch.uint8)
    skipped, passing, count = defaultdict(list), False, 0
    results, total = _each(folder, survey.files, form), len(images)
    if sum(file.size for file in survey.files) > SLOW:
        results = track(results, folder.name or str(folder), lambda r: (r[0], total, "images read"))
    for number, result in results:
        file = survey.files[number - 1]
        if isinstance(result, Tensor):
            images[count] = result
            count += 1
        else:
            skipped[image_file.reason(result) if file.size else "empty"].append(file.name)
            passing |= isinstance(result, MemoryError) or bool(getattr(result, "errno", None))
    images = images[:count]
    if count and not passing:  # what may be read another time is tried again
        about = {"key": key, "skipped": json.dumps(skipped)}
        with suppress(Unwritable):  # a full disk, or a home that is not ours
            save_tensors(path, {"images": images}, about)
    return images, skipped


def _each(folder: Path, files: list[File], form: Form) -> Iterator[tuple[int, Tensor | Exception]]:
    """(1, 2, ..., the file's pixels or what its decoder raised)."""

    def one(file: File) -> Tensor | Exception:
        try:
            return image_file.read(folder / file.name, form)
        except Exception as error:  # decoders raise anything
            return error

    pool = ThreadPoolExecutor()
    try:
        with image_file.unlimited():
            yield from enumerate(pool.map(one, files), 1)
    finally:
        pool.shutdown(cancel_futures=True)


def _cached(path: Path, key: str) -> tuple[Tensor, Reasons] | None:
    """The images decoded before; None where there are none, or damaged ones, or of other files."""
    try:
        tensors, about = load_tensors(path)
        images, skipped = tensors["images"], json.loads(about["skipped"])
        same = about["key"] == key and about.get("sha256") in (None, weights_sha256(tensors))
    except Damaged as error:
        say(f"{error}: the images are decoded anew")
        return None
    except (OSError, LookupError, ValueError):
        return None
    return (images, skipped) if same else None


def _also(passed: Reasons) -> str:
    return f"; passed over: {_listed(passed)}" if passed else ""


def _listed(reasons: Reasons) -> str:
    """Such as: 2 cut short (a.png, b.png), 1 hidden (.d); of other suffixes, how many of each."""
    words = []
    order = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    for reason, names in order[:REASONS]:
        first = sorted(names)[:NAMES]
        if reason == "with other suffixes":
            suffixes = Counter(Path(name).suffix.lower() or "none" for name in names)
            first = [f"{suffix} {count:,}" for suffix, count in suffixes.most_common(NAMES)]
            more = len(suffixes) > NAMES
        else:
            more = len(names) > NAMES
        examples = ", ".join(first) + ", ..." * more
        words.append(f"{len(names):,} {reason} ({examples})")
    rest = sum(len(names) for _, names in order[REASONS:])
    return ", ".join(words) + f", {rest:,} for other reasons" * bool(rest)
