"""Cards changed by rule: each is refused in one line that names the field, or is a card like it."""

import json
import math
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.changes import ABSENT, FREE, VALUES, changed, places
from diffusion import checkpoint, model
from diffusion.checkpoint import Card
from diffusion.console import UserError
from diffusion.plan import Plan

TEACHER = Card(
    method="teacher",
    plans=(Plan("ancestral", (0.0, 0.5, 1.0, math.pi / 2)), Plan("ddim", (0.0, 1.5))),
    abilities=("denoise",),
    net={
        "name": "unet", "channels": 1, "size": 8, "width": 8, "multipliers": [1], "blocks": 1,
        "attention": [], "dropout": 0.0, "patch": 1,
    },
    denoiser={"prediction": "v", "learned_variance": False, "bounds": [-0.8, 1.8]},
    condition={
        "label": {"kind": "label", "num_classes": 3},
        "guidance": {"kind": "guidance", "low": 0.5, "high": 3.0},
    },
    codec={"name": "scale", "mean": 78.0, "std": 96.0},
    data={"name": "digits", "channels": 1, "size": 8, "background": "", "sha256": "9" * 64},
    parent="1" * 64,
    origin="2" * 64,
    training={"settings": {"seed": 3}, "iterations": 30, "images": 960, "seconds": 2.5},
)  # fmt: skip
NOW = json.loads(TEACHER.to_json())
BEFORE = {
    "method": "teacher", "sampler": "ancestral", "plans": {"2": [0.0, 0.5, 1.5]},
    "solvers": ["ddim"], "shift": 1.0, "shifted": False, "guidance": None, "parent": None,
    "origin": None, "training": {"settings": {}, "iterations": 30},
    "net": {k: v for k, v in NOW["net"].items() if k != "name"} | {
        "num_classes": 3, "prediction": "v", "learned_variance": False, "bounds": None,
        "guidance": [0.5, 3.0],
    },
    "data": NOW["data"] | {"mean": 78.0, "std": 96.0, "num_classes": 3},
    "format": 1,
}  # fmt: skip


CARDS = {"now": NOW, "before": BEFORE}
PLACES = [(version, path) for version, card in CARDS.items() for path in places(card)]


@pytest.fixture(scope="module")
def weights() -> dict:
    torch.manual_seed(0)
    return model.of_card(TEACHER, "fp32").net.state_dict()


def read(text: str, weights: dict) -> model.Model | str:
    """The model of a card of this text, or why it is none."""
    try:
        card = Card.from_json(text)
        return model.Model(model.of_card(card, "fp32", weights), card, "")
    except UserError as error:
        return str(error)


def written(path: Path, weights: dict, text: str) -> Path:
    """A checkpoint whose card is this text, sealed as any other is."""
    checkpoint.save(path, weights, SimpleNamespace(to_json=lambda: text))
    return path


def test_the_cards_that_are_changed_are_whole_before(tmp_path, weights):
    for card in CARDS.values():
        loaded = model.load(written(tmp_path / "model.safetensors", weights, json.dumps(card)))
        assert loaded.sample(loaded.plan(2, "ddim"), 0, torch.arange(2)).shape == (2, 1, 8, 8)
    assert len(PLACES) * len(VALUES) > 1000


@pytest.mark.parametrize(
    ("version", "path"), PLACES, ids=lambda x: x if isinstance(x, str) else ".".join(map(str, x))
)
def test_a_changed_card_is_refused_in_one_line_or_is_a_card_like_it(weights, version, path):
    name, usual = ".".join(map(str, path)), CARDS[version]
    for key in path:
        usual = usual[key]
    for value in VALUES:
        card = changed(CARDS[version], path, value)
        loaded = read(json.dumps(card), weights)
        if isinstance(loaded, str):
            assert "\n" not in loaded
            assert len(loaded) < 300
            continue
        optional = value is ABSENT or value is None or value == usual
        assert optional or name in FREE or name.startswith("plans."), (name, value)
        for plan in loaded.card.plans:
            assert plan.angles[0] == 0
            assert all(s < t <= math.pi / 2 + 1e-9 for s, t in pairwise(plan.angles))
        assert 0 < loaded.codec.std < math.inf
        assert math.isfinite(loaded.codec.mean)
        low, high = loaded.denoiser.config.bounds or (-1, 1)
        assert -math.inf < low < high < math.inf


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plans": [NOW["plans"][0] | {"angles": [0, 0.5, 0.4]}]}, r"plans\.0\.angles: .*ascend"),
        ({"plans": [NOW["plans"][0] | {"angles": [0.1, 0.5]}]}, r"plans\.0\.angles: .*from 0"),
        ({"plans": [NOW["plans"][0] | {"angles": [0, 1.6]}]}, r"plans\.0\.angles\.1: .*1\.57"),
        ({"plans": [NOW["plans"][0] | {"sampler": "euler"}]}, r"plans\.0\.sampler: .*'euler'"),
        ({"plans": [NOW["plans"][0] | {"guidance": 4.0}]}, r"plans\.0\.guidance: .*0\.5 to 3"),
        ({"codec": {"name": "scale", "mean": 0.0, "std": 0}}, r"codec\.std: .*greater than .*0"),
        ({"denoiser": {"bounds": [2, 1]}}, r"denoiser\.bounds: .*ascend"),
        ({"data": NOW["data"] | {"size": 16}}, r"net: .*\(1, 16, 16\), .*got \(1, 8, 8\)"),
        ({"net": NOW["net"] | {"blocks": 1000}}, "more tensors than the file's"),
        ({"net": NOW["net"] | {"width": 65536}}, r"angle.mlp.0.bias is .* \(32,\), but .*262144"),
        ({"net": NOW["net"] | {"size": 12, "multipliers": [1] * 4}}, "net|size"),
        ({"net": {"name": "unet", "size": "8"}}, r"net\.size: expected .*integer, got \"8\""),
    ],
)  # fmt: skip
def test_a_card_at_odds_with_itself_or_its_weights_says_where(tmp_path, weights, changes, words):
    file = written(tmp_path / "m.safetensors", weights, json.dumps(NOW | changes))
    with pytest.raises(UserError, match=words):
        model.load(file)


def test_a_network_that_does_not_fit_asks_for_no_memory(tmp_path, weights, monkeypatch):
    file = written(tmp_path / "m.safetensors", weights, json.dumps(
        NOW | {"net": NOW["net"] | {"width": 65536}}
    ))  # fmt: skip
    monkeypatch.setattr(model, "build", None)
    with pytest.raises(UserError, match="262144"):
        model.load(file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_weights_of_another_type_are_not_taken_for_the_networks(tmp_path, weights, dtype):
    other = {name: value.to(dtype) for name, value in weights.items()}
    with pytest.raises(UserError, match=f"{dtype} .*but torch.float32"):
        model.load(written(tmp_path / "m.safetensors", other, json.dumps(NOW)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    place=st.sampled_from(PLACES), value=JSON, cut=st.integers(0, 4000), noise=st.text(max_size=4)
)
def test_any_text_is_a_card_or_one_line(place, value, cut, noise):
    version, path = place
    text = json.dumps(changed(CARDS[version], path, value))
    for each in (text, text[:cut] + noise + text[cut:], "[" * cut):
        with suppress(UserError):
            card = Card.from_json(each)
            assert Card.from_json(card.to_json()) == card
