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
from torchvision.datasets import CIFAR10

from diffusion import data, named_data
from diffusion.console import UserError
from diffusion.images import InMemory


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise URLError("there is no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_digits_come_with_zero_mean_and_unit_variance(digits):
    x = digits.codec.encode(digits.train.images).double()
    assert digits.train.images.shape == (1438, 1, 8, 8)
    assert digits.test.images.shape == (359, 1, 8, 8)
    assert abs(x.mean()) < 1e-6
    assert abs(x.var(correction=0) - 1) < 1e-6


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
    for source, stem in ((dataset.train, "train"), (dataset.test, "t10k")):
        assert np.array_equal(source.images[:, 0], arrays[f"{stem}-images-idx3"])
        assert np.array_equal(source.condition["label"], arrays[f"{stem}-labels-idx1"])
    assert dataset.spec.shape == (1, 28, 28)
    assert dataset.num_classes == 10


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
    assert dataset.train.condition["label"].tolist() == [0, 1, 2, 3]
    assert dataset.test.condition["label"].tolist() == [8, 9]
    expected = torch.tensor([[n, 50 + n, 100 + n] for n in range(4)], dtype=torch.uint8)
    assert torch.equal(dataset.train.images, expected[:, :, None, None].expand(4, 3, 32, 32))


@pytest.fixture
def debian(tmp_path_factory, monkeypatch) -> Path:
    """In place of Debian's package: a folder with the four files of other images, a new cache."""
    folder = tmp_path_factory.mktemp("debian")
    for stem, count in (("train", 30), ("t10k", 15)):
        images = np.full((count, 28, 28), 7, dtype=np.uint8)
        images[:, :14] = 250
        write_fashion(folder, stem, images)
    monkeypatch.setattr(named_data, "DEBIAN", folder)
    monkeypatch.setattr(data, "CACHE", tmp_path_factory.mktemp("cache"))
    return folder


def write_fashion(folder: Path, stem: str, images: np.ndarray) -> None:
    labels = np.arange(len(images), dtype=np.uint8) % 10
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))


def test_fashion_mnist_comes_from_debians_package_where_no_folder_is_named(debian, no_network):
    dataset = data.load("fashion-mnist")
    assert (len(dataset.train), len(dataset.test)) == (30, 15)
    assert not list(data.CACHE.rglob("*ubyte*"))


def test_a_folder_that_is_named_is_the_only_place_that_fashion_mnist_is_looked_for_in(
    fashion, debian, no_network
):
    folder, _ = fashion
    for name in ("t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte.gz").unlink()
    with pytest.raises(UserError) as error:
        data.load("fashion-mnist", folder)
    assert "lacks t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz" in str(error.value)
    assert "train" not in str(error.value).replace(str(folder), "")


def test_ones_own_images_under_fashion_mnists_names_are_what_is_loaded(tmp_path, debian):
    random = np.random.default_rng(1)
    own = random.integers(0, 256, (200, 28, 28), dtype=np.uint8)
    for stem in ("train", "t10k"):
        write_fashion(tmp_path, stem, own)
    assert np.array_equal(data.load("fashion-mnist", tmp_path).train.images[:, 0], own)


@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_a_replaced_file_is_not_answered_from_an_unpacked_copy_of_the_one_before(fashion, place):
    folder, arrays = fashion
    (folder / place).mkdir(parents=True, exist_ok=True)
    for stem, array in arrays.items():  # as torchvision and earlier versions unpack them
        (folder / place / f"{stem}-ubyte").write_bytes(idx(array))
    other = 255 - arrays["train-images-idx3"]
    write_fashion(folder, "train", other)
    before = sorted(folder.rglob("*"))
    assert np.array_equal(data.load("fashion-mnist", folder).train.images[:, 0], other)
    assert sorted(folder.rglob("*")) == before


def test_unpacked_files_and_torchvisions_layout_are_read_too(fashion):
    folder, arrays = fashion
    (folder / "FashionMNIST" / "raw").mkdir(parents=True)
    for stem, array in arrays.items():
        (folder / f"{stem}-ubyte.gz").unlink()
        (folder / "FashionMNIST" / "raw" / f"{stem}-ubyte").write_bytes(idx(array))
    dataset = data.load("fashion-mnist", folder)
    assert np.array_equal(dataset.test.images[:, 0], arrays["t10k-images-idx3"])


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_a_mistyped_data_dir_is_one_line_and_no_folder(tmp_path, name, debian, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", None)  # not even asked
    with pytest.raises(UserError, match=r"no folder .*typo: --data-dir"):
        data.load(name, tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_labels_for_other_images_are_refused(fashion):
    folder, arrays = fashion
    labels = arrays["train-labels-idx1"][:-1]
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(UserError, match="20 images and 19 labels"):
        data.load("fashion-mnist", folder)


def test_cifar10_is_not_downloaded_into_a_folder_that_is_named(cifar, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", None)  # not even asked
    (cifar / CIFAR10.base_folder / "test_batch").unlink()
    before = sorted(cifar.rglob("*"))
    with pytest.raises(UserError, match=r"lacks test_batch: .*--data-dir"):
        data.load("cifar10", cifar)
    assert sorted(cifar.rglob("*")) == before


def test_cifar10_that_is_damaged_and_cannot_be_fetched_names_the_option(cifar, no_network):
    (cifar / CIFAR10.base_folder / "data_batch_1").write_bytes(b"damaged")
    with pytest.raises(UserError, match="--data-dir"):
        data.load("cifar10", cifar)


def test_a_dataset_that_is_missing_and_cannot_be_fetched_names_the_option(
    tmp_path, no_network, monkeypatch
):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(named_data, "DEBIAN", tmp_path / "none")
    for name in ("cifar10", "fashion-mnist"):
        with pytest.raises(UserError, match=r"could not be downloaded: .*--data-dir"):
            data.load(name)
        with pytest.raises(UserError, match="--data-dir"):
            data.load(name, download=False)


# Names


def test_an_unknown_dataset_is_answered_with_those_that_are_known():
    with pytest.raises(UserError, match="digits, fashion-mnist, cifar10"):
        data.load("no-such-data")


# Fingerprints


def test_a_fingerprint_is_of_every_pixel_their_order_and_the_labels(digits):
    images, labels = digits.train.images, digits.train.condition["label"]
    other = images.clone()
    other[-1, 0, 7, 7] ^= 1
    sources = [InMemory(images, {"label": labels}), InMemory(images)]
    sources += [InMemory(changed, {"label": labels}) for changed in (other, images.flip(0))]
    sources += [InMemory(images, {"label": labels.flip(0)})]
    sources += [InMemory(images.flip(-1), {"label": labels})]
    prints = [source.fingerprint() for source in sources]
    assert len({*prints}) == len(prints)
    assert (
        digits.spec.sha256
        == prints[0]
        == hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    )
