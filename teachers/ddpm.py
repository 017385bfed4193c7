"""Train a DDPM teacher: `python -m teachers.ddpm --data digits`."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
import tyro
from torch import Tensor

from diffusion import data as datasets
from diffusion.batches import Batch
from diffusion.checkpoint import Card
from diffusion.circle import add_noise, x0_loss
from diffusion.config import FitConfig, check
from diffusion.console import UserError, run
from diffusion.data import Dataset
from diffusion.denoiser import check_prediction
from diffusion.folders import check_claim
from diffusion.image_file import Form
from diffusion.machine import this_device
from diffusion.model import Model, build
from diffusion.networks import UNetConfig, check_net
from diffusion.noise import seed32
from diffusion.pace import passes_per_second
from diffusion.runs import settled, train_model
from diffusion.schedules import SCHEDULES, check_shift
from diffusion.training import Follower
from teachers.levels import ImportanceSampling, Levels, LossHistory, log_normal, uniform
from teachers.presets import preset
from teachers.variance import VariationalBound

T = TypeVar("T")

SOLVERS = (
    "ddim",
    "heun",
    "dpm-solver++",
    "unipc",
    "truncated",
    "stochastic",
    "ancestral",
    "predictor-corrector",
)


@dataclass(frozen=True)
class Denoising:
    """DDPM's objective (Ho et al. 2020, algorithm 1): recover x0 from x_t."""

    angles: Tensor
    """(N + 1,) float64, ascending from 0."""
    weighting: str = "v"
    levels: Levels = uniform
    averages: Sequence[Follower] = ()
    bound: VariationalBound | None = None
    """For a student that learns its variance, and learns that alone from this: L_hybrid of Nichol
    & Dhariwal 2021, eq. 16, with their lambda = 0.001."""

    def __call__(self, student, batch: Batch, progress: float) -> Tensor:
        t = self.levels(self.angles, batch.level)
        x_t = add_noise(batch.x0, batch.eps, t)
        if self.bound is None:
            return x0_loss(student(x_t, t, batch.label), batch.x0, t, self.weighting)
        x0, share = student(x_t, t, batch.label, variance=True)
        loss = x0_loss(x0, batch.x0, t, self.weighting)
        return loss + 0.001 * self.bound(x0.detach(), share, batch.x0, t)


def _importance(
    angles: Tensor, weighting: str, bound: VariationalBound | None = None
) -> ImportanceSampling:
    objective = Denoising(angles, weighting, bound=bound)
    return ImportanceSampling(objective, LossHistory().to(angles.device))


# Noise levels -> the objective, from angles, weighting and, for a learned variance, its bound.
OBJECTIVES = {
    "uniform": Denoising,
    "log-normal": partial(Denoising, levels=log_normal),
    "importance": _importance,
}


