"""Images by name: where they are from, how they are scaled, what is known of each."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffusion import captions, emoji, image_folder, named_data
from diffusion.captions import EncoderPlace
from diffusion.codec import CODECS, Codec
from diffusion.condition import Kinds, Label, of_images
from diffusion.console import UserError, printable, say
from diffusion.decoding import decoded
from diffusion.image_file import Form
from diffusion.images import Images, Source, parts
from diffusion.machine import CACHE
from diffusion.typed import Sha256


@dataclass(frozen=True)
class ImageSpec:
    """What a model knows of its images: which they are, and their shape."""

    name: Annotated[str, Field(max_length=4096)]
    """Empty in a model of another maker, who names none."""
    channels: Annotated[int, Field(ge=1, le=1024)]
    size: Annotated[int, Field(ge=1, le=65536)]
    background: str = ""
    """The colour behind what is transparent in a folder's images."""
    classes: bool = False
    """Whether the folders that a folder's images are in are their classes."""
    text_encoder: str = ""
    """The folder of what encoded the images' captions; none for images without."""
    text_sha256: Sha256 | Literal[""] = ""
    """That encoder's identity."""
    sha256: Sha256 | Literal[""] = ""
    """The training images' fingerprint; none in cards from before there was one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @property
    def form(self) -> Form:
        """What a folder's images are brought to, to be these."""
        return Form(self.size, self.channels, self.background or Form.background)

    def encoder(self, folder: Path | None = None) -> EncoderPlace | None:
        """What encoded the captions; folder: where it is now, if it has moved."""
        if not self.text_encoder:
            return None
        return EncoderPlace(folder or Path(self.text_encoder), self.text_sha256 or None)


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

    def given(self, numbers: Tensor) -> dict[str, Tensor]:
        """What images number `numbers` (B,) are told, if they are to be compared with real ones.

        Of what has no usual rows (`condition.of_images`), those of held-out images, in an order
        that is always the same; of training images where none is held out.
        """
        if not (names := of_images(self.kinds)):
            return {}
        images = self.test if len(self.test) else self.train
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        rows = images.take(order[numbers.cpu() % len(images)].to(images.device))
        return {name: rows.condition[name].to(numbers.device) for name in names}


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
    encoder: EncoderPlace | None = None,
) -> Dataset:
    """The dataset of that name, one of DATASETS, or a folder of images.

    data_dir: where alone to look for a named dataset's files. form: of a folder's images, or emoji.
    download: whether a dataset that is not on this disk may be fetched. codec: the name of the one
    that is fitted to the images. classes: whether a folder's own folders are its classes.
    encoder: what makes a condition of the images' captions; None for none.
    """
    if name in DATASETS:
        source = DATASETS[name](data_dir, CACHE / "data", download, form or Form())
        return _dataset(name, source, codec, encoder)
    if Path(name).is_dir():
        return _folder(Path(name), form or Form(), codec, classes, encoder)
    raise UserError(
        f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}, or a folder of images"
    )


def reload(
    spec: ImageSpec,
    data: str | None = None,
    data_dir: Path | None = None,
    text_encoder: Path | None = None,
) -> Dataset:
    """The images that a model of this spec was trained on.

    data, text_encoder: where they, and what encoded their captions, are now, if they moved.

    UserError where they are gone, are of another shape, or are others by their fingerprint.
    """
    if not (data or spec.name):
        raise UserError(
            "the model's maker names no training images: name them with --data, as a dataset or as "
            f"a folder of images, which are brought to {spec.size}x{spec.size}"
        )
    encoder = spec.encoder(text_encoder)
    name = data or at_hand(spec.name)
    dataset = load(name, data_dir, spec.form, classes=spec.classes, encoder=encoder)
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


def _folder(
    folder: Path, form: Form, codec: str, classes: bool, encoder: EncoderPlace | None
) -> Dataset:
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
    sides = ~held_out, held_out
    train, test = (
        images.only(part, {name: rows[part] for name, rows in condition.items()})
        for part in (side.nonzero()[:, 0] for side in sides)
    )
    source = Source(train, test, kinds)
    if encoder:
        every = captions.of_folder(folder, names)
        source = source._replace(captions=[list(compress(every, part)) for part in sides])
    dataset = _dataset(str(folder.resolve()), source, codec, encoder)
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


def _dataset(name: str, source: Source, codec: str, encoder: EncoderPlace | None) -> Dataset:
    if codec not in CODECS:
        raise UserError(f"unknown codec {codec!r}: expected one of {', '.join(CODECS)}")
    train, (channels, height, width) = source.train, source.train.shape
    if height != width:
        raise UserError(f"{name} has images of {height}x{width}, expected square ones")
    fitted = CODECS[codec].fitted(_differing(name, parts(train)))
    spec = ImageSpec(name, channels, height)
    if encoder:
        source, text = captions.captioned(source, encoder, name, CACHE / "texts")
        folder = str(encoder.folder.resolve())
        spec = replace(spec, text_encoder=folder, text_sha256=text.sha256)
    spec = replace(spec, sha256=source.train.fingerprint())
    return Dataset(spec, source.train, source.test, fitted, source.kinds)


def _differing(name: str, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The parts of a dataset. UserError after the last where every pixel has the same value."""
    level, differ = None, False
    for part in parts:
        level = part.flatten()[0] if level is None else level
        differ = differ or bool((part != level).any())
        yield part
    if not differ:
        raise UserError(f"every pixel of {name} has the same value: expected images that differ")
