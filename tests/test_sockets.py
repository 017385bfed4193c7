"""Sockets: each thing that the suite lets in, added from outside in this file alone."""

import hashlib
import json
import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion import files, runs
from diffusion.circle import rotate
from diffusion.codec import CODECS, Scale
from diffusion.condition import KINDS, Kinds
from diffusion.config import FitConfig
from diffusion.data import DATASETS, Source
from diffusion.images import Rows
from diffusion.model import load
from diffusion.networks import NETWORKS
from diffusion.noise import Noise
from diffusion.samplers import DENOISE, SOLVERS, Solver, descent, sample
from diffusion.schedules import cosine, even
from diffusion.training import Method, Player, fit
from distill import cd, progressive
from eval import compare
from students import generate
from teachers import ddpm
from tests import two_networks
from tests.analytic import BIMODAL, DATA, NOISE, normal
from tests.stopped import stopped_after

QUICK = FitConfig(iterations=20, batch_size=32, learning_rate=5e-3, warmup=5, precision="fp32")
COMPARE = "--no-long --no-times --num-images 80 --features random --likelihood 0 --steps 2"


# A method of two networks: tests/two_networks.py


def test_a_student_and_its_critic_come_near_a_mixture_in_one_call(tmp_path):
    fit = replace(QUICK, iterations=1000, batch_size=64, learning_rate=2e-3, ema=0.99)
    model = two_networks.distill(two_networks.Options(tmp_path / "run", fit))
    noise = Noise(1, torch.arange(64), (1, 8, 8))
    made = sample(model.denoiser, noise, "consistency", even(cosine(), 1)).flatten().double()
    levels = torch.linspace(-2, 1.5, 15, dtype=torch.float64)
    exact = BIMODAL.cdf(levels[:, None, None, None], DATA).flatten()
    reached = (made[:, None] < levels).double().mean(0)
    untrained = torch.special.ndtr(levels)
    assert (reached - exact).abs().max() < 0.14 < 0.2 < (untrained - exact).abs().max()


def test_two_networks_stopped_and_resumed_end_with_the_same_bits(tmp_path, monkeypatch):
    fit = replace(QUICK, iterations=30, log_every=4, save_every=0.0)

    def last_state(run: Path) -> dict[str, Tensor]:
        kept = {}

        def keep(path: Path) -> None:
            kept.update(files.load_tensors(path / "state" / "state.safetensors")[0])

        monkeypatch.setattr("diffusion.runs.tidy", keep)
        two_networks.distill(two_networks.Options(run, fit))
        return kept

    whole = last_state(tmp_path / "whole")
    monkeypatch.setattr(runs, "fit", stopped_after(3))
    with pytest.raises(KeyboardInterrupt):
        two_networks.distill(two_networks.Options(tmp_path / "stopped", fit))
    monkeypatch.undo()
    resumed = last_state(tmp_path / "stopped")
    assert {name.split(".")[0] for name in whole} == {"student", "critic", "optimizer", "follower"}
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = {name: whole[f"optimizer.{name}.0.step"] for name in ("student", "critic")}
    assert steps == {"student": 10, "critic": 20}


# A solver


def midpoint(denoise, noise, angles: Tensor) -> Tensor:
    """Second order: half a step, and the whole one by what is seen there."""
    x = next(noise)
    for t, s in descent(angles):
        middle = (t + s) / 2
        x_middle = rotate(x, denoise(x, t), t, middle)
        x = rotate(x, denoise(x_middle, middle), t, s)
    return denoise(x, angles[1])


@pytest.fixture
def with_midpoint(monkeypatch):
    monkeypatch.setitem(SOLVERS, "midpoint", Solver(midpoint, DENOISE, lambda n: 2 * n - 1))


def test_a_new_solver_is_of_its_order(with_midpoint):
    noise = torch.linspace(-3, 3, 61, dtype=torch.float64).reshape(-1, 1, 1, 1)
    last = torch.tensor(0.1, dtype=torch.float64)
    exact = BIMODAL(BIMODAL.flow(noise, NOISE, last), last)

    def error(num_steps: int) -> float:
        above = torch.linspace(0.1, math.pi / 2, num_steps, dtype=torch.float64)
        angles = torch.cat([DATA[None], above])
        x0 = sample(BIMODAL, iter([noise]), "midpoint", angles)
        return (x0 - exact).square().mean().sqrt().item()

    assert math.log2(error(256) / error(512)) == pytest.approx(2, abs=0.15)


