"""The datasets that are known by a name: from scikit-learn, from files on this disk, or downloaded.

Each is a function (data_dir, cache, download, form) -> Source; their images have one form each,
whatever is asked for. A data_dir that is given is the only place that is looked in, and nothing is
written there; otherwise what is downloaded goes to the cache.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from diffusion.condition import Label
from diffusion.console import UserError, first_line
from diffusion.image_file import Form
from diffusion.images import InMemory, Source

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist
FASHION = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
BROKEN = (RuntimeError, OSError, ValueError, AssertionError)  # raised by torchvision's datasets


def labelled(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Source:
    """A source of uint8 images (N, C, H, W) with int64 labels (N,), to train on and held out."""
    kinds = {"label": Label(int(train_labels.max()) + 1)}
    return Source(
        InMemory(train, {"label": train_labels}), InMemory(test, {"label": test_labels}), kinds
    )


def digits(data_dir: Path | None, cache: Path, download: bool, form: Form) -> Source:
    """scikit-learn's 1,797 scans of digits, 8x8, 16 grey levels; every fifth is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(images)) % 5 == 4
    return labelled(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def fashion_mnist(data_dir: Path | None, cache: Path, download: bool, form: Form) -> Source:
    """Fashion-MNIST (Xiao et al. 2017), 28x28, or what a folder holds under its files' names.

    Without a data_dir: from the cache, else from Debian's package, else downloaded.
    """
    unpacked = "FashionMNIST/raw"  # as torchvision has it
    if data_dir:
        require_folder(data_dir)
        places = [data_dir, data_dir / unpacked]
        place = next((place for place in places if fashion_files(place)), data_dir)
        return _fashion_in(place)
    for place in (cache / unpacked, DEBIAN):
        if len(fashion_files(place)) == len(FASHION):
            return _fashion_in(place)
    hint = (
        "install Debian's dataset-fashion-mnist, or put its four *-ubyte.gz files (from "
        "github.com/zalandoresearch/fashion-mnist) in a folder and name it with --data-dir"
    )
    if not download:
        raise UserError(f"fashion-mnist is not on this disk: {hint}")
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(cache, download=True)
    except BROKEN as error:
        raise UserError(
            f"fashion-mnist could not be downloaded: {hint} ({first_line(error)})"
        ) from error
    return _fashion_in(cache / unpacked)


def fashion_files(place: Path) -> dict[str, Path]:
    """Those of its four files that a folder holds, by name; packed ones before unpacked copies."""
    names = {stem: (place / f"{stem}.gz", place / stem) for stem in FASHION}
    paths = {stem: next(filter(Path.is_file, paths), None) for stem, paths in names.items()}
    return {stem: path for stem, path in paths.items() if path}


def _fashion_in(place: Path) -> Source:
    paths = fashion_files(place)
    if missing := [f"{stem}.gz" for stem in FASHION if stem not in paths]:
        raise UserError(
            f"{place} lacks {', '.join(missing)}: a folder that --data-dir names must hold all "
            "four files of Fashion-MNIST"
        )
    train, train_labels, test, test_labels = (
        _idx(paths[stem], 3 if "images" in stem else 1) for stem in FASHION
    )
    for images, labels in ((train, train_labels), (test, test_labels)):
        if not len(images) == len(labels) > 0:
            raise UserError(
                f"{place}: expected a label for every image, got {len(images)} images and "
                f"{len(labels)} labels"
            )
    if train.shape[1:] != test.shape[1:] or train.shape[1] != train.shape[2]:
        raise UserError(
            f"{place}: expected square images of one size, got {tuple(train.shape[1:])} and "
            f"{tuple(test.shape[1:])}"
        )
    return labelled(train[:, None], train_labels.long(), test[:, None], test_labels.long())


def _idx(path: Path, dimensions: int) -> Tensor:
    """uint8, from MNIST's format (LeCun et al. 1998): magic number, big-endian sizes, bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = bytearray(file.read())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): replace it") from error
    head = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", raw[4:head]) if len(raw) >= head else ()
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != head + math.prod(shape):
        raise UserError(
            f"{path} is not a whole idx file of bytes in {dimensions} dimensions, MNIST's format: "
            "replace it"
        )
    if not math.prod(shape):
        return torch.zeros(shape, dtype=torch.uint8)
    return torch.frombuffer(raw, dtype=torch.uint8, offset=head).reshape(shape)


def cifar10(data_dir: Path | None, cache: Path, download: bool, form: Form) -> Source:
    """CIFAR-10 (Krizhevsky 2009), 32x32 in colour, through torchvision."""
    from torchvision.datasets import CIFAR10

    if data_dir:
        require_folder(data_dir)
    root = data_dir or cache
    hint = (
        "unpack cifar-10-python.tar.gz (from www.cs.toronto.edu/~kriz/cifar.html) in a folder, so "
        "that it holds cifar-10-batches-py/, and name the folder with --data-dir"
    )

    def both(download: bool) -> list:
        return [CIFAR10(root, train=train, download=download) for train in (True, False)]

    try:
        train, test = both(download=False)
    except BROKEN as error:
        if data_dir:
            files = data_dir / CIFAR10.base_folder
            names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
            lacking = [name for name in names if not (files / name).is_file()]
            fault = (
                f"lacks {', '.join(lacking)}" if lacking else "holds other files than CIFAR-10's"
            )
            raise UserError(f"{files} {fault}: {hint}") from error
        if not download:
            raise UserError(f"cifar10 is not on this disk: {hint}") from error
        try:
            train, test = both(download=True)
        except BROKEN as error:
            raise UserError(
                f"cifar10 could not be downloaded: {hint} ({first_line(error)})"
            ) from error
    images = [torch.from_numpy(x.data).permute(0, 3, 1, 2).contiguous() for x in (train, test)]
    return labelled(images[0], torch.tensor(train.targets), images[1], torch.tensor(test.targets))


def require_folder(data_dir: Path) -> None:
    if not data_dir.is_dir():
        raise UserError(f"no folder {data_dir}: --data-dir names the one with the dataset's files")
