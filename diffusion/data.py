"""Images by name: where they are from, how they are scaled, what is known of each."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffusion import captions, emoji, hf_dataset, image_folder, named_data, shards
from diffusion import codec as codecs
from diffusion.captions import EncoderPlace
from diffusion.codec import Codec
from diffusion.condition import Kinds, Label, of_images
from diffusion.console import UserError, printable
from diffusion.decoding import Listing, decode
from diffusion.image_file import Aspect, Form
from diffusion.images import Captioned, Images, Source, with_conditions
from diffusion.machine import CACHE
from diffusion.report import show
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
    aspect: Aspect | Literal[""] = ""
    """What became of a folder's images that were no squares."""
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
        background, aspect = self.background or Form.background, self.aspect or Form.aspect
        return Form(self.size, self.channels, background, aspect)

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

    def given(self, numbers: Tensor, kinds: Kinds | None = None) -> dict[str, Tensor]:
        """What images number `numbers` (B,) are told, if they are to be compared with real ones.

        Of what has no usual rows (`condition.of_images`), those of held-out images, in an order
        that is always the same; of training images where none is held out. kinds: what a model is
        told, if that is not all that is known of the images.
        """
        kinds = self.kinds if kinds is None else kinds
        if not (names := of_images(kinds)):
            return {}
        images, which = self._beside(numbers)
        rows = with_conditions(images, kinds).take(which)
        return {name: rows.condition[name].to(numbers.device) for name in names}

    def captions_given(self, numbers: Tensor) -> list[str]:
        """The captions that `given` tells them; none of images without."""
        images, which = self._beside(numbers)
        return images.captions(which) if isinstance(images, Captioned) else []

    def labels_given(self, numbers: Tensor) -> Tensor | None:
        """The classes of the images whose rows `given` tells them; None of images without."""
        if "label" not in self.kinds:
            return None
        images, which = self._beside(numbers)
        return images.take(which).condition["label"].to(numbers.device)

    def _beside(self, numbers: Tensor) -> tuple[Images, Tensor]:
        """Held-out images, or where there are none training images, and which stand beside images
        of these numbers."""
        images = self.test if len(self.test) else self.train
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images, order[numbers.cpu() % len(images)].to(images.device)


# Name -> (folder of its files or None, the cache, whether it may be fetched, the form asked for) ->
# its source.
DATASETS: dict[str, Callable[[Path | None, Path, bool, Form], Source]] = {
    "digits": named_data.digits,
    "fashion-mnist": named_data.fashion_mnist,
    "cifar10": named_data.cifar10,
    "emoji": emoji.load,
    "emoji3": partial(emoji.load, names=emoji.PACKAGES),
}


# How a name begins -> the images of the place that the rest of it names.
PLACES: dict[str, Callable[[str], Listing]] = {
    "": lambda words: image_folder.listing(Path(words)),
    "hf:": hf_dataset.listing,
    "wds:": shards.listing,
}


def _kind(name: str) -> tuple[str, str]:
    """How it begins, one of PLACES, and what follows."""
    kind = next((kind for kind in PLACES if kind and name.startswith(kind)), "")
    return kind, name.removeprefix(kind)


def title(name: str) -> str:
    """A few letters for a dataset: its name, or that of the folder that it lies in."""
    kind, words = _kind(name)
    path = hf_dataset.place(words).path if kind == "hf:" else Path(words)
    path = Path(os.path.abspath(path.expanduser()))
    return path.parent.name if path.suffix == ".tar" or "*" in path.name else path.name


def load(
    name: str,
    data_dir: Path | None = None,
    form: Form | None = None,
    download: bool = True,
    codec: str = "scale",
    classes: bool = False,
    encoder: EncoderPlace | None = None,
) -> Dataset:
    """The dataset of that name, one of DATASETS, or the images of a place, one of PLACES.

    data_dir: where alone to look for a named dataset's files. form: of a folder's images, or emoji.
    download: whether a dataset that is not on this disk may be fetched. codec: the name of the one
    that is fitted to the images, or the place of an autoencoder. classes: whether a folder's own
    folders are its classes. encoder: what makes a condition of the images' captions; None for none.
    """
    if name in DATASETS:
        source = DATASETS[name](data_dir, CACHE / "data", download, form or Form())
        return _dataset(name, source, codec, encoder)
    kind, words = _kind(name)
    if kind or Path(name).is_dir():
        (form or Form()).check()
        return _listed(PLACES[kind](words), form or Form(), codec, classes, encoder)
    raise UserError(
        f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}, a folder of images, "
        "hf:FOLDER or wds:FOLDER/*.tar"
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
    if name not in DATASETS and not _kind(name)[0] and not Path(name).is_dir():
        raise UserError(
            f"the images of {name} are no longer there: name with --data where they are"
        )
    return name


def _listed(
    listing: Listing, form: Form, codec: str, classes: bool, encoder: EncoderPlace | None
) -> Dataset:
    """All images of a place; every tenth is held out where it has at least 100 and names none."""
    if printable(listing.name) != listing.name:
        raise UserError(
            f"the name of {listing.place} has characters that no card can hold: rename the folder"
        )
    decoded = decode(listing, form, CACHE / "images")
    labels = listing.labels(decoded.taken) if classes else None
    label = torch.tensor(labels.numbers) if labels else None
    count = len(decoded.taken)
    if listing.held_out is None:
        held_out = (torch.arange(count) % 10 == 9) & (count >= 100)
    else:
        held_out = torch.tensor([i in listing.held_out for i in decoded.taken])
    sides = ~held_out, held_out
    show(listing, decoded, form, labels, int(held_out.sum()))
    train, test = (
        decoded.images.only(side.nonzero()[:, 0], {} if label is None else {"label": label[side]})
        for side in sides
    )
    source = Source(train, test, {"label": Label(len(labels.names))} if labels else {})
    if encoder:
        every = listing.captions(decoded.taken)
        source = source._replace(captions=[list(compress(every, side)) for side in sides])
    dataset = _dataset(listing.name, source, codec, encoder)
    spec = replace(dataset.spec, background=form.background, aspect=form.aspect, classes=classes)
    return replace(dataset, spec=spec)


def _dataset(name: str, source: Source, codec: str, encoder: EncoderPlace | None) -> Dataset:
    train, (channels, height, width) = source.train, source.train.shape
    if height != width:
        raise UserError(f"{name} has images of {height}x{width}, expected square ones")
    fitted = codecs.fitted(codec, name, train)
    spec = ImageSpec(name, channels, height)
    if encoder:
        source, text = captions.captioned(source, encoder, name, CACHE / "texts")
        folder = str(encoder.folder.resolve())
        spec = replace(spec, text_encoder=folder, text_sha256=text.sha256)
    spec = replace(spec, sha256=source.train.fingerprint())
    return Dataset(spec, source.train, source.test, fitted, source.kinds)
