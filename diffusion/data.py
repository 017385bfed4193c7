"""Images by name: where they are from, how they are scaled, what is known of each."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffusion import emoji, image_folder, named_data
from diffusion.codec import CODECS, Codec
from diffusion.condition import Kinds, Label
from diffusion.console import UserError, printable, say
from diffusion.decoding import decoded
from diffusion.image_file import Form
from diffusion.images import Images, Source, parts
from diffusion.machine import CACHE
from diffusion.typed import Sha256, Text


@dataclass(frozen=True)
class ImageSpec:
    """What a model knows of its images: which they are, and their shape."""

    name: Text
    channels: Annotated[int, Field(ge=1, le=1024)]
    size: Annotated[int, Field(ge=1, le=65536)]
    background: str = ""
    """The colour behind what is transparent in a folder's images."""
    classes: bool = False
    """Whether the folders that a folder's images are in are their classes."""
    sha256: Sha256 | Literal[""] = ""
    """The training images' fingerprint; none in cards from before there was one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @property
    def form(self) -> Form:
        """What a folder's images are brought to, to be these."""
        return Form(self.size, self.channels, self.background or Form.background)


@dataclass(frozen=True)
class Dataset:
    """Images for training and held out, and the codec that a model sees them through."""

    spec: ImageSpec
    train: Images
    test: Images
    codec: Codec
    kinds: Kinds = field(default_factory=dict)
    """The kinds of what is known of each image; empty for nothing."""

    @property
    def num_classes(self) -> int:
        """How many classes its labels have; 0 without labels."""
        label = self.kinds.get("label")
        return label.num_classes if isinstance(label, Label) else 0


# Name -> (folder of its files or None, the cache, whether it may be fetched, the form asked for) ->
# its source.
DATASETS: dict[str, Callable[[Path | None, Path, bool, Form], Source]] = {
    "digits": named_data.digits,
    "fashion-mnist": named_data.fashion_mnist,
    "cifar10": named_data.cifar10,
    "emoji": emoji.load,
}


def load(
    name: str,
    data_dir: Path | None = None,
    form: Form | None = None,
    download: bool = True,
    codec: str = "scale",
    classes: bool = False,
) -> Dataset:
    """The dataset of that name, one of DATASETS, or a folder of images.

    data_dir: where alone to look for a named dataset's files. form: of a folder's images, or emoji.
    download: whether a dataset that is not on this disk may be fetched. codec: the name of the one
    that is fitted to the images. classes: whether a folder's own folders are its classes.
    """
    if name in DATASETS:
        source = DATASETS[name](data_dir, CACHE / "data", download, form or Form())
        return _dataset(name, source, codec)
    if Path(name).is_dir():
        return _folder(Path(name), form or Form(), codec, classes)
    raise UserError(
        f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}, or a folder of images"
    )


def reload(spec: ImageSpec, data: str | None = None, data_dir: Path | None = None) -> Dataset:
    """The images that a model of this spec was trained on; data: where they are now, if they moved.

    UserError where they are gone, are of another shape, or are others by their fingerprint.
    """
    dataset = load(data or at_hand(spec.name), data_dir, spec.form, classes=spec.classes)
    if dataset.spec.shape != spec.shape:
        raise UserError(
            f"the model makes images of shape {spec.shape}, but those of {dataset.spec.name} have "
            f"{dataset.spec.shape}"
        )
    if spec.sha256 and spec.sha256 != dataset.spec.sha256:
        raise UserError(
            f"{dataset.spec.name} does not hold the images that the model was trained on: put them "
            "back, name with --data or --data-dir where they are now, or train a teacher on these"
        )
    return dataset


def at_hand(name: str) -> str:
    """The name. UserError where it is a folder that is no longer there."""
    if name not in DATASETS and not Path(name).is_dir():
        raise UserError(
            f"the images of {name} are no longer there: name with --data where they are"
        )
    return name


def _folder(folder: Path, form: Form, codec: str, classes: bool) -> Dataset:
    """All images below it; every tenth is held out where there are at least 100."""
    form.check()
    if printable(str(folder.resolve())) != str(folder.resolve()):
        raise UserError(
            f"the name of {folder} has characters that no card can hold: rename the folder"
        )
    images, names, *_ = decoded(image_folder.listing(folder), form, CACHE / "images")
    condition, kinds = {}, {}
    if classes:
        condition, kinds = _classes(folder, names)
    held_out = (torch.arange(len(images)) % 10 == 9) & (len(images) >= 100)
    train, test = (
        images.only(part, {name: rows[part] for name, rows in condition.items()})
        for part in ((~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0])
    )
    dataset = _dataset(str(folder.resolve()), Source(train, test, kinds), codec)
    spec = replace(dataset.spec, background=form.background, classes=classes)
    return replace(dataset, spec=spec)


def _classes(folder: Path, names: list[str]) -> tuple[dict[str, Tensor], Kinds]:
    """The label of each file, by its first folder below `folder` in alphabetical order."""
    firsts = [Path(name).parts[0] for name in names]
    if loose := [name for name, first in zip(names, firsts, strict=True) if name == first]:
        raise UserError(
            f"{len(loose):,} images of {folder} are in none of its folders ({loose[0]}), so they "
            "have no class: move them into one, or leave --num-classes out"
        )
    numbers = {first: number for number, first in enumerate(sorted(set(firsts)))}
    counts = Counter(firsts)
    words = ", ".join(f"{number} {first} ({counts[first]:,})" for first, number in numbers.items())
    say(f"{folder}: {len(numbers)} classes: {words}")
    labels = torch.tensor([numbers[first] for first in firsts])
    return {"label": labels}, {"label": Label(len(numbers))}


def _dataset(name: str, source: Source, codec: str) -> Dataset:
    if codec not in CODECS:
        raise UserError(f"unknown codec {codec!r}: expected one of {', '.join(CODECS)}")
    train, (channels, height, width) = source.train, source.train.shape
    if height != width:
        raise UserError(f"{name} has images of {height}x{width}, expected square ones")
    fitted = CODECS[codec].fitted(_differing(name, parts(train)))
    spec = ImageSpec(name, channels, height, sha256=train.fingerprint())
    return Dataset(spec, train, source.test, fitted, source.kinds)


def _differing(name: str, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The parts of a dataset. UserError after the last where every pixel has the same value."""
    level, differ = None, False
    for part in parts:
        level = part.flatten()[0] if level is None else level
        differ = differ or bool((part != level).any())
        yield part
    if not differ:
        raise UserError(f"every pixel of {name} has the same value: expected images that differ")
