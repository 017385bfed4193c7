"""A Hugging Face dataset on disk, as `save_to_disk` of the library datasets leaves it."""

import hashlib
import json
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from diffusion import image_file
from diffusion.console import UserError, first_line
from diffusion.decoding import Labels, Listing, numbered

COLUMNS = ("image", "label", "text")
WORDS = "hf:PATH, then where needed ,image=COLUMN ,label=COLUMN ,text=COLUMN"


class Place(NamedTuple):
    """What stands behind hf: of --data."""

    path: Path
    columns: dict[str, str]
    """image, label, text -> the column that is named for it."""


def place(words: str) -> Place:
    """The folder, and the columns behind it. UserError for a column of another purpose."""
    path, *columns = re.split(r",(?=\w+=)", words)
    named = dict(column.split("=", 1) for column in columns)
    if unknown := named.keys() - {*COLUMNS}:
        raise UserError(f"hf:{words} names {', '.join(sorted(unknown))}: expected {WORDS}")
    return Place(Path(path).expanduser(), named)


def listing(words: str) -> Listing:
    """The images of a dataset. If it has the splits train and test, or validation, the latter is
    held out; otherwise every tenth image of its first split.

    UserError where there is no such dataset, or it has no such columns.
    """
    path, columns = place(words)
    parts = _parts(path)
    features, lengths = parts[0].features, [len(part) for part in parts]
    for purpose, column in columns.items():
        if column not in features:
            raise UserError(
                f"hf:{path} has no column {column} for {purpose}: it has {', '.join(features)}"
            )
    from datasets import ClassLabel, Image

    image = _image(path, columns, features)
    files = [part.select_columns([image]).cast_column(image, Image(decode=False)) for part in parts]

    def opened(i: int) -> Path | BytesIO:
        part, row = (0, i) if i < lengths[0] else (1, i - lengths[0])
        value = files[part][row][image] or {}
        if value.get("bytes") is not None:
            return BytesIO(value["bytes"])
        if value.get("path"):
            return Path(value["path"])
        raise image_file.Empty

    def column(purpose: str, usual: list[str]) -> str:
        """The one that is named, or the first of the usual ones."""
        name = columns.get(purpose) or next((name for name in usual if name in features), None)
        if name is None:
            raise UserError(
                f"hf:{path} has no column {' or '.join(usual)}: name the {purpose}'s, as in "
                f"hf:{path},{purpose}=COLUMN; it has {', '.join(features)}"
            )
        return name

    def rows(name: str, which: Sequence[int]) -> list[Any]:
        values = [value for part in parts for value in part[name]]
        return [values[i] for i in which]

    def labels(which: Sequence[int]) -> Labels:
        classes = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        name = column("label", [*classes, "label"])
        if isinstance(features[name], ClassLabel):
            return Labels(rows(name, which), list(features[name].names))
        return numbered([str(value) for value in rows(name, which)])

    def captions(which: Sequence[int]) -> list[str]:
        texts = rows(column("text", ["text", "caption"]), which)
        return [" ".join(str(text or "").split()) for text in texts]

    known = "".join(f",{purpose}={name}" for purpose, name in sorted(columns.items()))
    statuses = [(str(file), file.stat()) for file in sorted(path.rglob("*"))]
    identity = [image, *((name, each.st_size, each.st_mtime_ns) for name, each in statuses)]
    return Listing(
        name=f"hf:{path.resolve()}{known}",
        place=f"hf:{words}",
        names=[f"row {i}" for i in range(sum(lengths))],
        open=opened,
        key=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        bytes=sum(status.st_size for _, status in statuses),
        labels=labels,
        captions=captions,
        held_out=range(lengths[0], sum(lengths)) if len(parts) > 1 else None,
    )


def _parts(path: Path) -> list[Any]:
    """The rows to train on and, if there is such a split, those to be held out."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise UserError(
            "--data hf: needs the library datasets: pip install -e '.[datasets]'"
        ) from error
    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"hf:{path} is no dataset as save_to_disk of the library datasets writes one "
            f"({first_line(error)})"
        ) from error
    if isinstance(loaded, Dataset):
        return [loaded]
    splits = {str(name): rows for name, rows in loaded.items()}
    names = ["train", next((name for name in ("test", "validation") if name in splits), "")]
    if "train" not in splits or not names[1]:
        names = list(splits)[:1]
    return [splits[name] for name in names]


def _image(path: Path, columns: dict[str, str], features: dict[str, Any]) -> str:
    """The column of the images."""
    from datasets import Image

    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    name = columns.get("image")
    if name and name not in images:
        raise UserError(
            f"the column {name} of hf:{path} holds no images of the kind Image: those that do are "
            f"{', '.join(images) or 'none'}"
        )
    if not name and len(images) != 1:
        raise UserError(
            f"hf:{path} has {len(images)} columns of images ({', '.join(features)}): name one, as "
            f"in hf:{path},image=COLUMN"
        )
    return name or images[0]
