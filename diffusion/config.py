"""How a network is trained, whatever the objective: settings, and the learning rate they give."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from diffusion.console import UserError, check_limits
from diffusion.machine import compiler
from diffusion.noise import check_seed

ANNEAL = {
    "none": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass(frozen=True)
class FitConfig:
    """How a network is trained, whatever the objective."""

    iterations: int = 2000
    """Optimizer steps."""
    minutes: float | None = None
    """How long to train on this machine, in place of --iterations: their number follows from the
    pace of the first seconds, and is kept when the training resumes."""
    batch_size: int = 256
    """Images per step, over all processes together."""
    learning_rate: float = 1e-3
    """Adam's, after warm-up."""
    warmup: int = 100
    """Steps over which the learning rate rises from 0."""
    anneal: Literal["none", "linear", "cosine"] = "cosine"
    """How the learning rate falls to 0 at the end."""
    ema: float = 0.999
    """Decay of the weights' average that is kept; it ramps up from 0. 0 keeps the raw weights."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the network's passes; auto takes the faster one on this machine. Weights,
    sums and losses stay float32."""
    compile: bool = False
    """torch.compile the networks, the teacher's and the target's too; pays after a minute or two. On
    a CPU it takes a C++ compiler."""
    label_dropout: float = 0.1
    """Share of labels that a conditional model sees as its null class."""
    flip: bool = False
    """Mirror half of the images; only where that keeps their class."""
    seed: int = 0
    """Of all randomness, from 0 to 2^63 - 1: batch i is a function of (seed, i) alone."""
    log_every: int = 25
    """Steps between log lines; the only time that the loop waits for the device."""
    save_every: float = 30.0
    """Least seconds between saves of the state to resume from."""


LIMITS = {
    "iterations": ("at least 1", lambda n: n >= 1),
    "batch_size": ("at least 1", lambda n: n >= 1),
    "log_every": ("at least 1", lambda n: n >= 1),
    "learning_rate": ("above 0 and finite", lambda rate: 0 < rate < math.inf),
    "warmup": ("at least 0", lambda n: n >= 0),
    "weight_decay": ("at least 0 and finite", lambda decay: 0 <= decay < math.inf),
    "clip": ("above 0", lambda norm: norm > 0),
    "ema": ("in [0, 1)", lambda decay: 0 <= decay < 1),
    "label_dropout": ("in [0, 1]", lambda share: 0 <= share <= 1),
}


def check(config: FitConfig) -> None:
    """UserError for a setting that cannot be trained with."""
    check_limits(config, LIMITS)
    if config.minutes is not None and not 0 < config.minutes < math.inf:
        raise UserError(f"--minutes must be above 0, got {config.minutes:g}")
    check_seed(config.seed)
    check_compiler(config.compile)


def check_compiler(compile: bool) -> None:
    """UserError where torch.compile would find no compiler."""
    if compile and (reason := compiler()):
        raise UserError(
            f"--compile cannot work here: {reason}; install it (or name another C++ compiler in the "
            "environment's CXX), or leave --compile out"
        )


def learning_rate(config: FitConfig, i: int) -> float:
    """Of optimizer step i: a linear warm-up, then the annealing."""
    rising = min(1.0, (i + 1) / max(config.warmup, 1))
    return config.learning_rate * rising * ANNEAL[config.anneal](i / config.iterations)


def settings_of(config: FitConfig) -> dict:
    """The settings that decide the result, for a run to be recognised by when it resumes."""
    settings = asdict(config)
    for free in ("log_every", "save_every", "compile"):
        del settings[free]
    return settings
