"""fid is clean-fid's own, to the bit where it resizes, from the published weights alone."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cleanfid.features
import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from cleanfid import fid
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from PIL import Image
from scipy import linalg
from torch import Tensor, nn

from diffusion.codec import Scale
from diffusion.console import UserError
from diffusion.data import Dataset, ImageSpec
from diffusion.images import InMemory
from eval.measure import inception
from eval.measure.features import extractor
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.real import Real

CPU = torch.device("cpu")
ACTIVE = 40  # of the stand-in's 2048 features; the others are 0, as those of dead units


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.dead = 2048 - ACTIVE
        self.project = nn.Linear(3 * 12 * 12, ACTIVE)

    def forward(self, x: Tensor) -> Tensor:
        h = F.adaptive_avg_pool2d(x, 12).flatten(1)
        return F.pad(torch.relu(self.project(4 * h)), (0, self.dead))[:, :, None, None]


class Base(nn.Module):
    """The interface of NVIDIA's inception-2015-12-05.pt, which resizes if it is called whole."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return self.layers(x / 255)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / inception.FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that TorchScript is deprecated
        torch.jit.script(Base().eval()).save(str(file))
    return file


@pytest.fixture
def published(stand_in, monkeypatch) -> Path:
    """The stand-in, as if it were the file that was published."""
    monkeypatch.setattr(inception, "SHA256", inception.file_sha256(stand_in))
    return stand_in


@pytest.fixture
def offline(monkeypatch) -> None:
    def fail(*args, **kwargs):
        pytest.fail("the network was asked")

    monkeypatch.setattr(inception.pooch, "HTTPDownloader", fail)


