"""Which folders are the suite's: it writes into those that it made, and takes no images there."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from diffusion.console import MOST, UserError
from diffusion.files import LOCK, Damaged, is_part, metadata, read_json, require_folder, write_json
from diffusion.typed import OPEN, parse

MARK = ".fewstep"  # a file that every folder of the suite's holds
WORDS = "A command of fewstep made this folder and may replace the files that it wrote here."
# What a folder is made for, as its mark has it and as a user is told it.
KINDS = {
    "run": "a training run",
    "comparison": "a comparison",
    "pictures": "generated pictures",
    "export": "an exported model",
}
# File managers and killed commands leave these in any folder.
IGNORED = {".DS_Store", "Thumbs.db", "desktop.ini", LOCK}
SIGN = "made by fewstep"  # what a single file of the suite's says near its beginning or its end


@with_config(OPEN)
class Mark(TypedDict, total=False):
    """What a folder's mark says."""

    kind: str
    pictures: Annotated[int, Field(ge=0, le=MOST)]
    npz: Annotated[int, Field(ge=0, le=MOST)]
    webdataset: Annotated[int, Field(ge=0, le=MOST)]
    captions: Annotated[int, Field(ge=0, le=MOST)]


MARKS = TypeAdapter(Mark)


def is_ours(folder: Path) -> bool:
    """Whether a command of the suite made this folder."""
    return os.path.isfile(folder / MARK) or any(_kinds_before_marks(folder))


def check_claim(folder: Path, kind: str = "run") -> None:
    """UserError for a folder that is neither new, nor empty, nor one of ours of this kind.

    It writes nothing, so that it can come before the work: `claim` comes when that has begun.
    """
    stranger = next(_entries(folder), None)  # before the mark, which is the first of our files:
    kinds = _kinds(folder)  # another command may be making the folder
    if kind in kinds:  # a finished run may lie where one cannot write
        return
    if kinds:
        raise UserError(
            f"{folder} holds {KINDS[min(kinds)]}, and {KINDS[kind]} would be mixed with it: "
            "give another --out"
        )
    require_folder(folder)
    if stranger:
        raise _foreign(stranger)


def claim(folder: Path, kind: str = "run") -> None:
    """Make the folder, or take one that `check_claim` lets pass, and mark it.

    Of several processes one alone claims; all may check.
    """
    check_claim(folder, kind)
    if not os.path.isfile(folder / MARK):
        write_mark(folder, kind)


def check_home(folder: Path) -> None:
    """UserError for a folder, to make runs in, that holds files but none of the suite's folders."""
    require_folder(folder)
    entries = list(_entries(folder))
    if is_ours(folder) or any(entry.is_dir() and is_ours(entry) for entry in entries):
        return
    if stranger := next(filter(None, map(_stranger, entries)), None):
        raise _foreign(stranger)


def write_mark(folder: Path, kind: str, files: Mapping[str, int] | None = None) -> None:
    """files: how many the folder may hold of ours, by the mark's field: NNNNNN.png as `pictures`,
    shards by their format."""
    mark = {"about": WORDS, "kind": kind} | {name: n for name, n in (files or {}).items() if n}
    write_json(folder / MARK, mark)


def read_mark(folder: Path) -> Mark:
    """The mark's fields; none where it was put there by hand, or there is no mark."""
    try:
        return MARKS.validate_python(read_json(folder / MARK))
    except (OSError, Damaged, ValueError):
        return {}


def strangers(folder: Path, names: set[str]) -> list[str]:
    """The names of all in the folder but these and the mark."""
    return sorted(entry.name for entry in _entries(folder) if entry.name not in {*names, MARK})


def check_file(path: Path) -> None:
    """UserError where a file cannot be written, or would replace one that is not the suite's."""
    require_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{path} is a folder: expected a file's name for --out")
    if path.exists() and not (path.is_file() and _signed(path)):
        raise UserError(
            f"{path} is there already, and nothing in it says that fewstep made it: "
            "give another --out, or remove it"
        )


def _foreign(path: Path) -> UserError:
    return UserError(
        f"{path.parent} holds {path.name}, which no command of fewstep made: expected a new or "
        "empty folder, or one of an earlier run; give another --out"
    )


def _entries(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in IGNORED and not is_part(path.name):
                yield path


def _stranger(path: Path) -> Path | None:
    """The first thing there that is neither a folder of the suite's nor within one."""
    if not path.is_dir():
        return path
    if is_ours(path):
        return None
    return next(filter(None, map(_stranger, _entries(path))), None)


def _kinds(folder: Path) -> set[str]:
    """The kinds that it may be of: all of them where its mark names none."""
    if os.path.isfile(folder / MARK):
        kind = read_mark(folder).get("kind")
        return {kind} if kind in KINDS else {*KINDS}
    return {*_kinds_before_marks(folder)}


def _kinds_before_marks(folder: Path) -> Iterator[str]:
    """The kinds of a folder from before there were marks: its files say it, not their names."""
    for name, kind, ours in BEFORE_MARKS:
        if os.path.isfile(folder / name) and ours(folder / name):
            yield kind


def _is_model(path: Path) -> bool:
    return _holds(metadata(path).get("card"), "method", "plans")


def _is_state(path: Path) -> bool:
    return _holds(metadata(path).get("line"), "iteration", "iterations")


def _is_results(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            line = file.readline(1 << 20)
            return _holds(line, "run", "sha256", "sampler") or _holds(line, "data", "metric")
    except OSError:  # not to be read by us, so hardly written by us
        return False


BEFORE_MARKS = (
    ("model.safetensors", "run", _is_model),
    ("state/state.safetensors", "run", _is_state),
    ("results.jsonl", "comparison", _is_results),
    ("partial.jsonl", "comparison", _is_results),
)


def _holds(text: str | bytes | None, *names: str) -> bool:
    """Whether it is a JSON object with these fields."""
    try:
        fields = parse(text or "null")
    except ValueError:
        return False
    return isinstance(fields, dict) and {*names} <= fields.keys()


def _signed(path: Path) -> bool:
    with open(path, "rb") as file:
        beginning = file.read(1000)
        file.seek(-min(1000, path.stat().st_size), os.SEEK_END)
        return SIGN.encode() in beginning + file.read()
