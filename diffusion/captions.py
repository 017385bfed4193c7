"""Captions of images: where they are read, how they are encoded once, and images that have them."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from diffusion import text_encoder
from diffusion.condition import Text
from diffusion.console import UserError, say
from diffusion.images import Captioned, Images, Source, Texts
from diffusion.owner import cached
from diffusion.typed import Sha256, parse

METADATA = ("metadata.jsonl", "metadata.csv")  # Hugging Face's image folders have these names
VERSION = 1  # the way that texts become embeddings: another number makes the caches anew


def of_folder(folder: Path, names: Sequence[str]) -> list[str]:
    """The caption of each image, "" where it has none.

    names: of the files below the folder. A caption stands in the `text` of a metadata.jsonl or
    metadata.csv, beside the image's `file_name`, in the image's folder or one around it; else in a
    file of the image's name and the suffix .txt. UserError for a file that is none of these.
    """
    captions = {}
    places = {parent for name in names for parent in Path(name).parents}
    for place in sorted(places, key=lambda place: place.parts):  # a nearer folder's replace others
        for file in (folder / place / name for name in METADATA):
            if file.is_file():
                captions |= {str(place / name): text for name, text in _metadata(file)}
    return [captions.get(str(Path(name))) or _beside(folder / name) for name in names]


def _metadata(file: Path) -> Iterator[tuple[str, str]]:
    """(file_name, text) of each line."""
    for number, line in _lines(file):
        words = f"{file}, line {number}: expected a file_name and a text"
        if not isinstance(line, dict):
            raise UserError(f"{words}, got {line!r:.80}")
        name, text = line.get("file_name"), line.get("text")
        if not isinstance(name, str) or not isinstance(text, str | None) or "text" not in line:
            raise UserError(f"{words}, got {', '.join(map(str, line))}")
        yield str(Path(name)), _plain(text or "")


def _lines(file: Path) -> Iterator[tuple[int, object]]:
    content = read_text(file)
    if file.suffix == ".csv":
        yield from enumerate(csv.DictReader(StringIO(content)), 2)
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield number, parse(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: expected JSON ({error})") from error


def _beside(image: Path) -> str:
    file = image.with_suffix(".txt")
    return _plain(read_text(file)) if file.is_file() else ""


def read_text(file: Path) -> str:
    """A text in UTF-8. UserError for another file."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}): save it as such") from error


def _plain(text: str) -> str:
    """On one line, with single spaces."""
    return " ".join(text.split())


@dataclass(frozen=True)
class EncoderPlace:
    """A text encoder as data name it."""

    folder: Path
    sha256: Sha256 | None = None
    """Its identity, where it is known: then what it made before is found without it."""


def captioned(source: Source, place: EncoderPlace, name: str, cache: Path) -> tuple[Source, Text]:
    """The source with its captions as the condition "text", and the kind of that. One line says how
    many there are.

    name: of the images. cache: a folder; texts that were encoded before are not encoded again.
    UserError where no image has a caption, or the encoder is another than place.sha256.
    """
    parts = source.captions
    if not any(map(any, parts)):
        raise UserError(
            f"{name} has no captions for --text-encoder: expected a metadata.jsonl or metadata.csv "
            "with file_name and text, or a .txt beside each image"
        )
    counts = Counter(text for part in parts for text in part)
    none, texts = counts.pop("", 0), sorted(counts)
    table, kind = _encoded(texts, place, cache)
    some = f"{name}: captions of {sum(counts.values()):,} images, {len(texts):,} different"
    lacking = f"; {none:,} images have none" if none else ""
    say(f"{some}, as {kind.tokens} tokens of {kind.encoder}{lacking}")
    row = {text: i for i, text in enumerate(["", *texts])}

    def with_texts(images: Images, part: Sequence[str]) -> Captioned:
        which = torch.tensor([row[text] for text in part], dtype=torch.int64)
        identity = json.dumps([kind.sha256, kind.tokens, list(part)])
        sha256 = hashlib.sha256(identity.encode()).hexdigest()
        return Captioned(images, Texts(table, which, sha256, ["", *texts]))

    train, test = with_texts(source.train, parts[0]), with_texts(source.test, parts[1])
    return Source(train, test, {**source.kinds, "text": kind}, parts), kind


def _encoded(texts: list[str], place: EncoderPlace, cache: Path) -> tuple[Tensor, Text]:
    """(1 + U, L, D) float16, of no text and then of each; and their kind."""
    encoder = None if place.sha256 else load_encoder(place)
    known = place.sha256 or (encoder.sha256 if encoder else "")
    asked = json.dumps([VERSION, known, text_encoder.MOST_TOKENS, texts])
    path = cache / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.safetensors"

    def make() -> tuple[dict[str, Tensor], dict[str, str]]:
        made_by = encoder or load_encoder(place)
        tokens = made_by.tokens(texts)
        table = torch.cat([torch.zeros(1, tokens, made_by.width).half(), made_by(texts, tokens)])
        return {"table": table}, {"encoder": made_by.name}

    tensors, about = cached(path, make)
    table = tensors["table"]
    return table, Text(table.shape[1], table.shape[2], about["encoder"], known)


def load_encoder(place: EncoderPlace) -> text_encoder.TextEncoder:
    """UserError where it is not at hand, or another."""
    if not place.folder.is_dir():
        raise UserError(
            f"the text encoder is not at {place.folder}: name the folder that it is in with "
            "--text-encoder"
        )
    encoder = text_encoder.load(place.folder)
    if place.sha256 and encoder.sha256 != place.sha256:
        raise UserError(
            f"{place.folder} holds another text encoder (sha256 {encoder.sha256[:8]}) than the "
            f"model's texts were encoded by ({place.sha256[:8]}): name that one's folder with "
            "--text-encoder"
        )
    return encoder