def test_a_new_solver_runs_old_checkpoints_and_joins_the_table(
    with_midpoint, teacher, tmp_path, command
):
    options = generate.Options(teacher, num=4, steps=5, sampler="midpoint")
    assert generate.plan_of(load(teacher), options).num_steps == 3
    made = next(generate.generate(load(teacher), options))
    assert made.shape == (4, 1, 8, 8)
    arguments = [teacher, *COMPARE.split(), "--solvers", "midpoint", "--out", tmp_path / "table"]
    arguments[arguments.index("2")] = "5"
    done = command(compare.main, *arguments)
    assert done.code == 0, done.err
    assert "teacher, midpoint" in (tmp_path / "table" / "table.md").read_text()


# A network


@dataclass(frozen=True)
class MLPConfig:
    """A perceptron of the pixels and the angle."""

    channels: int = 1
    size: int = 8
    width: int = 64

    def check(self) -> None:
        pass

    def build(self, outputs: int, kinds: Kinds) -> nn.Module:
        return MLP(self, outputs, kinds)


class MLP(nn.Module):
    def __init__(self, config: MLPConfig, outputs: int, kinds: Kinds):
        super().__init__()
        self.config, self.outputs, self.kinds = config, outputs, kinds
        pixels = config.channels * config.size**2
        layers = [nn.Linear(pixels + 1 + len(kinds), config.width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(config.width, outputs * config.size**2))

    def forward(self, x_t: Tensor, t: Tensor, condition=None) -> Tensor:
        columns = [condition[name][:, None] for name in self.kinds]
        h = self.layers(torch.cat([x_t.flatten(1), t[:, None], *columns], dim=1))
        return h.reshape(len(x_t), self.outputs, *x_t.shape[2:])


@pytest.fixture
def with_mlp(monkeypatch):
    monkeypatch.setitem(NETWORKS, "mlp", MLPConfig)


def trained(out: Path, **options) -> Path:
    """A teacher's run of these options."""
    settings = {"net": MLPConfig(), "fit": QUICK, "out": out, **options}
    ddpm.train_teacher(ddpm.Options(**settings))
    return out


def test_a_new_network_is_trained_halved_distilled_generated_and_compared(
    with_mlp, tmp_path, command
):
    teacher = trained(tmp_path / "teacher")
    progressive.distill(progressive.Options(teacher, start_steps=4, rounds=(2,), fit=QUICK))
    cd.distill(cd.Options(teacher, loss=cd.Loss(num_angles=4), fit=QUICK))
    for run in ("teacher", "progressive/0002", "consistency"):
        model = load(tmp_path / run)
        assert isinstance(model.denoiser.net, MLP)
        assert model.card.net == {"name": "mlp", "channels": 1, "size": 8, "width": 64}
    arguments = [tmp_path / "progressive" / "0002", "--num", 4, "--out", tmp_path / "grid.png"]
    assert command(generate.main, *arguments).code == 0
    assert Image.open(tmp_path / "grid.png").size[0] > 100
    done = command(compare.main, tmp_path, *COMPARE.split())
    assert done.code == 0, done.err
    methods = {row["method"] for row in rows(tmp_path / "compare" / "results.jsonl")}
    assert methods == {"teacher", "progressive", "consistency-cd"}


def rows(path: Path) -> list[dict]:
    """The rows of a file of results, without its heads."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "method" in line]


def test_a_card_of_a_network_that_is_not_here_says_so(with_mlp, tmp_path, monkeypatch, command):
    teacher = trained(tmp_path / "teacher")
    monkeypatch.delitem(NETWORKS, "mlp")
    done = command(generate.main, teacher)
    assert done.code == 2
    assert "network is 'mlp', expected one of unet" in done.err


# A codec


@dataclass(frozen=True)
class Turned:
    """Scale, then colours turned about the axis of greys."""

    mean: float
    std: float
    turn: float = 2.0
    bounds = None
    grey_levels = None

    def matrix(self) -> Tensor:
        """Rodrigues' formula for the axis (1, 1, 1)."""
        axis = torch.full((3, 3), 1 / 3, dtype=torch.float64)
        cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / 3**0.5
        eye = torch.eye(3, dtype=torch.float64)
        turned = math.cos(self.turn) * (eye - axis) + axis + math.sin(self.turn) * cross
        return turned.float()

    def shape(self, pixels):
        return pixels

    def encode(self, images: Tensor) -> Tensor:
        x0 = Scale(self.mean, self.std).encode(images)
        return torch.einsum("ij,bjhw->bihw", self.matrix(), x0)

    def decode(self, x0: Tensor) -> Tensor:
        x0 = torch.einsum("ji,bjhw->bihw", self.matrix(), x0)
        return Scale(self.mean, self.std).decode(x0)

    @staticmethod
    def fitted(parts: Iterable[Tensor]) -> "Turned":
        scale = Scale.fitted(parts)
        return Turned(scale.mean, scale.std)


def test_a_new_codec_turns_colours_there_and_back_and_a_model_works_behind_it(
    with_mlp, tmp_path, monkeypatch, command
):
    monkeypatch.setitem(CODECS, "turned", Turned)
    photos = tmp_path / "photos"
    photos.mkdir()
    random = torch.Generator().manual_seed(0)
    for i in range(40):  # red, hardly green, no blue
        colour = torch.tensor([200.0, 60.0, 0.0]) + 20 * torch.randn(3, generator=random)
        pixels = colour.expand(8, 8, 3) + 10 * torch.randn(8, 8, 3, generator=random)
        pixels = pixels.clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(photos / f"{i}.png")
    fit = replace(QUICK, iterations=400)
    options = {"data": str(photos), "net": MLPConfig(3, 8), "codec": "turned", "fit": fit}
    model = load(trained(tmp_path / "teacher", **options))
    assert isinstance(model.codec, Turned)
    images = ddpm.load_data(ddpm.Options(**options)).train.images
    assert torch.equal(model.codec.decode(model.codec.encode(images)), images)
    assert (model.codec.encode(images) - Scale.fitted([images]).encode(images)).abs().max() > 1
    made = model.sample(model.plan(8, "unipc"), 0, torch.arange(64)).float()
    mean, exact = made.mean((0, 2, 3)), images.float().mean((0, 2, 3))
    assert (mean - exact).abs().max() < 45  # without the turn back some are off by 100
    done = command(compare.main, tmp_path / "teacher", *COMPARE.split())
    assert done.code == 0, done.err


# A source of images


class Stripes:
    """A billion images, each drawn from its number when it is asked for."""

    shape, device, slow = (1, 8, 8), torch.device("cpu"), True

    def __init__(self, count: int):
        self.count, self.asked = count, 0

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Tensor) -> Rows:
        self.asked += len(indices)
        phase = (indices.double() * 0.754877666) % 1 * 2 * math.pi
        row = torch.arange(8, dtype=torch.float64) * math.pi / 4
        wave = ((row + phase[:, None]).sin() * 100 + 128).to(torch.uint8)
        return Rows(wave[:, None, :, None].expand(-1, 1, 8, 8).contiguous(), {})

    def near(self, device: torch.device) -> "Stripes":
        return self

    def fingerprint(self) -> str:
        return hashlib.sha256(f"stripes {self.count}".encode()).hexdigest()


