"""Files that are written and read again: each is whole or the one before it, and verified.

A file is written beside its name, brought to the disk and renamed, so a killed command leaves the
last whole one. A checksum goes with its content: what was damaged since is refused by name, or made
anew where it is a cache's.
"""

import errno
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from diffusion.console import UserError

LOCK = ".fewstep.lock"  # in a folder: who writes there
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
CHECKSUM = "crc32"  # the field of it in a JSON object
# By its field in a safetensors file's metadata, what is taken of a tensor's bytes: the first is
# written, at the speed of memory; the other is of earlier files.
DIGESTS = {"xxh3": xxhash.xxh3_64_intdigest, "crc32": zlib.crc32}
LATER = "-" * 8  # in a checksum's place, until it is known


held: set[Path] = set()  # the folders that this process owns: see diffusion.owner


class Damaged(UserError):
    """A file whose content is not what was written."""


class Unwritable(UserError):
    """The disk refused a file: full, read-only, broken, or its folder is gone."""


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """A path to write to; renamed to `path` on success, removed on failure.

    It lies in a folder of its own beside `path`: safetensors writes to a file of another name
    first, and a kill would leave that. A link is written through. Unwritable where the disk
    refuses; then what was there stays.
    """
    try:
        path = target(path)
        _make_folders(path.parent)
        path = target(path)  # again: the folder may have been deleted in between
        remove_parts(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.mkdir(exist_ok=True)
        try:
            yield part / "content"
            with open(part / "content", "rb") as file:
                os.fsync(file.fileno())
            os.replace(part / "content", path)
        finally:
            _delete(part)
    except (OSError, safetensors.SafetensorError) as error:
        raise unwritable(path, error) from error


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it, but for one that this process owns: where that is gone it
    was deleted, and what is made in its place would be nobody's."""
    owner = next((each for each in held if folder.is_relative_to(each)), None)
    if owner is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    for each in reversed((folder, *folder.parents)):
        if each != owner and each.is_relative_to(owner):
            each.mkdir(exist_ok=True)


def unwritable(path: Path, error: Exception) -> Unwritable:
    reason = getattr(error, "strerror", None) or str(error)
    kept = ": it is as it was before" if path.exists() else ""
    return Unwritable(f"{path} could not be written ({reason}){kept}")


def target(path: Path) -> Path:
    """The file that a path leads to, through links. UserError for a device, a pipe or a folder."""
    real = Path(os.path.realpath(path))
    for folder in held:
        if real.is_relative_to(folder) and not (folder / LOCK).exists():
            raise UserError(
                f"{folder} was deleted or moved while this command wrote in it: it ends here"
            )
    if real.exists() and not real.is_file():
        raise UserError(f"{path} is no regular file: expected a file's name, or a new one")
    return real


def require_folder(folder: Path) -> None:
    """UserError where no folder can be made there: better said before the work than after it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"{folder} cannot be made: {existing} is no folder that you may write in; "
            "give another --out"
        )


def write_atomic(path: Path, content: bytes | str) -> None:
    with atomic_path(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def append(path: Path, text: str) -> None:
    """Add to the end of a file, which a kill may cut short."""
    path = target(path)
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise unwritable(path, error) from error


def remove(path: Path) -> None:
    """Delete a file, if it is there, and what killed writers of it left."""
    remove_parts(path)
    path.unlink(missing_ok=True)


def remove_parts(path: Path) -> None:
    """Delete what writers of this file, killed before this command, left beside it."""
    for part in _parts(path.parent).pop(path.name, []):
        if not _alive(part.name.split(".")[-2]):
            _delete(part)


def _delete(part: Path) -> None:
    """Delete a writer's folder, or the file that one of an earlier version left."""
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


@cache  # a folder of many pictures is listed once
def _parts(folder: Path) -> dict[str, list[Path]]:
    """What writers left of each file, by its name, when this command first wrote in the folder."""
    parts: dict[str, list[Path]] = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for name in filter(is_part, (entry.name for entry in entries)):
            parts.setdefault(name[1:].rsplit(".", 2)[0], []).append(folder / name)
    return parts


def is_part(name: str) -> bool:
    """Whether a writer that was killed leaves a folder or a file of such a name."""
    return re.fullmatch(r"\..+\.\d+\.part", name, re.DOTALL) is not None


def _alive(pid: str) -> bool:
    """Whether another process of that number runs on this machine."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with a checksum; metadata that holds a sha256 has its own."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    kind = next(iter(DIGESTS))
    with ThreadPoolExecutor(1) as pool, atomic_path(path) as part:
        checksum = None
        if "sha256" not in metadata:
            checksum = pool.submit(_tensors_checksum, tensors, metadata, kind)
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)  # as the user's files are; safetensors' are 0600
        safetensors.torch.save_file(tensors, part, metadata | ({kind: LATER} if checksum else {}))
        if checksum:  # made meanwhile
            _fill_in(part, kind, checksum.result())
        part.chmod(mode)


def _fill_in(path: Path, kind: str, checksum: str) -> None:
    """Write the checksum in its place in a safetensors file's header."""
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8 + header.index(f'"{kind}":"{LATER}"'.encode()) + len(f'"{kind}":"'))
        file.write(checksum.encode())


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Damaged where they are not what was written.

    Files from before there were checksums are taken as they are.
    """
    with open(path, "rb"):  # safetensors says of a file that one may not read that there is none
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()  # the file itself cannot be iterated
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise Damaged(f"{path} is not a whole safetensors file ({error})") from error
    checksums = {kind: metadata.pop(kind) for kind in DIGESTS if kind in metadata}
    for kind, checksum in checksums.items():
        if checksum != _tensors_checksum(tensors, metadata, kind):
            raise _damaged(path)
    return tensors, metadata


def metadata(path: Path) -> dict[str, str]:
    """A safetensors file's metadata, from its header alone; none of a file of another kind."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 10**8:  # safetensors' own limit
                return {}
            return dict(json.loads(file.read(length))["__metadata__"])
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def _tensors_checksum(tensors: dict[str, Tensor], metadata: dict[str, str], kind: str) -> str:
    """crc32 over each tensor's name, type, shape and its bytes' digest, and the metadata."""

    def described(name: str) -> list:
        tensor = tensors[name]
        return [name, str(tensor.dtype), list(tensor.shape), DIGESTS[kind](bytes_of(tensor))]

    with ThreadPoolExecutor() as pool:  # a digest lets other threads run
        every = [*pool.map(described, sorted(tensors))]
    return _json_checksum({"tensors": every, "metadata": metadata})


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def sealed(values: dict) -> dict:
    """A JSON object with a checksum over its other fields."""
    values = json.loads(json.dumps(values))
    return values | {CHECKSUM: _json_checksum(values)}


def verified(values: dict, place: Path | str) -> dict:
    """The object without its checksum. Damaged where they differ; taken where there is none."""
    others = {name: value for name, value in values.items() if name != CHECKSUM}
    if CHECKSUM in values and values[CHECKSUM] != _json_checksum(others):
        raise _damaged(place)
    return others


def read_object(text: bytes | str, place: Path | str) -> dict:
    """The JSON object that the text is, verified."""
    return verified(parse_object(text, place), place)


def parse_object(text: bytes | str, place: Path | str) -> dict:
    """The JSON object that the text is, not verified yet. Damaged where it is none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{place}: expected a JSON object, got {text[:40]!r} ({error})") from error
    if not isinstance(values, dict):
        raise Damaged(f"{place}: expected a JSON object, got {text[:40]!r}")
    return values


def write_json(path: Path, values: dict, indent: int | None = None) -> None:
    write_atomic(path, json.dumps(sealed(values), indent=indent) + "\n")


def read_json(path: Path) -> dict:
    return read_object(path.read_bytes(), path)


def _json_checksum(values: dict) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _damaged(place: Path | str) -> Damaged:
    return Damaged(f"{place} is damaged: its content does not match its checksum")
