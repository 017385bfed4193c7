"""Datasets: what comes in is exact, what is broken is named."""

import gzip
import hashlib
import pickle
import struct
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from diffusion import data
from diffusion.console import UserError
from diffusion.data import ImageSpec


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise URLError("there is no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_digits_come_with_zero_mean_and_unit_variance(digits):
    x = digits.spec.to_unit(digits.train).double()
    assert digits.train.shape == (1438, 1, 8, 8)
    assert digits.test.shape == (359, 1, 8, 8)
    assert abs(x.mean()) < 1e-6
    assert abs(x.var(correction=0) - 1) < 1e-6


def test_every_grey_level_survives_scaling_and_back(digits):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(digits.spec.to_uint8(digits.spec.to_unit(levels)), levels)


def test_what_lies_beyond_black_and_white_is_clipped():
    spec = ImageSpec("any", 1, 1, 0, mean=100.0, std=50.0)
    assert spec.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    """MNIST's format (LeCun et al. 1998): magic number, big-endian sizes, bytes."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 | array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with the four files, and what is in them."""
    random = np.random.default_rng(0)
    arrays = {}
    for stem, count in (("train", 20), ("t10k", 10)):
        shape = (count, 28, 28)
        arrays[f"{stem}-images-idx3"] = random.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{stem}-labels-idx1"] = np.arange(count, dtype=np.uint8) % 10
    for stem, array in arrays.items():
        (tmp_path / f"{stem}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path, arrays


def test_fashion_mnist_is_read_from_its_four_files(fashion):
    folder, arrays = fashion
    dataset = data.load("fashion-mnist", folder)
    for images, labels, stem in (
        (dataset.train, dataset.train_labels, "train"),
        (dataset.test, dataset.test_labels, "t10k"),
    ):
        assert np.array_equal(images[:, 0], arrays[f"{stem}-images-idx3"])
        assert np.array_equal(labels, arrays[f"{stem}-labels-idx1"])
    assert dataset.spec.shape == (1, 28, 28)
    assert dataset.spec.num_classes == 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"not gzip at all",
        lambda content: content[:-8] + b"\0\0\0\0" + content[-4:],
        lambda content: gzip.compress(b""),
        lambda content: gzip.compress(b"<html>no such file</html>"),
        lambda content: gzip.compress(gzip.decompress(content)[:-1]),
    ],
    ids=["cut short", "not gzip", "wrong checksum", "empty", "web page", "too few images"],
)
def test_a_damaged_fashion_mnist_file_is_a_users_mistake(fashion, damage, no_network):
    folder, _ = fashion
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"--data-dir|train-images"):
        data.load("fashion-mnist", folder)


# CIFAR-10


def batch(folder: Path, name: str, content: dict) -> list[str]:
    """Write one of CIFAR-10's files; its name and md5."""
    raw = pickle.dumps(content)  # the dataset's own format, as its site has it
    (folder / name).write_bytes(raw)
    return [name, hashlib.md5(raw).hexdigest()]


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """A folder of CIFAR-10 with four training images in two batches, and two for testing.

    Image i is filled with i in red, 50 + i in green and 100 + i in blue; its class is i.
    """
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def images(*numbers: int) -> dict:
        colours = [[n, 50 + n, 100 + n] for n in numbers]
        pixels = np.repeat(np.array(colours, dtype=np.uint8), 32 * 32, axis=1)
        return {"data": pixels, "labels": list(numbers)}

    train = [batch(folder, f"data_batch_{i}", images(2 * i, 2 * i + 1)) for i in range(2)]
    test = [batch(folder, "test_batch", images(8, 9))]
    names = [str(i) for i in range(10)]
    meta, md5 = batch(folder, "batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta, "key": "label_names", "md5": md5})
    return tmp_path


def test_cifar10_keeps_its_images_colours_and_classes_in_order(cifar):
    dataset = data.load("cifar10", cifar)
    assert dataset.spec.shape == (3, 32, 32)
    assert dataset.train_labels.tolist() == [0, 1, 2, 3]
    assert dataset.test_labels.tolist() == [8, 9]
    expected = torch.tensor([[n, 50 + n, 100 + n] for n in range(4)], dtype=torch.uint8)
    assert torch.equal(dataset.train, expected[:, :, None, None].expand(4, 3, 32, 32))


def test_cifar10_that_is_damaged_and_cannot_be_fetched_names_the_option(cifar, no_network):
    (cifar / CIFAR10.base_folder / "data_batch_1").write_bytes(b"damaged")
    with pytest.raises(UserError, match="--data-dir"):
        data.load("cifar10", cifar)


def test_a_dataset_that_is_missing_and_cannot_be_fetched_names_the_option(tmp_path, no_network):
    with pytest.raises(UserError, match="--data-dir"):
        data.load("cifar10", tmp_path)


# Folders of images


def plain(value: object, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new(mode, size, value)


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (plain(60, "L"), (60, 60, 60)),
        (plain((9, 80, 200)), (9, 80, 200)),
        (plain((9, 80, 200, 255), "RGBA"), (9, 80, 200)),
        (plain((9, 80, 200)).quantize(4), (9, 80, 200)),
        (plain(1, "1"), (255, 255, 255)),
        (Image.fromarray(np.full((16, 16), 60 * 257, dtype=np.uint16)), (60, 60, 60)),
    ],
    ids=["grey", "colour", "alpha", "palette", "bits", "16-bit grey"],
)
def test_every_kind_of_image_keeps_its_colour(tmp_path, image, colour):
    image.save(tmp_path / "a.png")
    plain(0, "L").save(tmp_path / "b.png")  # one colour alone is nothing to learn
    first = data.load(str(tmp_path), size=8).train[0]
    assert torch.equal(
        first, torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    )


