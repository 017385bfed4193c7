"""Conditions: rows by name, their kinds, and networks that take exactly what a card says."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffusion import checkpoint, condition, networks
from diffusion.condition import (
    KINDS,
    Guidance,
    Label,
    Text,
    from_json,
    is_token,
    take,
    to_json,
    with_null,
)
from diffusion.console import UserError
from diffusion.denoiser import DenoiserConfig
from diffusion.model import build, load, of_card
from diffusion.networks import NETWORKS, UNet, UNetConfig
from tests.analytic import normal, random_denoiser

close = torch.testing.assert_close
KNOWN = {"label": Label(3), "guidance": Guidance(0.5, 3.0)}
CONDITION = {"label": torch.tensor([2, 0, 1]), "guidance": torch.tensor([1.5, 0.5, 3.0])}
ANGLES = torch.tensor([0.3, 0.8, 1.5], dtype=torch.float64)


@pytest.mark.parametrize("names", [(), ("label",), ("guidance",), ("label", "guidance")])
def test_kinds_go_through_json_and_back(names):
    kinds = {name: KNOWN[name] for name in names}
    assert from_json(json.loads(json.dumps(to_json(kinds)))) == kinds


def test_a_kind_may_have_any_name():
    kinds = {"colour": Label(7), "shape": Label(2)}
    assert from_json(to_json(kinds)) == kinds


def test_null_rows_say_nothing_of_the_same_shape_and_type():
    null = {name: KNOWN[name].null(rows) for name, rows in CONDITION.items()}
    assert null["label"].tolist() == [3, 3, 3]  # the class after the last
    assert null["guidance"].tolist() == [1, 1, 1]  # no guidance
    for name, rows in CONDITION.items():
        assert (null[name].shape, null[name].dtype) == (rows.shape, rows.dtype)


def test_a_condition_with_null_rows_is_itself_and_then_nothing():
    both = with_null(CONDITION, KNOWN)
    assert both.keys() == CONDITION.keys()
    for name, rows in both.items():
        first, second = rows.chunk(2)
        assert torch.equal(first, CONDITION[name])
        assert torch.equal(second, KNOWN[name].null(first))
    assert with_null({}, KNOWN) == {}


def test_a_text_is_kept_by_json_and_says_nothing_by_default():
    kind = Text(tokens=5, width=4, encoder="a small BERT", sha256="0" * 64)
    assert from_json(json.loads(json.dumps(to_json({"text": kind})))) == {"text": kind}
    rows = kind.rows(torch.arange(3))
    assert (rows.shape, rows.dtype) == ((3, 5, 4), torch.float32)
    assert not is_token(rows).any()
    said = normal(0, 3, 5, 4)
    assert torch.equal(kind.null(said), rows)


def test_tokens_are_the_rows_that_are_not_all_zero():
    text = torch.zeros(2, 3, 4)
    text[0, 0, 1], text[1, 2, 3] = -0.5, 1e-9
    assert is_token(text).tolist() == [[True, False, False], [False, False, True]]


def test_taken_rows_are_those_of_every_name_and_none_of_none():
    index = torch.tensor([2, 0])
    taken = take(CONDITION, index)
    assert {name: rows.tolist() for name, rows in taken.items()} == {
        "label": [1, 2],
        "guidance": [3.0, 1.5],
    }
    assert take(CONDITION, slice(1, None))["label"].tolist() == [0, 1]
    assert take(None, index) is None


def test_where_nobody_says_every_class_comes_in_turn_and_nothing_is_guided():
    indices = torch.tensor([0, 1, 2, 3, 7])
    assert Label(3).rows(indices).tolist() == [0, 1, 2, 0, 1]
    assert Guidance(0.5, 3.0).rows(indices).tolist() == [1] * 5


# Networks


def test_a_null_row_is_to_the_network_what_no_condition_is():
    denoiser, x_t = random_denoiser(num_classes=3, guidance=(0.5, 3.0)), normal(0, 3, 1, 8, 8)
    null = {name: KNOWN[name].null(rows) for name, rows in CONDITION.items()}
    nothing = denoiser(x_t, ANGLES)
    close(denoiser(x_t, ANGLES, null), nothing)
    close(denoiser(x_t, ANGLES, {}), nothing)
    for name in CONDITION:
        close(
            denoiser(x_t, ANGLES, null | {name: CONDITION[name]}),
            denoiser(x_t, ANGLES, {name: CONDITION[name]}),
        )
        assert (denoiser(x_t, ANGLES, {name: CONDITION[name]}) - nothing).abs().max() > 0.01


def test_the_order_of_names_in_a_condition_changes_nothing():
    denoiser, x_t = random_denoiser(num_classes=3, guidance=(0.5, 3.0)), normal(0, 3, 1, 8, 8)
    turned = dict(reversed(CONDITION.items()))
    assert torch.equal(denoiser(x_t, ANGLES, CONDITION), denoiser(x_t, ANGLES, turned))


@pytest.mark.parametrize("kinds", [{"colour": Label(7)}, {"label": Guidance(1, 2)}])
def test_a_kind_that_the_unet_cannot_take_is_refused_by_name(kinds):
    with pytest.raises(UserError, match=f"unet takes label and .*, not {next(iter(kinds))}"):
        UNet(UNetConfig(), kinds=kinds)


@pytest.mark.parametrize(
    "config", [UNetConfig(), UNetConfig(3, 28, 16, (1, 2, 2), 1, (14, 7), 0.1, 2)], ids=str
)
def test_a_networks_shape_goes_through_json_and_back(config):
    assert networks.from_json(json.loads(json.dumps(networks.to_json(config)))) == config


@dataclass(frozen=True)
class Line:
    """The shape of a network that is one matrix, and knows a temperature."""

    channels: int = 1
    size: int = 8
    ends: tuple[float, ...] = (0.0, 1.0)

    def check(self) -> None:
        pass

    def build(self, outputs: int, kinds) -> torch.nn.Module:
        return LineNet(self, outputs, kinds)


@dataclass(frozen=True)
class Temperature:
    """A number that a network may be told; 0 is none."""

    most: float

    def null(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)

    def rows(self, indices: Tensor) -> Tensor:
        return torch.full(indices.shape, self.most)


class LineNet(torch.nn.Module):
    def __init__(self, config: Line, outputs: int, kinds):
        super().__init__()
        self.config, self.mix = config, torch.nn.Conv2d(config.channels, outputs, 1)

    def forward(self, x, t, condition=None):
        warm = (condition or {}).get("heat", torch.zeros_like(t))
        return self.mix(x) + warm[:, None, None, None]


def test_a_new_network_and_a_new_kind_are_entries_that_a_card_leads_back_to(
    monkeypatch, teacher, tmp_path
):
    monkeypatch.setitem(NETWORKS, "line", Line)
    monkeypatch.setitem(KINDS, "temperature", Temperature)
    kinds, config = {"heat": Temperature(2.0)}, DenoiserConfig("x0", bounds=(-1.0, 2.0))
    denoiser = build(Line(), config, kinds, "fp32")
    card = replace(
        checkpoint.load(teacher)[1],
        net=networks.to_json(Line()),
        denoiser=config.to_json(),
        condition=to_json(kinds),
    )
    checkpoint.save(tmp_path / "line.safetensors", denoiser.net.state_dict(), card)
    model = load(tmp_path / "line.safetensors")
    assert model.denoiser.net.config == Line()
    assert model.denoiser.config == config
    assert model.kinds == kinds
    x_t, heat = normal(0, 3, 1, 8, 8), {"heat": torch.tensor([0.0, 1.0, 2.0])}
    close(model.denoiser(x_t, ANGLES, heat), denoiser(x_t, ANGLES, heat))
    usual = model.conditions(torch.arange(3))
    assert usual["heat"].tolist() == [2, 2, 2]
    given = {"heat": torch.zeros(3)}
    plan = model.plan(3, "ddim")
    assert torch.equal(
        model.x0(plan, 0, torch.arange(3)), model.x0(plan, 0, torch.arange(3), usual)
    )
    assert not torch.equal(
        model.x0(plan, 0, torch.arange(3)), model.x0(plan, 0, torch.arange(3), given)
    )


# Cards of what is not registered here


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"net": {"name": "transformer", "channels": 1, "size": 8}},
            "'transformer', expected one of unet",
        ),
        ({"net": {"name": "unet", "heads": 4}}, "net.heads: no such field"),
        (
            {"condition": {"text": {"kind": "words", "length": 9}}},
            "kind 'words', expected one of label",
        ),
        ({"condition": {"colour": {"kind": "label", "num_classes": 3}}}, "not colour"),
        ({"denoiser": {"prediction": "v", "flow": True}}, "denoiser.flow: no such field"),
    ],
)  # fmt: skip
def test_a_card_that_names_what_is_not_registered_is_one_clear_error(
    teacher, tmp_path, change, words
):
    weights, card, _ = checkpoint.load(teacher)
    path = tmp_path / "other.safetensors"
    checkpoint.save(path, weights, replace(card, **change))
    with pytest.raises(UserError, match=words) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("learned", [False, True])
def test_a_denoisers_settings_go_through_json_and_back(learned):
    for bounds in (None, (-0.1 - 0.2, 2.0)):
        config = DenoiserConfig("x0", learned, bounds)
        assert DenoiserConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_cards_denoiser_takes_its_conditions_and_a_share(teacher):
    card = replace(
        checkpoint.load(teacher)[1],
        denoiser=DenoiserConfig(learned_variance=True).to_json(),
        condition=condition.to_json(KNOWN),
    )
    denoiser = of_card(card, "fp32")
    x0, share = denoiser(normal(0, 3, 1, 8, 8), ANGLES, CONDITION, variance=True)
    assert x0.shape == share.shape == (3, 1, 8, 8)
    assert denoiser.kinds == KNOWN