@dataclass(frozen=True)
class Options:
    """Train a teacher: a diffusion model of a dataset or of a folder of images (Ho et al. 2020)."""

    data: str = "digits"
    """The images to learn: digits, fashion-mnist, cifar10, or a folder, whose images are cropped to
    a square of --size with --channels."""
    data_dir: Path | None = None
    """The folder that holds a named dataset's files. If you give one, no other place is looked
    in."""
    background: str = "white"
    """The colour behind what is transparent in a folder's images: a name, or #rrggbb."""
    out: Path | None = None
    """The run's folder. If left out: runs/DATA/teacher."""
    schedule: Literal["linear", "cosine", "sigmoid", "karras", "vp", "sub-vp", "ve"] = "cosine"
    """How the 1000 noise levels are spread from little noise to pure noise."""
    levels: Literal["uniform", "log-normal", "importance"] = "uniform"
    """How often each noise level is trained. uniform: all alike; log-normal: mostly the middle
    (EDM, Karras et al. 2022); importance: more often where the loss is large, with less weight
    (Nichol & Dhariwal 2021)."""
    weighting: Literal["v", "truncated", "eps"] = "v"
    """How much each noise level counts in the loss, as a weight of x0's squared error. v: SNR + 1;
    truncated: max(SNR, 1); eps: SNR, as in DDPM's simple loss."""
    clamp: bool = True
    """Keep every predicted image between black and white, in training and in sampling. Images with
    much plain black or white come out cleaner."""
    shift: float = 1.0
    """Where students and solvers with few steps put them: above 1, more of them where noise is
    heavy, as larger images want. It multiplies the tangents of their angles. The teacher's training
    is the same."""
    net: UNetConfig = field(default_factory=UNetConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    @staticmethod
    def default(data: str = "digits", size: int | None = None, channels: int = 3) -> "Options":
        chosen = preset(data, size, channels)
        common = {"clamp": chosen.clamp, "shift": chosen.shift}
        return Options(data=data, net=chosen.net, fit=chosen.teacher, **common)


def load_data(options: Options) -> Dataset:
    """The dataset, after a check that the network's shape and the flip suit it."""
    net = options.net
    form = Form(net.size, net.channels, options.background)
    dataset = datasets.load(options.data, options.data_dir, form)
    spec = dataset.spec
    if (net.channels, net.size) != (spec.channels, spec.size):
        raise UserError(
            f"{spec.name} images have {spec.channels} channels and size {spec.size}, "
            f"but --channels is {net.channels} and --size is {net.size}: leave both out"
        )
    if net.num_classes not in (0, spec.num_classes):
        raise UserError(
            f"--num-classes must be 0 or {spec.num_classes} for {spec.name}, got {net.num_classes}"
        )
    if options.fit.flip and options.data == "digits":
        raise UserError("--flip would turn digits into other signs: leave it out for this dataset")
    return dataset


def train_teacher(options: Options) -> Model:
    """The teacher of these options: loaded where it is finished, else trained."""
    check(options.fit)
    check_net(options.net)
    check_shift(options.shift)
    out = options.out or run_folder(options.data) / "teacher"
    check_claim(out)
    options = replace(options, fit=settled(options.fit, out))
    dataset = load_data(options)
    angles = SCHEDULES[options.schedule]()
    check_prediction(options.net.prediction, angles)
    net = replace(options.net, bounds=dataset.spec.bounds if options.clamp else None)
    learned = net.learned_variance
    card = Card(
        method="teacher",
        sampler="ancestral-learned" if learned else "ancestral",
        plans={len(angles) - 1: angles.tolist()},
        solvers=(*SOLVERS, "ancestral-learned") if learned else SOLVERS,
        net=asdict(net),
        shift=options.shift,
        data=asdict(dataset.spec),
        training={name: getattr(options, name) for name in ("schedule", "levels", "weighting")},
    )
    torch.manual_seed(seed32(options.fit.seed))
    denoiser = build(net, options.fit.precision)
    angles = angles.to(this_device())
    bound = VariationalBound(angles, dataset.spec) if learned else None
    objective = OBJECTIVES[options.levels](angles, options.weighting, bound=bound)
    return train_model(
        out, denoiser, objective, dataset, options.fit, card, lambda: faster(net, options.fit)
    )


def faster(net: UNetConfig, fit: FitConfig) -> str:
    """Which smaller network would train faster here, and how much, by a few of its passes."""
    patch = max(
        net.patch, next(p for p in (4, 2, 1) if net.size % p == 0 and p <= max(1, net.size // 14))
    )
    levels = next(n for n in (2, 1) if net.size // patch % n == 0)
    multipliers = net.multipliers[:levels]
    small = replace(net, width=min(net.width, 32), patch=patch, attention=())
    small = replace(small, multipliers=multipliers, blocks=1)
    shape = (net.channels, net.size, net.size)
    mine, other = (
        passes_per_second(build(each, fit.precision).to(this_device()).train(), shape)
        for each in (net, small)
    )
    if other < 1.5 * mine:
        return ""
    shape = f"--width {small.width} --multipliers {' '.join(map(str, multipliers))} --blocks 1"
    return f"{shape} --patch {patch} --attention is {other / mine:.0f} times as fast"


def run_folder(data: str) -> Path:
    """runs/ and the last part of the data's name; of `.` and `..`, of the folder that they are."""
    return Path("runs") / Path(os.path.abspath(data)).name


def peek(flag: str, default: str) -> str:
    """The value of one option, before the others: their defaults depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, default=default)
    return getattr(parser.parse_known_args()[0], flag.strip("-"))


def parse(
    default: T, prog: str, arguments: Sequence[str] | None = None, description: str | None = None
) -> T:
    """Options of a training command, by --iterations or by --minutes; those left out are default's.

    arguments: the command line's by default; description: above the help, if not the options' own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = {word.split("=")[0] for word in arguments}
    if {"--iterations", "--minutes"} <= flags:
        raise UserError("--minutes is in place of --iterations: leave one of them out")
    if "--iterations" in flags:
        default = replace(default, fit=replace(default.fit, minutes=None))
    return tyro.cli(
        type(default),
        prog=prog,
        description=description,
        args=arguments,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def main() -> None:
    size, channels = (peek(name, "") for name in ("--size", "--channels"))
    shape = int(size) if size.isdecimal() else None, int(channels) if channels.isdecimal() else 3
    default = Options.default(peek("--data", "digits"), *shape)
    train_teacher(parse(default, "python -m teachers.ddpm"))


if __name__ == "__main__":
    run(main)
