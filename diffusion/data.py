"""Images by name: uint8 in memory, scaled to zero mean and unit variance on their way in."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion import image_folder, named_data
from diffusion.console import UserError
from diffusion.image_file import Form
from diffusion.machine import CACHE

DATASETS = {
    "digits": named_data.digits,
    "fashion-mnist": named_data.fashion_mnist,
    "cifar10": named_data.cifar10,
}


@dataclass(frozen=True)
class ImageSpec:
    """What a model knows of its data: the shape and the scale of the images."""

    name: str
    channels: int
    size: int
    num_classes: int
    mean: float
    std: float
    background: str = ""
    """The colour behind what is transparent in a folder's images."""
    sha256: str = ""
    """The training images' fingerprint; none in cards from before there was one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @property
    def form(self) -> Form:
        """What a folder's images are brought to, to be these."""
        return Form(self.size, self.channels, self.background or Form.background)

    @property
    def bounds(self) -> tuple[float, float]:
        """Black and white on the scale of to_unit."""
        return (0 - self.mean) / self.std, (255 - self.mean) / self.std

    def to_unit(self, images: Tensor) -> Tensor:
        """uint8 0..255 -> float32 of zero mean and unit variance."""
        return (images.float() - self.mean) / self.std

    def to_uint8(self, x0: Tensor) -> Tensor:
        """The inverse of to_unit, rounded and clipped to 0..255."""
        return (x0 * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Dataset:
    """uint8 images (N, C, H, W) and labels (N,) int64 or None, for training and held out."""

    spec: ImageSpec
    train: Tensor
    train_labels: Tensor | None
    test: Tensor
    test_labels: Tensor | None


def load(
    name: str, data_dir: Path | None = None, form: Form | None = None, download: bool = True
) -> Dataset:
    """The dataset of that name ("digits", "fashion-mnist", "cifar10"), or a folder of images.

    data_dir: where alone to look for a named dataset's files. form: of a folder's images.
    download: whether a dataset that is not on this disk may be fetched.
    """
    if name in DATASETS:
        return _dataset(name, *DATASETS[name](data_dir, CACHE / "data", download))
    if Path(name).is_dir():
        return _folder(Path(name), form or Form())
    raise UserError(
        f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}, or a folder of images"
    )


def reload(spec: ImageSpec, data: str | None = None, data_dir: Path | None = None) -> Dataset:
    """The images that a model of this spec was trained on; data: where they are now, if they moved.

    UserError where they are gone, are of another shape, or are others by their fingerprint.
    """
    dataset = load(data or at_hand(spec.name), data_dir, spec.form)
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


def fingerprint(images: Tensor, labels: Tensor | None = None) -> str:
    """sha256 over the bytes of images, and of their labels where there are any."""
    digest = hashlib.sha256(images.contiguous().numpy())
    if labels is not None:
        digest.update(labels.contiguous().numpy())
    return digest.hexdigest()


def _folder(folder: Path, form: Form) -> Dataset:
    """All images below it; every tenth is held out where there are at least 100."""
    images = image_folder.read(folder, form, CACHE / "images")
    held_out = (torch.arange(len(images)) % 10 == 9) & (len(images) >= 100)
    dataset = _dataset(str(folder.resolve()), images[~held_out], None, images[held_out], None)
    return replace(dataset, spec=replace(dataset.spec, background=form.background))


def _dataset(name: str, train: Tensor, train_labels, test: Tensor, test_labels) -> Dataset:
    histogram = torch.bincount(train.flatten(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64)
    mean = float((histogram @ levels) / histogram.sum())
    std = float(((histogram @ (levels - mean).square()) / histogram.sum()).sqrt())
    if std == 0:
        raise UserError(f"every pixel of {name} has the same value: expected images that differ")
    classes = 0 if train_labels is None else int(train_labels.max()) + 1
    sha256 = fingerprint(train, train_labels)
    spec = ImageSpec(name, train.shape[1], train.shape[2], classes, mean, std, sha256=sha256)
    return Dataset(spec, train, train_labels, test, test_labels)
