"""Files of earlier versions: what was saved then loads, resumes and is recognised today."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion import checkpoint, condition, files, networks, older, runs
from diffusion.checkpoint import Card
from diffusion.condition import Guidance, Label
from diffusion.console import UserError
from diffusion.denoiser import DenoiserConfig
from diffusion.machine import this_device
from diffusion.model import build, load
from diffusion.plan import Plan
from diffusion.schedules import cosine
from diffusion.training import Average, Method, Player, fit, frozen_copy, one_network
from distill import scm
from distill.discrete import DISTANCES, WEIGHTS, Consistency
from distill.pairs import neighbours
from distill.steps import data_step
from teachers.ddpm import Denoising
from teachers.levels import ImportanceSampling, LossHistory
from tests.analytic import random_denoiser

LIST = tuple(cosine(8).tolist())
TEACHER, VARIANCE = "1" * 64, "2" * 64
SCALE = {"mean": 77.99307849443672, "std": 95.95117692391125}
DIGITS = {"name": "digits", "channels": 1, "size": 8, "background": "", "sha256": "9" * 64}
SHAPE = {
    "channels": 1,
    "size": 8,
    "width": 8,
    "multipliers": [1],
    "blocks": 1,
    "attention": [],
    "dropout": 0.0,
    "patch": 1,
}
NET = SHAPE | {
    "num_classes": 0,
    "prediction": "v",
    "learned_variance": False,
    "bounds": None,
    "guidance": None,
}
SOLVERS = [
    "ddim",
    "heun",
    "dpm-solver++",
    "unipc",
    "truncated",
    "stochastic",
    "ancestral",
    "predictor-corrector",
]
# A teacher's card of format 1, and the same one today.
OLD = {
    "method": "teacher",
    "sampler": "ancestral",
    "plans": {"8": list(LIST)},
    "solvers": SOLVERS,
    "net": NET,
    "data": DIGITS | {"num_classes": 10} | SCALE,
    "shift": 1.0,
    "shifted": False,
    "guidance": None,
    "parent": None,
    "origin": None,
    "training": {"settings": {"schedule": "cosine"}, "iterations": 30, "images": 960},
    "format": 1,
}
NEW = Card(
    method="teacher",
    plans=(Plan("ancestral", LIST),),
    abilities=("denoise",),
    net={"name": "unet", **SHAPE},
    denoiser={"prediction": "v", "learned_variance": False, "bounds": None},
    condition={},
    codec={"name": "scale", **SCALE},
    data=DIGITS,
    training={"settings": {"schedule": "cosine"}, "iterations": 30, "images": 960},
)
LABEL = {"label": {"kind": "label", "num_classes": 10}}
WEIGHT = {"guidance": {"kind": "guidance", "low": 0.5, "high": 3.0}}
BORN = {"parent": TEACHER, "origin": TEACHER, "shift": 2.0}

# What made it -> what its card of format 1 has that a plain teacher's has not, and today's.
CARDS = {
    "teacher": ({}, {}),
    "clamped teacher that predicts x0": (
        {"net": NET | {"prediction": "x0", "bounds": [-0.8, 1.85]}},
        {"denoiser": NEW.denoiser | {"prediction": "x0", "bounds": [-0.8, 1.85]}},
    ),
    "teacher with a learned variance": (
        {
            "sampler": "ancestral-learned",
            "solvers": [*SOLVERS, "ancestral-learned"],
            "net": NET | {"learned_variance": True},
        },
        {
            "plans": (Plan("ancestral-learned", LIST),),
            "abilities": ("denoise", "variance"),
            "denoiser": NEW.denoiser | {"learned_variance": True},
        },
    ),
    "conditional teacher": ({"net": NET | {"num_classes": 10}}, {"condition": LABEL}),
    "guided student": (
        BORN
        | {
            "method": "guided",
            "net": NET | {"num_classes": 10, "guidance": [0.5, 3.0]},
            "guidance": 1.5,
        },
        BORN
        | {
            "method": "guided",
            "plans": (Plan("ancestral", LIST, 1.5),),
            "condition": LABEL | WEIGHT,
        },
    ),
    "consistency student": (
        BORN
        | {
            "method": "consistency-cd",
            "sampler": "consistency",
            "plans": {"1": [0.0, 1.57], "2": [0.0, 0.7, 1.57]},
            "solvers": ["consistency"],
            "shifted": True,
        },
        BORN
        | {
            "method": "consistency-cd",
            "plans": (
                Plan("consistency", (0.0, 1.57)),
                Plan("consistency", (0.0, 0.7, 1.57)),
            ),
            "abilities": ("jump",),
            "shifted": True,
        },
    ),
    "halved student": (
        BORN
        | {
            "method": "progressive",
            "sampler": "ddim",
            "plans": {"4": list(LIST[::2])},
            "solvers": [],
            "shifted": True,
        },
        BORN
        | {
            "method": "progressive",
            "plans": (Plan("ddim", LIST[::2]),),
            "abilities": (),
            "shifted": True,
        },
    ),
}


def save_old(path: Path, weights: dict[str, Tensor], card: dict) -> None:
    """Write a checkpoint as the versions of format 1 did."""
    text = json.dumps(card)
    sha256 = checkpoint.weights_sha256(weights)
    seal = hashlib.sha256(f"{sha256} {text}".encode()).hexdigest()
    save_file(weights, path, {"card": text, "sha256": seal})


def weights_for(old: dict) -> dict[str, Tensor]:
    net = {k: tuple(v) if isinstance(v, list) else v for k, v in old["net"].items()}
    return random_denoiser(**net).net.state_dict()


@pytest.mark.parametrize("name", CARDS)
def test_a_card_of_format_1_is_the_same_card_today(name):
    old, new = (OLD | CARDS[name][0], replace(NEW, **CARDS[name][1]))
    assert Card.from_json(json.dumps(old)) == new
    assert Card.from_json(new.to_json()) == new


@pytest.mark.parametrize("name", CARDS)
def test_a_checkpoint_of_format_1_makes_the_images_of_the_same_one_today(name, tmp_path):
    old, new = (OLD | CARDS[name][0], replace(NEW, **CARDS[name][1]))
    weights = weights_for(old)
    save_old(tmp_path / "old.safetensors", weights, old)
    checkpoint.save(tmp_path / "new.safetensors", weights, new)
    before, today = (load(tmp_path / f"{age}.safetensors") for age in ("old", "new"))
    assert before.card == today.card == new
    assert before.sha256 == today.sha256
    assert before.solvers == today.solvers == old["solvers"]
    assert before.codec == today.codec
    assert before.denoiser.config == today.denoiser.config
    assert before.kinds == today.kinds
    indices = torch.arange(3)
    images = [model.sample(model.plan(), 0, indices) for model in (before, today)]
    assert torch.equal(*images)
    assert before.plan().guidance == old["guidance"]
    assert {own.num_steps for own in before.card.plans} == {*map(int, old["plans"])}


@pytest.mark.parametrize(
    ("name", "shifted"),
    [
        ("teacher", False),
        ("guided student", False),  # of the teacher's own list
        ("halved student", True),
        ("consistency student", True),
    ],
)
def test_a_card_from_before_says_by_what_made_it_whether_its_angles_are_shifted(name, shifted):
    card = OLD | CARDS[name][0]
    del card["shifted"]
    assert Card.from_json(json.dumps(card)).shifted is shifted
    card["shifted"] = not shifted
    assert Card.from_json(json.dumps(card)).shifted is not shifted


def test_the_oldest_cards_lack_what_came_later():
    late = ("shift", "shifted", "guidance", "origin", "training")
    card = {key: value for key, value in OLD.items() if key not in late}
    card["net"] = {k: NET[k] for k in ("channels", "size", "width", "multipliers", "blocks")}
    card["net"]["attention"] = []
    card["data"] = {k: OLD["data"][k] for k in ("name", "channels", "size", *SCALE)}
    weights = weights_for(card)
    today = Card.from_json(json.dumps(card))
    assert (today.shift, today.shifted, today.guidance, today.training) == (1.0, False, None, {})
    assert (today.denoiser, today.condition) == ({}, {})
    denoiser = build(networks.from_json(today.net), DenoiserConfig(), {}, "fp32")
    denoiser.net.load_state_dict(weights)


def test_an_old_checkpoint_of_a_flipped_bit_is_damaged_as_ever(tmp_path):
    path, card = tmp_path / "old.safetensors", dict(OLD)
    save_old(path, weights_for(card), card)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged"):
        load(path)


# Settings that a run is recognised by

CONFIGS = {
    "plain": (DenoiserConfig(), {}, NET),
    "conditional, clamped, with a variance": (
        DenoiserConfig("eps", True, (-1.5, 2.0)),
        {"label": Label(10)},
        NET
        | {
            "num_classes": 10,
            "prediction": "eps",
            "learned_variance": True,
            "bounds": [-1.5, 2.0],
        },
    ),
    "guided": (
        DenoiserConfig(),
        {"label": Label(10), "guidance": Guidance(0.5, 3.0)},
        NET | {"num_classes": 10, "guidance": [0.5, 3.0]},
    ),
}


def as_json(value: dict) -> dict:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_networks_settings_are_what_they_were_when_it_was_one_dictionary(name, tiny):
    config, kinds, flat = CONFIGS[name]
    net, described = networks.to_json(tiny), condition.to_json(kinds)
    assert as_json(older.net_settings(net, config.to_json(), described)) == flat


def test_what_is_new_of_a_network_makes_its_settings_others(tiny):
    net, denoiser, describe = networks.to_json(tiny), DenoiserConfig().to_json(), condition.to_json
    settings = [
        older.net_settings(net, denoiser, {}),
        older.net_settings(net | {"name": "transformer"}, denoiser, {}),
        older.net_settings(net, denoiser, describe({"colour": Label(10)})),
        older.net_settings(net, denoiser, describe({"label": Label(10)})),
        older.net_settings(net, denoiser, describe({"label": Label(9)})),
        older.net_settings(net, denoiser | {"bounds": (0.0, 1.0)}, {}),
    ]
    assert len({json.dumps(each, sort_keys=True) for each in settings}) == len(settings)


# state/settings.json as a teacher's run of eight angles was begun with it.
BEGUN = {
    "schedule": "cosine",
    "iterations": 30,
    "minutes": None,
    "batch_size": 32,
    "learning_rate": 0.005,
    "warmup": 5,
    "anneal": "cosine",
    "ema": 0.999,
    "clip": 1.0,
    "weight_decay": 0.0,
    "precision": "fp32",
    "label_dropout": 0.1,
    "flip": False,
    "seed": 0,
    "parent": None,
    "net": NET,
    "shift": 1.0,
    "data": "digits",
    "images": {"name": "digits", "channels": 1, "size": 8, "num_classes": 10} | SCALE,
    "plans": "20c8a04f",
}


@pytest.fixture
def begun(digits, quick):
    """The settings of a run of format 1, and of the same run today."""
    sha256 = digits.spec.sha256
    card = replace(NEW, data=asdict(digits.spec), codec={"name": "scale"} | asdict(digits.codec))
    card = replace(card, training={"schedule": "cosine"})
    return BEGUN | {"data_sha256": sha256}, runs.settings_of_run(card, digits, quick)


def test_a_run_that_an_earlier_version_began_is_the_same_run_today(begun, tmp_path):
    before, now = begun
    assert before.keys() == now.keys()
    for name in before.keys() - {"images"}:
        assert now[name] == before[name], name
    scale = {name: pytest.approx(value, rel=1e-12) for name, value in SCALE.items()}
    assert now["images"] == before["images"] | scale
    runs.require_same(tmp_path, before | {"images": now["images"]}, now)


def test_a_run_that_an_earlier_version_began_with_other_settings_is_another(begun, tmp_path):
    before, now = begun
    before["images"] = now["images"]
    for change in ({"num_classes": 10}, {"bounds": [-1.0, 2.0]}, {"width": 16}):
        with pytest.raises(UserError, match=r"other settings \(net was"):
            runs.require_same(tmp_path, before | {"net": NET | change}, now)


# A training's state


def denoising(student) -> Method:
    return one_network(student, Denoising(cosine(8).to(this_device())))


def importance(student) -> Method:
    history = LossHistory(4).to(this_device())
    objective = ImportanceSampling(Denoising(cosine(8).to(this_device())), history)
    return one_network(student, objective)


def consistency(student) -> Method:
    target = frozen_copy(student).to(this_device())
    objective = Consistency(
        step=data_step,
        pairs=neighbours(cosine(8).to(this_device())),
        distance=DISTANCES["l2"],
        weight=WEIGHTS["one"],
        target=target,
        followers={"target": Average(target, lambda done, progress: 0.9)},
    )
    return one_network(student, objective)


def weighted(student) -> Method:
    """As distill.scm's: what weighs the loss was once a part of the student."""

    def loss(nets, batch, turn) -> Tensor:
        t = 0.2 + batch.level
        each = denoising(student).loss({"student": nets["student"]}, batch, turn)
        weight = nets["log_weight"](t)
        return weight.exp() * each - weight

    players = {"student": Player(student), "log_weight": Player(scm.LogWeight())}
    return Method(players, loss)


