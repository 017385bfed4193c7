"""WebDataset's shards: tar files in which what has one name, up to its first dot, is one sample."""

import hashlib
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from glob import glob
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffusion import image_file
from diffusion.console import UserError
from diffusion.decoding import Labels, Listing, numbered
from diffusion.typed import parse

TEXTS = ("caption", "text")  # fields of a .json that hold a caption


class Part(NamedTuple):
    """A file in a shard."""

    shard: Path
    start: int
    """Its first byte in the shard."""
    size: int

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            return os.pread(file.fileno(), self.size, self.start)


class Sample(NamedTuple):
    """An image in a shard, and what lies beside it by suffix: a class, a caption."""

    name: str
    image: Part
    beside: dict[str, Part]


def listing(pattern: str) -> Listing:
    """The images of all shards that a path such as FOLDER/*.tar or a folder names, in their order.

    A class is in a .cls, a number, or in the `label` of a .json; a caption in a .txt, or in the
    `caption` or `text` of a .json. UserError where a shard is no plain tar file.
    """
    path = Path(pattern).expanduser()
    shards = sorted(path.glob("*.tar")) if path.is_dir() else sorted(map(Path, glob(str(path))))
    passed, samples, key = defaultdict(list), [], hashlib.sha256()
    for shard in shards:
        status = shard.stat()
        key.update(json.dumps([str(shard), status.st_size, status.st_mtime_ns]).encode())
        samples += _samples(shard, passed)
    if not samples:
        raise UserError(
            f"wds:{pattern} names no images: expected tar files with files such as 0001.jpg, found "
            f"{len(shards)} tar files"
        )

    def labels(which: Sequence[int]) -> Labels:
        return numbered([_label(samples[i]) for i in which])

    def captions(which: Sequence[int]) -> list[str]:
        return [" ".join(_caption(samples[i]).split()) for i in which]

    return Listing(
        name=f"wds:{path.absolute()}",
        place=f"wds:{pattern}",
        names=[sample.name for sample in samples],
        open=lambda i: BytesIO(samples[i].image.read()),
        key=key.hexdigest(),
        bytes=sum(sample.image.size for sample in samples),
        passed=passed,
        labels=labels,
        captions=captions,
    )


def _samples(shard: Path, passed: dict[str, list[str]]) -> Iterable[Sample]:
    images, beside = {}, defaultdict(dict)
    try:
        with tarfile.open(shard, "r:") as file:
            for member in file:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                stem, _, suffixes = name.name.partition(".")
                key, suffix = str(name.parent / stem), f".{suffixes.lower()}"
                part = Part(shard, member.offset_data, member.size)
                if Path(name).suffix.lower() in image_file.kinds()[1]:
                    if images.setdefault(key, part) is not part:
                        passed["further images of a sample"].append(f"{shard.name}/{name}")
                elif suffix in (".cls", ".txt", ".json"):
                    beside[key][suffix] = part
                else:
                    passed["with other suffixes"].append(f"{shard.name}/{name}")
    except tarfile.TarError as error:
        raise UserError(
            f"{shard} is no whole plain tar file ({error}): unpack it where it is compressed, or "
            "replace it"
        ) from error
    for key in sorted(beside.keys() - images.keys()):
        passed["without an image"].append(f"{shard.name}/{key}")
    return [Sample(f"{shard.name}/{key}", part, beside[key]) for key, part in images.items()]


def _described(sample: Sample) -> dict:
    if ".json" not in sample.beside:
        return {}
    try:
        values = parse(sample.beside[".json"].read())
    except ValueError as error:
        raise UserError(f"{sample.name}.json: expected a JSON object ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{sample.name}.json: expected a JSON object, got {values!r:.80}")
    return values


def _label(sample: Sample) -> str:
    if ".cls" in sample.beside:
        return sample.beside[".cls"].read().decode(errors="replace").strip()
    label = _described(sample).get("label")
    if label is None:
        raise UserError(
            f"{sample.name} has no class: expected a .cls or the `label` of a .json beside each "
            "image, or no --num-classes"
        )
    return str(label)


def _caption(sample: Sample) -> str:
    if ".txt" in sample.beside:
        return sample.beside[".txt"].read().decode(errors="replace")
    described = _described(sample)
    return str(next((described[name] for name in TEXTS if name in described), ""))
