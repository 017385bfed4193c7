"""DINOv2 and CLIP from a folder: the features are transformers' own, of images as in training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import data
from diffusion.console import UserError
from eval.measure import pretrained
from eval.measure.features import extractor
from eval.measure.real import Real

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def digits() -> Real:
    return Real.sample(data.load("digits"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Path]:
    """Tiny networks of random weights, each saved by transformers itself."""
    place = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    dino = transformers.Dinov2Config(**SMALL, image_size=224, patch_size=56)
    vision = {**SMALL, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    text = {**vision, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
    clip = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    transformers.Dinov2Model(dino).save_pretrained(place / "dinov2")
    transformers.CLIPModel(clip).save_pretrained(place / "clip")  # with its text tower
    return {name: place / name for name in ("dinov2", "clip")}


def expected(name: str, folder: Path, images: torch.Tensor) -> torch.Tensor:
    """By Pillow's bicubic and the whole network of transformers."""
    size = {"dinov2": 224, "clip": 32}[name]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    constants = transformers.image_utils
    mean, std = {
        "dinov2": (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD),
        "clip": (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD),
    }[name]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    resized = [np.asarray(picture.resize((size, size), Image.BICUBIC)) for picture in pictures]
    pixels = (np.stack(resized) / 255 - mean) / std
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    tower = model.vision_model if name == "clip" else model
    with torch.no_grad():
        return tower(pixel_values=pixels).pooler_output


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_the_features_are_those_of_transformers(digits, networks, name):
    images = torch.nn.functional.interpolate(digits.train[:5].float(), 24, mode="bilinear")
    images = images.expand(-1, 3, -1, -1).to(torch.uint8).contiguous()
    metric = extractor(f"{name}:{networks[name]}", digits, CPU)
    ours, theirs = metric.extract(images), expected(name, networks[name], images)
    assert ours.shape == (5, metric.dim) == (5, 32)
    # Pillow rounds twice, after each direction: far less than between two images
    assert (ours - theirs).norm() < 0.015 * (theirs - theirs.mean(0)).norm()


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_the_metric_is_named_by_the_weights(digits, networks, name):
    metric = extractor(f"{name}:{networks[name]}", digits, CPU)
    assert metric.name == f"fd-{name}-{metric.sha256[:8]}"
    grey, colour = digits.train[:40], digits.train[:40].expand(-1, 3, -1, -1)
    torch.testing.assert_close(metric.extract(grey), metric.extract(colour))


def refused(choice: str, digits: Real, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        extractor(choice, digits, CPU)
    assert "\n" not in str(error.value)


def test_a_folder_that_lacks_weights_is_refused_not_filled_with_random_ones(
    digits, networks, tmp_path
):
    refused(f"dinov2:{tmp_path}", digits, r"no .*config\.json: expected a Dinov2Model")
    config = (networks["dinov2"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    refused(f"dinov2:{tmp_path}", digits, "does not load: expected a Dinov2Model")
    model = transformers.Dinov2Model.from_pretrained(networks["dinov2"])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle is not read
    refused(f"dinov2:{tmp_path}", digits, "does not load: expected a Dinov2Model")
    (tmp_path / "pytorch_model.bin").unlink()
    model.save_pretrained(tmp_path)
    deeper = json.loads(config) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    refused(f"dinov2:{tmp_path}", digits, "lacks weights such as encoder.layer.2")


def test_without_transformers_the_line_says_how_to_get_it(digits, networks, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    refused(f"clip:{networks['clip']}", digits, "pip install transformers")


def test_names_with_a_folder_alone_are_taken():
    names = ("clip:x", "dinov2:/a/b", "clip", "sam:x", "module:clip:f")
    assert [pretrained.is_named(name) for name in names] == [True, True, False, False, False]
