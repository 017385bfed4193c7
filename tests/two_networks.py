"""A method of two networks, in one file, as one adds it from outside.

Distribution matching on a mixture whose denoiser is known (Yin et al. 2024): a critic learns to
denoise what the student makes, and the student moves to where the teacher and the critic agree.
`python -m tests.two_networks --out RUN` trains it as any command of the suite does.
"""

import math
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from diffusion import codec, data
from diffusion.batches import Batch
from diffusion.checkpoint import Card
from diffusion.circle import add_noise, x0_loss
from diffusion.condition import Kinds
from diffusion.config import FitConfig
from diffusion.console import run
from diffusion.denoiser import DenoiserConfig
from diffusion.model import Model, build
from diffusion.networks import NETWORKS, to_json
from diffusion.plan import Plan
from diffusion.runs import train_model
from diffusion.training import Method, Nets, Player, Turn
from tests.analytic import BIMODAL, NOISE


@dataclass(frozen=True)
class PixelConfig:
    """A network that sees each pixel by itself."""

    channels: int = 1
    size: int = 8
    width: int = 32

    def check(self) -> None:
        pass

    def build(self, outputs: int, kinds: Kinds) -> nn.Module:
        return Pixels(self, outputs)


class Pixels(nn.Module):
    def __init__(self, config: PixelConfig, outputs: int):
        super().__init__()
        self.config, widths = config, (config.channels + 1, config.width, config.width)
        layers = [(nn.Conv2d(a, b, 1), nn.SiLU()) for a, b in pairwise(widths)]
        layers = [module for pair in layers for module in pair]
        self.layers = nn.Sequential(*layers, nn.Conv2d(config.width, outputs, 1))

    def forward(self, x_t: Tensor, t: Tensor, condition=None) -> Tensor:
        angle = t[:, None, None, None].expand(-1, 1, *x_t.shape[2:])
        return self.layers(torch.cat([x_t, angle], dim=1))


NETWORKS["pixels"] = PixelConfig


@dataclass(frozen=True)
class Matching:
    """The loss of whose turn it is."""

    angles: tuple[float, float] = (0.2, 1.4)
    """The least and the greatest at which teacher and critic are compared."""

    def __call__(self, nets: Nets, batch: Batch, turn: Turn) -> Tensor:
        low, high = self.angles
        t = low + (high - low) * batch.level
        eps = batch.eps.flip(-1)  # another pixel's: each pixel is an image of its own
        critic_moves = turn.movers == ("critic",)
        with torch.set_grad_enabled(not critic_moves):
            x0 = nets["student"](batch.eps, NOISE)
        x_t = add_noise(x0, eps, t)
        if critic_moves:
            return x0_loss(nets["critic"](x_t, t), x0, t, "v")
        with torch.no_grad():
            gap = nets["critic"](x_t, t) - BIMODAL(x_t, t)
        return (x0 - (x0 - gap).detach()).square().flatten(1).mean(1) / 2


def method(student: nn.Module, critic: nn.Module) -> Method:
    """Two steps of the critic to one of the student."""
    players = {
        "student": Player(student, moves=lambda i: i % 3 == 2),
        "critic": Player(critic, moves=lambda i: i % 3 != 2, rate=2.0),
    }
    return Method(players, Matching())


@dataclass(frozen=True)
class Options:
    out: Path
    fit: FitConfig = field(default_factory=FitConfig)


def distill(options: Options) -> Model:
    dataset = data.load("digits")
    net, config = PixelConfig(), DenoiserConfig()
    torch.manual_seed(options.fit.seed)
    student, critic = (build(net, config, {}, options.fit.precision) for _ in range(2))
    card = Card(
        method="matching",
        plans=(Plan("consistency", (0.0, math.pi / 2)),),
        abilities=("jump",),
        net=to_json(net),
        denoiser=config.to_json(),
        condition={},
        codec=codec.to_json(dataset.codec),
        data=asdict(dataset.spec),
    )
    return train_model(options.out, method(student, critic), dataset, options.fit, card)


def main() -> None:
    distill(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    run(main)
