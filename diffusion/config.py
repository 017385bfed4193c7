"""How a network is trained, whatever the objective: settings, and the learning rate they give."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from diffusion.console import Limits, UserError, check_limits, count
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
    """Training steps: one batch and one update of the weights each."""
    minutes: float | None = None
    """How many minutes to train on this machine, in place of --iterations. The first seconds say
    how many iterations fit; a training that resumes keeps that number."""
    batch_size: int = 256
    """Images of a training step, over all processes together."""
    accumulate: int = 1
    """In how many parts, one after another, each process takes its images of a step: the gradients
    add up to those of the whole batch, in as much less memory."""
    learning_rate: float = 1e-3
    """How large the steps of the optimizer (Adam) are, after the warm-up."""
    warmup: int = 100
    """First steps, over which the learning rate rises from 0."""
    anneal: Literal["none", "linear", "cosine"] = "cosine"
    """How the learning rate falls towards 0 over the training; none: it stays."""
    ema: float = 0.999
    """How slowly the average of the weights follows them; the average is what is kept. It starts
    faster. 0 keeps the last weights themselves."""
    clip: float = 1.0
    """Largest norm of a gradient; longer ones are cut to it."""
    weight_decay: float = 0.0
    """How strongly weights are pulled towards 0 (AdamW's decoupled weight decay)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the network's passes. auto: the faster one on this machine, measured once.
    Weights, sums and losses are float32 in any case."""
    compile: bool = False
    """Compile the networks by torch.compile: slower to start by a minute or two, faster from then
    on. On a CPU it needs a C++ compiler."""
    label_dropout: float = 0.1
    """Share of the images whose class or caption a conditional model is not told, which guidance
    needs."""
    flip: bool = False
    """Mirror half of the images. Use it where a mirrored image is as good as the other."""
    seed: int = 0
    """Seed of all randomness, from 0 to 2^63 - 1. The same seed gives the same weights on the same
    machine."""
    log_every: int = 25
    """Steps from one log line to the next. At these alone the loop waits for the device."""
    save_every: float = 30.0
    """Seconds, at least, from one save to the next of what a stopped training resumes from."""


LIMITS: Limits = {
    "minutes": ("above 0, at most 1e6", lambda minutes: minutes is None or 0 < minutes <= 1e6),
    "iterations": count(1, 10**12),
    "batch_size": count(1),
    "accumulate": count(1),
    "log_every": count(1, 10**12),
    "save_every": ("at least 0", lambda seconds: seconds >= 0),
    "learning_rate": ("above 0, at most 1000", lambda rate: 0 < rate <= 1000),
    "warmup": count(0, 10**12),
    "weight_decay": ("at least 0, at most 1000", lambda decay: 0 <= decay <= 1000),
    "clip": ("above 0", lambda norm: norm > 0),
    "ema": ("in [0, 1)", lambda decay: 0 <= decay < 1),
    "label_dropout": ("in [0, 1]", lambda share: 0 <= share <= 1),
}


def check(config: FitConfig) -> None:
    """UserError for a setting that cannot be trained with."""
    check_limits(config, LIMITS)
    check_seed(config.seed)
    check_compiler(config.compile)


def check_compiler(compile: bool) -> None:
    """UserError where torch.compile would find no compiler."""
    if compile and (reason := compiler()):
        raise UserError(
            f"--compile cannot work here: {reason}; install it (or name another C++ compiler in "
            "the environment's CXX), or leave --compile out"
        )


def learning_rate(config: FitConfig, i: int) -> float:
    """The learning rate of optimizer step i: a linear warm-up, then the annealing."""
    rising = min(1.0, (i + 1) / max(config.warmup, 1))
    return config.learning_rate * rising * ANNEAL[config.anneal](i / config.iterations)


def settings_of(config: FitConfig) -> dict:
    """The settings that decide the result, for a run to be recognised by when it resumes."""
    settings = asdict(config)
    for free in ("accumulate", "log_every", "save_every", "compile"):
        del settings[free]
    return settings
