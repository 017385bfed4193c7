"""Settings for each dataset: the defaults of every command."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from diffusion.config import FitConfig
from diffusion.networks import UNetConfig


@dataclass(frozen=True)
class Preset:
    net: UNetConfig
    teacher: FitConfig
    halving: FitConfig
    """How one round of progressive distillation trains."""
    consistency: FitConfig
    continuous: FitConfig
    """How consistency in continuous time trains (--mode scm)."""
    start_steps: int
    """Steps of the teacher that progressive distillation begins with."""
    solver: Literal["euler", "heun"] = "euler"
    """How the teacher takes those steps."""
    distillation: FitConfig | None = None
    """How consistency distillation trains (--mode cd), where not as the other modes."""
    clamp: bool = True
    shift: float = 1.0
    """How far the angles of few steps are moved towards noise."""
    rounds: dict[int, float] = field(default_factory=dict)
    """Step counts of its students, with each one's share of halving.iterations. If empty: halve
    down to 1."""


# 2 CPU cores without bf16 units: teacher, students and comparison in ten minutes. Patches make the
# network 2.6 times as fast; with clamping the teacher's distance after as many images is a third less.
DIGITS = Preset(
    net=UNetConfig(
        channels=1, size=8, width=32, multipliers=(1, 1), blocks=1, attention=(), patch=2
    ),
    teacher=FitConfig(iterations=1200, learning_rate=2e-3, ema=0.998),
    halving=FitConfig(
        iterations=500, batch_size=128, learning_rate=1e-3, warmup=20, anneal="linear", ema=0.98
    ),
    consistency=FitConfig(iterations=1000, learning_rate=2e-3, warmup=20, ema=0.99),
    # from the teacher's step few large batches beat many small ones at as many images
    distillation=FitConfig(iterations=300, batch_size=512, learning_rate=3e-3, warmup=20, ema=0.99),
    # after distill.midtraining; at 5e-4 it walks away, and at this after more iterations
    continuous=FitConfig(iterations=300, learning_rate=1e-4, warmup=20, ema=0.99),
    # 16 steps of Heun are a better teacher than 32 of DDIM; every round inherits the first one's errors
    start_steps=16,
    solver="heun",
    rounds={8: 0.9, 4: 1.2, 2: 0.6, 1: 0.7},
)

# One GPU: a night at most; 2 CPU cores: fewer --iterations and a smaller --width.
FASHION_MNIST = Preset(
    net=UNetConfig(channels=1, size=28, width=64, multipliers=(1, 2, 2), blocks=2, attention=(7,)),
    teacher=FitConfig(iterations=40_000, learning_rate=5e-4, warmup=500, ema=0.9995),
    halving=FitConfig(iterations=2500, learning_rate=2e-4, warmup=50, anneal="linear", ema=0.99),
    consistency=FitConfig(iterations=20_000, learning_rate=2e-4, warmup=200, ema=0.999),
    continuous=FitConfig(iterations=20_000, learning_rate=1e-4, warmup=200, ema=0.999),
    start_steps=64,
    shift=2.0,
)

CIFAR10 = Preset(
    net=UNetConfig(
        channels=3,
        size=32,
        width=128,
        multipliers=(1, 2, 2, 2),
        blocks=2,
        attention=(16,),
        dropout=0.1,
    ),
    teacher=FitConfig(
        iterations=400_000, batch_size=128, learning_rate=2e-4, warmup=5000, ema=0.9999, flip=True
    ),
    halving=FitConfig(
        iterations=25_000,
        batch_size=128,
        learning_rate=1e-4,
        warmup=500,
        anneal="linear",
        flip=True,
    ),
    consistency=FitConfig(
        iterations=200_000, batch_size=128, learning_rate=1e-4, warmup=1000, ema=0.9999, flip=True
    ),
    continuous=FitConfig(
        iterations=200_000, batch_size=128, learning_rate=1e-4, warmup=1000, ema=0.9999, flip=True
    ),
    start_steps=1000,
)

PRESETS = {"digits": DIGITS, "fashion-mnist": FASHION_MNIST, "cifar10": CIFAR10}


def preset(data: str, size: int | None = None, channels: int = 3) -> Preset:
    """The dataset's settings; for a folder of images, settings that suit its size and this machine.

    size, channels: what the folder's images are brought to.
    """
    if data in PRESETS:
        return PRESETS[data]
    gpu = torch.cuda.is_available()
    return folder_preset(size or (64 if gpu else 32), channels, gpu)


def folder_preset(size: int, channels: int, gpu: bool) -> Preset:
    """Settings for a folder of images: a budget in minutes, whatever their number.

    On a CPU the finest level has at most 16x16 patches, so that half an hour shows every image
    of a few hundred some thousand times; on a GPU the network is CIFAR-10's.
    """
    finest = 64 if gpu else 16
    patches = [p for p in (1, 2, 4, 8) if size % p == 0]
    patch = next((p for p in patches if size // p <= finest), patches[-1])
    wanted = (1, 2, 2, 2) if gpu else (1, 2)
    levels = next(n for n in range(len(wanted), 0, -1) if size // patch % 2 ** (n - 1) == 0)
    coarse = [size // patch >> level for level in range(levels)]
    net = UNetConfig(
        channels=channels,
        size=size,
        width=128 if gpu else 64,
        multipliers=wanted[:levels],
        blocks=2 if gpu else 1,
        attention=tuple(n for n in coarse if n <= 16)[: 1 if gpu else 0],
        dropout=0.1,
        patch=patch,
    )
    batch_size = 128 if gpu else 64

    def fit(minutes: float, rate: float, ema: float, anneal: str = "cosine") -> FitConfig:
        return FitConfig(
            minutes=minutes, batch_size=batch_size, learning_rate=rate, ema=ema, anneal=anneal
        )

    return Preset(
        net=net,
        teacher=fit(120 if gpu else 30, 2e-4 if gpu else 1e-3, 0.999),
        halving=fit(60 if gpu else 20, 2e-4 if gpu else 5e-4, 0.99, "linear"),
        consistency=fit(60 if gpu else 15, 2e-4 if gpu else 5e-4, 0.99),
        continuous=fit(60 if gpu else 15, 1e-4, 0.99),
        start_steps=64,
        rounds={8: 0.625, 4: 0.75, 2: 1.125, 1: 1.5},
        shift=2.0,
    )