def test_images_of_all_sizes_below_a_folder_become_one_size(tmp_path):
    (tmp_path / "inner").mkdir()
    plain((250, 0, 0), size=(40, 12)).save(tmp_path / "inner" / "wide.PNG")
    plain((0, 250, 0), size=(5, 9)).save(tmp_path / "small.jpg")
    plain((0, 0, 250), size=(16, 16)).save(tmp_path / "whole.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("no image")
    dataset = data.load(str(tmp_path), size=16)
    assert dataset.train.shape == (3, 3, 16, 16)
    assert dataset.train.float().mean((2, 3)).argmax(1).tolist() == [0, 1, 2]
    assert dataset.train_labels is None


def test_a_folder_can_be_read_in_grey(tmp_path):
    plain((255, 255, 255)).save(tmp_path / "a.png")
    plain((0, 0, 0)).save(tmp_path / "b.png")
    images = data.load(str(tmp_path), size=8, channels=1).train
    assert images[:, 0, 0, 0].tolist() == [255, 0]
    assert images.shape == (2, 1, 8, 8)


def test_an_image_is_turned_the_way_its_camera_was_held(tmp_path):
    image = plain(0, "L", (8, 8))
    image.paste(255, (0, 0, 8, 4))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    seen = data.load(str(tmp_path), size=8, channels=1).train[0, 0]
    assert (seen[:, 4:] == 255).all()
    assert (seen[:, :4] == 0).all()


def test_a_fine_checkerboard_becomes_grey_and_no_moire(tmp_path):
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    plain(0, "L").save(tmp_path / "b.png")
    grey = data.load(str(tmp_path), size=8, channels=1).train[0].float()
    assert (grey - 127.5).abs().max() < 2


def test_broken_files_are_named_counted_and_skipped(tmp_path, capsys):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for name in ("whole.png", "cut.png", "cut.jpg"):
        image.save(tmp_path / name)
    for name in ("cut.png", "cut.jpg"):
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.gif").touch()
    assert len(data.load(str(tmp_path), size=8).train) == 1
    said = capsys.readouterr().out
    assert "skipped 4 of 5" in said
    assert all(name in said for name in ("cut.png", "cut.jpg", "text.png", "empty.gif"))


def test_a_folder_without_a_whole_image_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        data.load(str(tmp_path))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="could be read"):
        data.load(str(tmp_path))


def test_images_of_one_colour_throughout_are_refused(tmp_path):
    plain(7, "L").save(tmp_path / "a.png")
    with pytest.raises(UserError, match="same value"):
        data.load(str(tmp_path))


def test_every_tenth_image_of_a_large_folder_is_held_out(tmp_path):
    for i in range(100):
        plain(i, "L", (8, 8)).save(tmp_path / f"{i:03d}.png")
    dataset = data.load(str(tmp_path), size=8, channels=1)
    assert dataset.test[:, 0, 0, 0].tolist() == list(range(9, 100, 10))
    assert len(dataset.train) == 90


def test_an_unknown_dataset_is_answered_with_those_that_are_known():
    with pytest.raises(UserError, match="digits, fashion-mnist, cifar10"):
        data.load("no-such-data")