def test_a_source_that_no_memory_holds_is_trained_on_and_judged_by_a_stated_sample(
    with_mlp, tmp_path, monkeypatch, command
):
    train, test = Stripes(10**9), Stripes(50)
    monkeypatch.setitem(DATASETS, "stripes", lambda *places: Source(train, test, {}))
    monkeypatch.setattr("diffusion.images.SAMPLE", 1000)
    teacher = trained(tmp_path / "teacher", data="stripes")
    assert train.asked <= 1000 + 21 * 32
    done = command(compare.main, teacher, *COMPARE.split())
    assert done.code == 0, done.err
    first = json.loads((tmp_path / "compare" / "results.jsonl").read_text().splitlines()[0])
    assert (first["data"]["images"], first["data"]["of"]) == (1000, 10**9)


# A condition of another kind than a label


@dataclass(frozen=True)
class Brightness:
    """How bright an image is, (B,) float32 in [-1, 1]; 0 says nothing."""

    def null(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)

    def rows(self, indices: Tensor) -> Tensor:
        return (indices % 5 - 2) / 2


@dataclass(frozen=True)
class Lit:
    """Images of noise about a brightness that is known."""

    count: int = 500
    shape, device, slow = (1, 8, 8), torch.device("cpu"), False

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Tensor) -> Rows:
        brightness = (indices % 41 / 20 - 1).float()
        noise = normal(0, self.count, 1, 8, 8)[indices]
        images = (128 + 90 * brightness[:, None, None, None] + 10 * noise).clamp(0, 255)
        return Rows(images.to(torch.uint8), {"brightness": brightness})

    def near(self, device: torch.device) -> "Lit":
        return self

    def fingerprint(self) -> str:
        return hashlib.sha256(b"lit").hexdigest()