@pytest.fixture(scope="module")
def colour() -> Real:
    """Blocks of colour, so that neighbours are alike, with the darkest and brightest levels."""
    blocks = torch.randint(0, 256, (130, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(blocks.float(), 16, mode="nearest").to(torch.uint8)
    train, test = InMemory(images[:70]), InMemory(images[70:])
    return Real.sample(Dataset(ImageSpec("blocks", 3, 16), train, test, Scale(127.5, 74.0)))


@pytest.fixture(params=["grey", "colour"])
def dataset(request, digits, colour) -> Real:
    return Real.sample(digits) if request.param == "grey" else colour


def write_pngs(folder: Path, images: Tensor) -> str:
    folder.mkdir()
    for i, image in enumerate(images):
        pixels = image.permute(1, 2, 0).squeeze(2).numpy()
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return str(folder)


@pytest.fixture
def clean_fid(published, monkeypatch) -> None:
    """clean-fid itself, on the stand-in, which it would otherwise look for in /tmp and download."""

    def model(path: str, download: bool, resize_inside: bool) -> InceptionV3W:
        return InceptionV3W(str(published.parent), False, resize_inside)

    def sqrtm(x: np.ndarray, disp: bool = True, sqrtm=linalg.sqrtm):
        """The root of the block that is not 0: 2048 dimensions would take half a minute."""
        root, block = np.zeros_like(x), np.ix_(*[np.flatnonzero(x.any(1) | x.any(0))] * 2)
        root[block] = sqrtm(x[block])
        return root if disp else (root, 0)

    monkeypatch.setattr(cleanfid.features, "InceptionV3W", model)
    monkeypatch.setattr(fid.linalg, "sqrtm", sqrtm)


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:FutureWarning")
def test_fid_features_are_those_that_clean_fid_extracts_from_the_same_images_as_png(
    dataset, published, offline, clean_fid, tmp_path
):
    images = dataset.train[:70]  # more than one batch
    model = cleanfid.features.build_feature_extractor("clean", CPU, use_dataparallel=False)
    folder = write_pngs(tmp_path / "png", images)
    theirs = fid.get_folder_features(folder, model, 0, batch_size=32, device=CPU, verbose=False)
    ours = extractor("inception", dataset, CPU, published)
    assert (ours.name, ours.dim, ours.sha256) == ("fid", 2048, inception.file_sha256(published))
    torch.testing.assert_close(ours.extract(images), torch.from_numpy(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:FutureWarning")
def test_the_distance_of_two_folders_is_clean_fids(colour, published, clean_fid, tmp_path):
    sets = colour.train, colour.test
    folders = [write_pngs(tmp_path / str(i), images) for i, images in enumerate(sets)]
    theirs = fid.compute_fid(
        *folders, mode="clean", num_workers=0, device=CPU, verbose=False, use_dataparallel=False
    )
    extract = extractor("inception", colour, CPU, published.parent).extract
    a, b = (Moments.of(extract(images)) for images in sets)
    assert theirs > 0.1
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_images_are_resized_as_clean_fid_resizes_them_to_the_bit(dataset, count):
    images = dataset.train[:count]
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    theirs = np.stack([build_resizer("clean")(image) for image in pixels])
    with ThreadPoolExecutor() as pool:
        ours = inception.resize(images, pool)
    assert ours.shape == (count, 3, 299, 299)
    assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), theirs)


@pytest.mark.parametrize("where", ["file", "renamed file", "folder", "cache"])
def test_the_weights_are_found_without_the_network(published, digits, offline, tmp_path, where):
    renamed = tmp_path / "other.pt"
    renamed.write_bytes(published.read_bytes())
    places = {"file": published, "renamed file": renamed, "folder": published.parent}
    network = extractor("inception", digits, CPU, places.get(where), cache=published.parent)
    assert network.extract(digits.train.images[:2]).shape == (2, 2048)


def names_all(error: UserError, *words: object) -> bool:
    named = [str(word) in str(error) for word in (*words, inception.URL, "--inception PATH")]
    return all(named) and "\n" not in str(error)


@pytest.mark.parametrize("place", ["file", "folder", "cache"])
def test_a_file_that_is_not_the_published_one_is_refused_with_both_hashes(
    stand_in, digits, offline, place
):
    named = {"file": stand_in, "folder": stand_in.parent, "cache": None}[place]
    with pytest.raises(UserError) as refused:
        extractor("inception", digits, CPU, named, cache=stand_in.parent)
    published = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
    assert names_all(refused.value, stand_in, published, inception.file_sha256(stand_in))


@pytest.mark.parametrize("named", ["weights.pt", "."])
def test_a_named_place_without_the_file_is_an_error_though_the_cache_has_it(
    published, digits, offline, tmp_path, named
):
    with pytest.raises(UserError) as missing:
        extractor("inception", digits, CPU, tmp_path / named, cache=published.parent)
    file = tmp_path / (inception.FILE if named == "." else named)
    assert names_all(missing.value, file, inception.SHA256)


def test_without_a_network_the_error_says_where_the_file_goes_and_comes_from(
    digits, tmp_path, monkeypatch
):
    def refuse(url: str, file: str, pooch):
        raise requests.ConnectionError("no such host")

    monkeypatch.setattr(inception.pooch, "HTTPDownloader", lambda timeout: refuse)
    with pytest.raises(UserError) as missing:
        extractor("inception", digits, CPU, cache=tmp_path)
    assert names_all(missing.value, tmp_path / inception.FILE, inception.SHA256, "no such host")


def test_the_file_is_downloaded_once_and_only_if_it_is_the_published_one(
    published, digits, tmp_path, monkeypatch
):
    asked, content = [], published.read_bytes()
    answer = SimpleNamespace(content=content[:-1])  # cut short

    def send(url: str, file: str, pooch):
        asked.append(url)
        Path(file).write_bytes(answer.content)

    monkeypatch.setattr(inception.pooch, "HTTPDownloader", lambda timeout: send)
    with pytest.raises(UserError, match="does not match the known hash"):
        extractor("inception", digits, CPU, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    answer.content = content
    for _ in range(2):
        extractor("inception", digits, CPU, cache=tmp_path / "new")
    assert asked == [inception.URL] * 2
    assert (tmp_path / "new" / inception.FILE).read_bytes() == content
