"""Images by name: uint8 in memory, scaled to zero mean and unit variance on their way in."""

import gzip
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion.checkpoint import atomic_path
from diffusion.console import UserError, say
from diffusion.machine import CACHE

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class ImageSpec:
    """What a model knows of its data: the shape and the scale of the images."""

    name: str
    channels: int
    size: int
    num_classes: int
    mean: float
    std: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

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


def load(name: str, data_dir: Path | None = None, size: int = 32, channels: int = 3) -> Dataset:
    """The dataset of that name ("digits", "fashion-mnist", "cifar10"), or a folder of images.

    data_dir: where to look for a named dataset's files. size, channels: for a folder alone.
    """
    if name in DATASETS:
        return DATASETS[name](data_dir)
    if Path(name).is_dir():
        return image_folder(Path(name), size, channels)
    raise UserError(
        f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}, or a folder of images"
    )


def _dataset(name: str, train: Tensor, train_labels, test: Tensor, test_labels) -> Dataset:
    histogram = torch.bincount(train.flatten().int(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64)
    mean = float((histogram @ levels) / histogram.sum())
    std = float(((histogram @ (levels - mean).square()) / histogram.sum()).sqrt())
    if std == 0:
        raise UserError(f"every pixel of {name} has the same value: there is nothing to learn")
    classes = 0 if train_labels is None else int(train_labels.max()) + 1
    spec = ImageSpec(name, train.shape[1], train.shape[2], classes, mean, std)
    return Dataset(spec, train, train_labels, test, test_labels)


def digits(data_dir: Path | None = None) -> Dataset:
    """scikit-learn's 1,797 scans of digits, 8x8, 16 grey levels; every fifth is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(images)) % 5 == 4
    return _dataset(
        "digits", images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    )


def fashion_mnist(data_dir: Path | None = None) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017), 28x28, through torchvision.

    Looks for the four original files in data_dir, then in Debian's dataset-fashion-mnist,
    then downloads them.
    """
    from torchvision.datasets import FashionMNIST

    root = data_dir or CACHE / "data"
    raw = root / "FashionMNIST" / "raw"
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        packed = f"{stem}-ubyte.gz"
        sources = [root / packed, raw / packed, Path("/usr/share/datasets/fashion-mnist") / packed]
        source = next((path for path in sources if path.exists()), None)
        if source and not (raw / f"{stem}-ubyte").exists():
            raw.mkdir(parents=True, exist_ok=True)
            try:
                with atomic_path(raw / f"{stem}-ubyte") as part, gzip.open(source) as data:
                    with open(part, "wb") as out:
                        shutil.copyfileobj(data, out)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UserError(f"{source} is not a whole gzip file ({error})") from error
    hint = (
        "fashion-mnist was not found and could not be downloaded: install Debian's "
        "dataset-fashion-mnist, or put its four *-ubyte.gz files (from "
        "github.com/zalandoresearch/fashion-mnist) in a folder and name it with --data-dir"
    )
    train, test = _torchvision(FashionMNIST, root, hint)
    return _dataset(
        "fashion-mnist", train.data[:, None], train.targets, test.data[:, None], test.targets
    )


def cifar10(data_dir: Path | None = None) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009), 32x32 in colour, through torchvision."""
    from torchvision.datasets import CIFAR10

    root = data_dir or CACHE / "data"
    hint = (
        f"cifar10 was not found in {root} and could not be downloaded: unpack "
        "cifar-10-python.tar.gz (from www.cs.toronto.edu/~kriz/cifar.html) in a folder, so "
        "that it holds cifar-10-batches-py/, and name the folder with --data-dir"
    )
    train, test = _torchvision(CIFAR10, root, hint)
    images = [
        torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)
    ]
    return _dataset(
        "cifar10", images[0], torch.tensor(train.targets), images[1], torch.tensor(test.targets)
    )


def _torchvision(dataset: type, root: Path, hint: str) -> tuple:
    def both(download: bool) -> tuple:
        return tuple(dataset(root, train=train, download=download) for train in (True, False))

    broken = (RuntimeError, OSError, ValueError, AssertionError)
    try:
        return both(download=False)
    except broken:  # not there, or not whole
        pass
    try:
        return both(download=True)
    except broken as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{hint} ({reason})") from error


DATASETS = {"digits": digits, "fashion-mnist": fashion_mnist, "cifar10": cifar10}


def image_folder(folder: Path, size: int, channels: int) -> Dataset:
    """All images below a folder, cropped to a square and resized with antialiasing.

    Files that do not open as images are named and skipped. Every tenth image is held out
    where there are at least 100.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3) or size < 1:
        raise UserError(
            f"a folder's images have --channels 1 or 3 and a --size of at least 1, "
            f"got {channels} and {size}"
        )
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no images: expected files such as .png, .jpg or .webp")

    def read(path: Path) -> Tensor | None:
        try:
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith(
                    "I;16"
                ):  # convert would clip all but the darkest 256 levels
                    image = image.convert("I").point(lambda level: level / 257).convert("L")
                image = image.convert("L" if channels == 1 else "RGB")
                image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.reshape(size, size, channels).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read, paths))
    broken = [path for path, image in zip(paths, images, strict=True) if image is None]
    if broken:
        names = ", ".join(str(path.relative_to(folder)) for path in broken[:10])
        more = f" and {len(broken) - 10} more" if len(broken) > 10 else ""
        say(f"skipped {len(broken)} of {len(paths)} files that are not whole images: {names}{more}")
    whole = [image for image in images if image is not None]
    if not whole:
        raise UserError(f"none of the {len(paths)} image files in {folder} could be read")
    stack = torch.stack(whole)
    held_out = (torch.arange(len(stack)) % 10 == 9) & (len(stack) >= 100)
    return _dataset(str(folder.resolve()), stack[~held_out], None, stack[held_out], None)