def test_a_new_kind_of_condition_is_obeyed_by_teacher_and_student_and_guides(
    with_mlp, tmp_path, monkeypatch
):
    monkeypatch.setitem(KINDS, "brightness", Brightness)
    source = Source(Lit(), Lit(50), {"brightness": Brightness()})
    monkeypatch.setitem(DATASETS, "lit", lambda *places: source)
    fit = replace(QUICK, iterations=400, batch_size=64)
    teacher = trained(tmp_path / "teacher", data="lit", fit=fit)
    cd.distill(cd.Options(teacher, loss=cd.Loss(num_angles=4), fit=replace(fit, iterations=150)))
    assert load(teacher).card.condition == {"brightness": {"kind": "brightness"}}

    def lightness(run: str, guidance: float | None = None) -> Tensor:
        model = load(tmp_path / run)
        plan = model.plan(4, None, guidance=guidance)
        images = model.sample(plan, 0, torch.arange(100)).float()
        return images.mean((1, 2, 3))

    asked = Brightness().rows(torch.arange(100)).double()
    for run in ("teacher", "consistency"):
        both = torch.stack([asked, lightness(run).double()])
        assert torch.corrcoef(both)[0, 1] > 0.9
    spread = [lightness("teacher", weight).std() for weight in (0.5, 1.0, 1.5)]
    assert spread[0] < spread[1] < spread[2]


# What the loop owes a method


class TwoHalves(nn.Module):
    """A network of which one half is never trained."""

    def __init__(self):
        super().__init__()
        self.still, self.moving = nn.Linear(1, 1), nn.Linear(1, 1)
        self.still.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.moving(self.still(x))


def halves(nets, batch, turn) -> Tensor:
    (mover,) = turn.movers
    return nets[mover](batch.x0[:, :, 0, 0]).square().mean(1)


def test_what_a_player_keeps_still_stays_so_whoevers_turn_it_is(digits, tmp_path):
    torch.manual_seed(0)
    players = {
        "student": Player(TwoHalves(), moves=lambda i: i % 2 == 0),
        "other": Player(TwoHalves(), moves=lambda i: i % 2 == 1),
    }
    before = deepcopy({name: player.module for name, player in players.items()})
    list(fit(Method(players, halves), digits, replace(QUICK, iterations=6), tmp_path / "state"))
    for name, player in players.items():
        assert torch.equal(player.module.still.weight, before[name].still.weight)
        assert not torch.equal(player.module.moving.weight, before[name].moving.weight)
        assert not player.module.still.weight.requires_grad


def test_the_average_moves_when_its_player_does_and_at_no_other_iteration(digits, tmp_path):
    """With a decay of 0 from then on it is the student; before its first turn, the beginning."""
    torch.manual_seed(0)
    players = {
        "student": Player(TwoHalves(), moves=lambda i: i % 4 == 3),
        "other": Player(TwoHalves(), moves=lambda i: i % 4 != 3),
    }
    config = replace(QUICK, iterations=4, log_every=1, ema=0.5, save_every=0.0)
    begun = players["student"].module.moving.weight.clone()
    for line in fit(Method(players, halves), digits, config, tmp_path / "state"):
        state = files.load_tensors(tmp_path / "state")[0]
        average, raw = (state[f"{part}.moving.weight"] for part in ("follower.average", "student"))
        share = 0.0 if line.iteration < 4 else 1 - 1 / 10  # the first of its ramp
        torch.testing.assert_close(average, begun.lerp(raw, share))


@pytest.mark.parametrize("names", [("other",), ("student", "optimizer")])
def test_a_method_without_a_student_or_with_the_loops_own_names_is_refused(names):
    with pytest.raises(ValueError, match="student"):
        Method({name: Player(TwoHalves()) for name in names}, halves)
