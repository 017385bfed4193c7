"""A teacher's settings for each dataset, and how any method's are chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from diffusion.config import FitConfig
from diffusion.networks import DiTConfig, NetworkConfig, UNetConfig, named

T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    net: UNetConfig
    teacher: FitConfig
    clamp: bool = True
    shift: float = 1.0
    """How far the angles of few steps are moved towards noise."""


# 2 CPU cores without bf16 units: teacher, students and comparison in ten minutes. Patches make the
# network 2.6 times as fast; with clamping as many images leave the teacher a third nearer.
DIGITS = Preset(
    net=UNetConfig(
        channels=1, size=8, width=32, multipliers=(1, 1), blocks=1, attention=(), patch=2
    ),
    teacher=FitConfig(iterations=1200, learning_rate=2e-3, ema=0.998),
)

# One GPU: a night at most; 2 CPU cores: fewer --iterations and a smaller --width.
FASHION_MNIST = Preset(
    net=UNetConfig(channels=1, size=28, width=64, multipliers=(1, 2, 2), blocks=2, attention=(7,)),
    teacher=FitConfig(iterations=40_000, learning_rate=5e-4, warmup=500, ema=0.9995),
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
)

# 2 CPU cores without bf16 units: teacher, halving and cd in an hour.
EMOJI = Preset(
    net=UNetConfig(
        channels=3, size=32, width=48, multipliers=(1, 2, 2), blocks=1, attention=(8,), patch=2
    ),
    teacher=FitConfig(minutes=25, batch_size=32, learning_rate=1e-3, ema=0.999),
    shift=2.0,
)

# The same images as patches of a transformer: by its size and patch, how many a side has at most.
# On a GPU it is Peebles & Xie's DiT-S; on a CPU a step on digits takes twice the U-Net's time.
DITS = {
    "digits": DiTConfig(size=8, width=64, depth=4, heads=2, patch=2),
    "fashion-mnist": DiTConfig(size=28, width=192, depth=6, heads=4, patch=4),
    "cifar10": DiTConfig(size=32, width=384, depth=12, heads=6, dropout=0.1, patch=2),
    "emoji": DiTConfig(size=32, width=128, depth=4, heads=4, patch=4),
    "folder": DiTConfig(size=32, width=128, depth=4, heads=4, dropout=0.1, patch=4),
    "folder, GPU": DiTConfig(size=64, width=384, depth=12, heads=6, dropout=0.1, patch=4),
}

PRESETS = {"digits": DIGITS, "fashion-mnist": FASHION_MNIST, "cifar10": CIFAR10, "emoji": EMOJI}

# Images that have another dataset's settings.
LIKE = {"emoji3": "emoji"}

# A folder of images has a budget in minutes, whatever their number.
FOLDERS = {
    "folder": FitConfig(minutes=30, batch_size=64, learning_rate=1e-3, ema=0.999),
    "folder, GPU": FitConfig(minutes=120, batch_size=128, learning_rate=2e-4, ema=0.999),
}


def for_data(presets: Mapping[str, T], data: str) -> T:
    """The dataset's entry; for a folder of images this machine's, `folder` or `folder, GPU`."""
    data = LIKE.get(data, data)
    folder = "folder, GPU" if torch.cuda.is_available() else "folder"
    return presets[data if data in PRESETS else folder]


def preset(data: str, size: int | None = None, channels: int = 3) -> Preset:
    """The dataset's settings; for a folder of images, settings that suit its size and this machine.

    size, channels: what the folder's images are brought to, or, for emoji, their size.
    """
    data = LIKE.get(data, data)
    if data in PRESETS:
        chosen = PRESETS[data]
        if data != "emoji" or size is None or size == chosen.net.size:
            return chosen
        patch = min(chosen.net.patch, max(1, chosen.net.patch * size // chosen.net.size))
        return replace(chosen, net=replace(chosen.net, size=size, patch=patch))
    gpu = torch.cuda.is_available()
    return folder_preset(size or (64 if gpu else 32), channels, gpu)


def folder_preset(size: int, channels: int, gpu: bool) -> Preset:
    """Settings for a folder of images.

    On a CPU the finest level has 16x16 patches if it can, so that half an hour shows every image
    of a few hundred some thousand times; on a GPU the network is CIFAR-10's. A patch has
    at most half as many numbers as the network is wide (`teachers.ddpm.grain`).
    """
    finest, width = (64, 128) if gpu else (16, 32)
    squares = (1, 2, 4, 8)
    patches = [p for p in squares if size % p == 0 and (p == 1 or 2 * channels * p**2 <= width)]
    patch = next((p for p in patches if size // p <= finest), patches[-1])
    multipliers = (1, 2, 2, 2) if gpu else (1, 2)
    levels = next(n for n in range(len(multipliers), 0, -1) if size // patch % 2 ** (n - 1) == 0)
    coarse = [size // patch >> level for level in range(levels)]
    net = UNetConfig(
        channels=channels,
        size=size,
        width=width,
        multipliers=multipliers[:levels],
        blocks=2 if gpu else 1,
        attention=tuple(n for n in coarse if n <= 16)[: 1 if gpu else 0],
        dropout=0.1,
        patch=patch,
    )
    return Preset(net=net, teacher=FOLDERS["folder, GPU" if gpu else "folder"], shift=2.0)


def network(name: str, data: str, chosen: Preset) -> NetworkConfig:
    """The network of that name for the preset's images: the preset's own if it is a U-Net."""
    if name == "unet":
        return chosen.net
    net = named(name, chosen.net.channels, chosen.net.size)
    if not isinstance(net, DiTConfig):
        return net
    usual, size = for_data(DITS, data), net.size
    most = usual.size // usual.patch
    patch = next(p for p in range(1, size + 1) if size % p == 0 and size // p <= most)
    return replace(usual, channels=net.channels, size=size, patch=patch)