@pytest.fixture
def training(tmp_path, tiny, quick, digits):
    """(make, state) -> the method with a new network, and the loop that trains it."""

    def begin(make, state: str):
        config = replace(quick, save_every=0.0)
        torch.manual_seed(0)
        method = make(build(tiny, DenoiserConfig(), {}, "fp32"))
        return method, fit(method, digits, config, tmp_path / state)

    return begin


def to_old(path: Path, followers: list[str]) -> None:
    """Rewrite a state with the names that it had before there were players."""
    tensors, metadata = files.load_tensors(path)
    first = sum(
        name.startswith("optimizer.student.") and name.endswith(".step") for name in tensors
    )
    old = {}
    for name, value in tensors.items():
        part, rest = name.split(".", 1)
        if part == "follower":
            follower, rest = rest.split(".", 1)
            name = f"average{followers.index(follower)}.{rest}"
        elif part == "log_weight":
            old[f"average0.{name}"] = value / 2  # the average was of the whole student
            name = f"student.{name}"
        elif part == "optimizer":
            player, i, slot = rest.split(".")
            name = f"optimizer.{int(i) + (first if player == 'log_weight' else 0)}.{slot}"
        old[name] = value
    files.save_tensors(path, old, metadata)


@pytest.mark.parametrize(
    ("make", "followers"),
    [
        (denoising, ["average"]),
        (importance, ["average", "losses"]),
        (consistency, ["average", "target"]),
        (weighted, ["average"]),
    ],
    ids=["denoising", "importance", "consistency", "scm"],
)
def test_a_training_that_an_earlier_version_stopped_resumes_bit_for_bit(
    training, tmp_path, make, followers
):
    _, loop = training(make, "stopped")
    for line in loop:
        if line.iteration == 15:
            break
    loop.close()
    to_old(tmp_path / "stopped", followers)
    names = files.load_tensors(tmp_path / "stopped")[0].keys()
    assert {name.split(".")[0] for name in names} == {
        "student",
        "optimizer",
        *(f"average{i}" for i in range(len(followers))),
    }
    resumed, loop = training(make, "stopped")
    assert next(loop).iteration == 15
    list(loop)
    whole, loop = training(make, "whole")
    list(loop)
    for name, player in whole.players.items():
        mine, theirs = resumed.players[name].module.state_dict(), player.module.state_dict()
        assert checkpoint.weights_sha256(mine) == checkpoint.weights_sha256(theirs)
    states = [files.load_tensors(tmp_path / name)[0] for name in ("stopped", "whole")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_todays_state_is_left_as_it_is(training, tmp_path):
    _, loop = training(consistency, "state")
    next(loop)
    loop.close()
    tensors, _ = files.load_tensors(tmp_path / "state")
    assert older.state(tensors, {"student": 99}, ["average", "target"]) is tensors
