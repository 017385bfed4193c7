"""Codecs: pixels to x0 and back, and a card's codec is the one that was saved."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from diffusion import checkpoint, codec, data
from diffusion.codec import CODECS, Scale, from_json, to_json
from diffusion.console import UserError
from diffusion.model import load

close = torch.testing.assert_close


@pytest.fixture(params=[name for name, kind in CODECS.items() if hasattr(kind, "fitted")])
def fitted(request, digits) -> codec.Codec:
    """Each codec that images alone say all of, fitted to the digits."""
    return CODECS[request.param].fitted([digits.train.images])


def test_a_fitted_codecs_x0_has_zero_mean_and_unit_variance(fitted, digits):
    x0 = fitted.encode(digits.train.images).double()
    assert abs(x0.mean()) < 1e-6
    assert abs(x0.var(correction=0) - 1) < 1e-6


def test_every_grey_level_survives_scaling_and_back(fitted):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x0 = fitted.encode(levels)
    assert x0.dtype == torch.float32
    assert torch.equal(fitted.decode(x0), levels)


def test_what_lies_beyond_black_and_white_is_clipped():
    scale = Scale(mean=100.0, std=50.0)
    assert scale.decode(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_its_bounds_are_black_and_white_and_its_shape_that_of_its_x0(fitted, digits):
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 8, 8)
    x0 = fitted.encode(images)
    close(x0[:, 0, 0, 0], torch.tensor(fitted.bounds))
    assert x0.shape[1:] == fitted.shape((1, 8, 8))


def test_its_grey_levels_say_how_each_value_is_scaled(fitted):
    mean, std = fitted.grey_levels
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    close(fitted.encode(levels) * std + mean, levels.float())


def test_a_codec_goes_through_json_and_back_bit_for_bit(fitted):
    again = from_json(json.loads(json.dumps(to_json(fitted))))
    assert type(again) is type(fitted)
    assert again == fitted


def test_a_card_of_a_codec_that_is_not_registered_is_one_clear_error(teacher, tmp_path):
    weights, card, _ = checkpoint.load(teacher)
    other = replace(card, codec={"name": "latent", "factor": 8})
    checkpoint.save(tmp_path / "other.safetensors", weights, other)
    with pytest.raises(UserError, match="codec is 'latent', expected one of scale") as error:
        load(tmp_path / "other.safetensors").codec  # noqa: B018
    assert "\n" not in str(error.value)


def test_an_unknown_codec_is_refused_before_anything_is_fitted():
    with pytest.raises(UserError, match="unknown codec 'latent': expected scale"):
        data.load("digits", codec="latent")


@dataclass(frozen=True)
class Halves:
    """A codec of another shape: each image's upper half beside its lower."""

    bounds, grey_levels = None, None

    def shape(self, pixels):
        return 2 * pixels[0], pixels[1] // 2, pixels[2]

    def encode(self, images):
        return torch.cat((images.float() / 128 - 1).chunk(2, dim=2), dim=1)

    def decode(self, x0):
        whole = torch.cat(x0.chunk(2, dim=1), dim=2)
        return ((whole + 1) * 128).round().clamp(0, 255).to(torch.uint8)

    @staticmethod
    def fitted(images):
        return Halves()


def test_a_new_codec_is_an_entry_and_data_and_models_go_through_it(monkeypatch, teacher):
    monkeypatch.setitem(CODECS, "halves", Halves)
    dataset = data.load("digits", codec="halves")
    assert dataset.codec == from_json(to_json(Halves())) == Halves()
    assert torch.equal(Halves().decode(Halves().encode(dataset.train.images)), dataset.train.images)
    model = load(teacher)
    model = replace(model, card=replace(model.card, codec=to_json(Halves())))
    assert model.spec.shape == (1, 8, 8)
    assert model.shape == (2, 4, 8)
