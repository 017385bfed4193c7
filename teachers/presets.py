"""Settings that were measured to work, by dataset: what each command takes where it is told nothing."""

from dataclasses import dataclass, field, replace

from diffusion.config import FitConfig
from diffusion.networks import UNetConfig


@dataclass(frozen=True)
class Preset:
    net: UNetConfig
    teacher: FitConfig
    halving: FitConfig
    """One round of progressive distillation."""
    consistency: FitConfig
    continuous: FitConfig
    """Consistency in continuous time."""
    start_steps: int
    """Where progressive distillation begins."""
    clamp: bool = True
    shift: float = 1.0
    """Of the angles of few steps."""
    rounds: dict[int, float] = field(default_factory=dict)
    """Its students' step counts, with the shares of halving.iterations; none to halve down to 1."""


# 2 CPU cores: teacher, students and comparison in about 20 minutes.
DIGITS = Preset(
    net=UNetConfig(channels=1, size=8, width=32, multipliers=(1, 1), blocks=1, attention=()),
    teacher=FitConfig(iterations=1600, learning_rate=2e-3, ema=0.998),
    halving=FitConfig(iterations=400, learning_rate=1e-3, warmup=20, anneal="linear", ema=0.98),
    consistency=FitConfig(iterations=1000, learning_rate=2e-3, warmup=20, ema=0.99),
    # after distill.midtraining; at 5e-4 it walks away, and at this after more iterations
    continuous=FitConfig(iterations=300, learning_rate=1e-4, warmup=20, ema=0.99),
    start_steps=64,
    clamp=False,  # its published figures are without
    # few rounds from many steps beat halving from 32 at the same 1600 iterations
    rounds={8: 0.625, 4: 0.75, 2: 1.125, 1: 1.5},
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


def preset(data: str) -> Preset:
    """The dataset's; a folder of images takes CIFAR-10's without its flip."""
    if data in PRESETS:
        return PRESETS[data]
    names = ("teacher", "halving", "consistency", "continuous")
    return replace(CIFAR10, **{n: replace(getattr(CIFAR10, n), flip=False) for n in names})
