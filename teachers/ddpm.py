"""Train a DDPM teacher: `python -m teachers.ddpm --data digits`."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from diffusion import data as datasets
from diffusion.batches import Batch
from diffusion.checkpoint import Card
from diffusion.circle import add_noise, x0_loss
from diffusion.config import FitConfig
from diffusion.console import UserError, run
from diffusion.data import Dataset
from diffusion.denoiser import check_prediction
from diffusion.image_file import Form
from diffusion.model import Model, build, this_device
from diffusion.networks import UNetConfig
from diffusion.runs import train_model
from diffusion.schedules import SCHEDULES, check_shift
from diffusion.training import Follower
from teachers.levels import ImportanceSampling, Levels, LossHistory, log_normal, uniform
from teachers.presets import preset
from teachers.variance import VariationalBound

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
    """Train a DDPM teacher on a dataset, or on a folder of images."""

    data: str = "digits"
    """digits, fashion-mnist, cifar10, or a folder of images (cropped to --size, of --channels)."""
    data_dir: Path | None = None
    """The folder that holds a named dataset's files: the only place that is looked in then."""
    background: str = "white"
    """The colour behind what is transparent in a folder's images: a name, or #rrggbb."""
    out: Path | None = None
    """The run's folder; runs/DATA/teacher unless told."""
    schedule: Literal["linear", "cosine", "sigmoid", "karras", "vp", "sub-vp", "ve"] = "cosine"
    """The 1000 noise levels."""
    levels: Literal["uniform", "log-normal", "importance"] = "uniform"
    """How often each is trained: all alike; as EDM; or where the loss is large, and weighted less."""
    weighting: Literal["v", "truncated", "eps"] = "v"
    """Of the loss: SNR + 1, max(SNR, 1), or SNR as in DDPM's simple loss (all as weights of x0's)."""
    clamp: bool = True
    """Clamp every x0 to the range of images, in training and in sampling: a sharper black and white."""
    shift: float = 1.0
    """Of the angles of few steps, its students' and its solvers' (not of its training): their tangents
    are multiplied by this. Above 1, more steps where noise is heavy, as larger images want."""
    net: UNetConfig = field(default_factory=UNetConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    @staticmethod
    def default(data: str = "digits") -> "Options":
        chosen = preset(data)
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
            f"but --channels is {net.channels} and --size {net.size}"
        )
    if net.num_classes not in (0, spec.num_classes):
        raise UserError(
            f"--num-classes must be 0 or {spec.num_classes} for {spec.name}, got {net.num_classes}"
        )
    if options.fit.flip and options.data == "digits":
        raise UserError("--flip would turn digits into other signs: it is not for this dataset")
    return dataset


def train_teacher(options: Options) -> Model:
    """The teacher of these options: loaded where it is finished, else trained."""
    check_shift(options.shift)
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
    torch.manual_seed(options.fit.seed)
    denoiser = build(net, options.fit.precision)
    angles = angles.to(this_device())
    bound = VariationalBound(angles, dataset.spec) if learned else None
    objective = OBJECTIVES[options.levels](angles, options.weighting, bound=bound)
    out = options.out or run_folder(options.data) / "teacher"
    return train_model(out, denoiser, objective, dataset, options.fit, card)


def run_folder(data: str) -> Path:
    """runs/ and the last part of the data's name; of `.` and `..`, of the folder that they are."""
    return Path("runs") / Path(os.path.abspath(data)).name


def peek(flag: str, default: str) -> str:
    """The value of one option, before the others: their defaults depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, default=default)
    return getattr(parser.parse_known_args()[0], flag.strip("-"))


def main() -> None:
    options = Options.default(peek("--data", "digits"))
    config = (tyro.conf.OmitArgPrefixes,)
    train_teacher(tyro.cli(Options, prog="python -m teachers.ddpm", default=options, config=config))


if __name__ == "__main__":
    run(main)
