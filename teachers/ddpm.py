"""Train a DDPM teacher: `python -m teachers.ddpm --data digits`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

import torch
import tyro
from torch import Tensor, nn

from diffusion import autoencoder, condition, networks
from diffusion import codec as codecs
from diffusion import data as datasets
from diffusion.batches import Batch
from diffusion.captions import EncoderPlace
from diffusion.checkpoint import Card, Training
from diffusion.circle import add_noise, x0_loss
from diffusion.codec import Scale
from diffusion.condition import Kinds, Small
from diffusion.config import FitConfig, check
from diffusion.console import UserError, at_least, run, say
from diffusion.data import Dataset
from diffusion.denoiser import DenoiserConfig, check_prediction
from diffusion.dry import check_memory, check_output
from diffusion.folders import check_claim
from diffusion.image_file import Aspect, Form
from diffusion.images import parts
from diffusion.machine import this_device
from diffusion.model import Model, build
from diffusion.networks import DiTConfig, NetworkConfig, UNetConfig
from diffusion.noise import seed32
from diffusion.pace import passes_per_second
from diffusion.plan import plan
from diffusion.registry import Entry
from diffusion.runs import settled, train_model
from diffusion.schedules import SCHEDULES, check_shift
from diffusion.training import Followers, one_network
from teachers.levels import ImportanceSampling, Levels, LossHistory, log_normal, uniform
from teachers.presets import network, preset
from teachers.variance import VariationalBound


class TrainingOptions(Entry, Protocol):
    """A training command's options."""

    @property
    def fit(self) -> FitConfig:
        """How the network is trained."""


T = TypeVar("T", bound=TrainingOptions)

if TYPE_CHECKING:
    AnyNetwork = NetworkConfig
else:  # tyro then has the options of the default's type
    AnyNetwork = Any


@dataclass(frozen=True)
class Denoising:
    """DDPM's objective (Ho et al. 2020, algorithm 1): recover x0 from x_t."""

    angles: Tensor
    """(N + 1,) float64, ascending from 0."""
    weighting: str = "v"
    levels: Levels = uniform
    followers: Followers = field(default_factory=dict)
    bound: VariationalBound | None = None
    """For a student that learns its variance, and learns that alone from this: L_hybrid of Nichol
    & Dhariwal 2021, eq. 16, with their lambda = 0.001."""

    def __call__(self, student: nn.Module, batch: Batch, progress: float) -> Tensor:
        t = self.levels(self.angles, batch.level)
        x_t = add_noise(batch.x0, batch.eps, t)
        predict = partial(student, x_t, t, batch.condition, dropout=batch.dropout())
        if self.bound is None:
            return x0_loss(predict(), batch.x0, t, self.weighting)
        x0, share = predict(variance=True)
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
    """The images to learn: digits, fashion-mnist, cifar10, emoji (32x32, or --size 64), emoji3
    (these and OpenMoji's), or a folder, whose images are brought to a square of --size with
    --channels; hf:FOLDER for a dataset of Hugging Face's library, wds:FOLDER for WebDataset's
    shards."""
    data_dir: Path | None = None
    """The folder that holds a named dataset's files. If you give one, no other place is looked
    in."""
    background: str = "white"
    """The colour behind what is transparent in a folder's images: a name, or #rrggbb."""
    aspect: Annotated[Aspect, tyro.conf.arg(name="fit")] = "crop"
    """What becomes of a folder's images that are no squares. crop: their middle is taken; pad: all
    is, and --background lies beside it."""
    out: Path | None = None
    """The run's folder. If left out: runs/DATA/teacher; with --from-size 16 runs/DATA/from-16."""
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
    """Where students and solvers put their few steps: above 1, more of them where noise is heavy,
    as larger images need. It multiplies the tangents of their angles, and changes nothing in the
    teacher's training."""
    num_classes: int = 0
    """How many classes the model can be asked for; 0: none. Only data with labels has them, and a
    folder, whose own folders are the classes then."""
    text_encoder: Path | None = None
    """The folder of a Hugging Face text encoder, which turns the images' captions into what the
    model is told: in a folder from metadata.jsonl, metadata.csv or a .txt beside each image; of
    emoji their names. If left out: captions are not read."""
    from_size: int = 0
    """Make a model that refines images of this size to --size, for students.generate --then: it is
    told a smaller version of each image, with some noise (Ho et al. 2021). 0: none."""
    codec: str = "scale"
    """What the network sees. scale: the pixels; an autoencoder, which is a run of
    teachers.autoencoder or diffusers:FOLDER: its latents, which are fewer, so that larger images
    cost less (Rombach et al. 2022)."""
    net: AnyNetwork = field(default_factory=UNetConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    @staticmethod
    def default(
        data: str = "digits",
        size: int | None = None,
        channels: int = 3,
        net: str = "unet",
        codec: str = "scale",
    ) -> "Options":
        chosen = preset(data, size, channels)
        shape = network(net, data, chosen)
        if autoencoder.is_place(codec) and isinstance(shape, UNetConfig | DiTConfig):
            # a patch of latents as large as it was, in pixels
            patch = max(1, shape.patch // autoencoder.load(codec).factor)
            shape = replace(shape, patch=patch)
        fit, clamp, shift = chosen.teacher, chosen.clamp, chosen.shift
        return Options(data=data, clamp=clamp, shift=shift, codec=codec, net=shape, fit=fit)


@dataclass(frozen=True)
class Command(Options):
    __doc__ = Options.__doc__

    network: Annotated[str, tyro.conf.arg(name="net", metavar="NAME")] = "unet"
    """The network: unet, dit (a transformer over patches), or module:PACKAGE.MODULE:CLASS, your own
    torch module. Each has options of its own, shown last: --net dit --help."""


def load_data(options: Options) -> Dataset:
    """The dataset, after a check that the network's shape and the flip suit it."""
    net, codec, classes = options.net, options.codec, options.num_classes > 0
    form = Form(net.size, net.channels, options.background, options.aspect)
    encoder = EncoderPlace(options.text_encoder) if options.text_encoder else None
    place = options.data, options.data_dir
    dataset = datasets.load(*place, form, codec=codec, classes=classes, encoder=encoder)
    spec, (channels, size, _) = dataset.spec, dataset.spec.shape
    if (net.channels, net.size) != (channels, size):
        raise UserError(
            f"{spec.name} images have {channels} channels and size {size}, but --channels is "
            f"{net.channels} and --size is {net.size}: leave both out"
        )
    if options.num_classes and not dataset.num_classes:
        raise UserError(
            f"--num-classes {options.num_classes} needs images with labels, and {spec.name} has "
            "none: leave it out"
        )
    if options.num_classes not in (0, dataset.num_classes):
        raise UserError(
            f"--num-classes must be 0 or {dataset.num_classes} for {spec.name}, got "
            f"{options.num_classes}"
        )
    if options.fit.flip and options.data == "digits":
        raise UserError("--flip would turn digits into other signs: leave it out for this dataset")
    return dataset


def kinds_of(options: Options, dataset: Dataset) -> Kinds:
    """The conditions that the model takes: all that is known of the images, labels if asked for."""
    kinds = {k: kind for k, kind in dataset.kinds.items() if k != "label" or options.num_classes}
    if options.from_size:
        kinds["small"] = small_of(options.from_size, dataset)
    return kinds


def small_of(size: int, dataset: Dataset) -> Small:
    """The small images of that size, in the scale of the training images."""
    channels, whole, _ = dataset.spec.shape
    if not 0 < size < whole or whole % size:
        divisors = [str(side) for side in range(1, whole) if whole % side == 0]
        raise UserError(
            f"--from-size must divide the images' size {whole}: expected one of "
            f"{', '.join(divisors)}, got {size}"
        )
    scale = Scale.fitted(parts(dataset.train))
    return Small(channels, size, scale.mean, scale.std)


def train_teacher(options: Options) -> Model:
    """The teacher of these options: loaded where it is finished, else trained."""
    check(options.fit)
    at_least(0, options, "num_classes")
    check_shift(options.shift)
    run = f"from-{options.from_size}" if options.from_size else "teacher"
    out = options.out or run_folder(options.data) / run
    check_claim(out)
    options = replace(options, fit=settled(options.fit, out))
    dataset = load_data(options)
    codec, kinds = dataset.codec, kinds_of(options, dataset)
    channels, size, _ = codec.shape(dataset.spec.shape)
    options = replace(options, net=replace(options.net, channels=channels, size=size))
    options.net.check()
    outputs, image = channels * (1 + options.denoiser.learned_variance), (channels, size, size)
    check_memory(lambda: options.net.build(outputs, kinds))
    check_output(lambda: options.net.build(outputs, kinds), image, outputs, kinds)
    angles = SCHEDULES[options.schedule]()
    check_prediction(options.denoiser.prediction, angles)
    if words := grain(options.net, options.denoiser.prediction):
        say(words)
    config = replace(options.denoiser, bounds=codec.bounds if options.clamp else None)
    learned, grey_levels = config.learned_variance, codec.grey_levels
    if learned and not grey_levels:
        raise UserError(
            f"--learned-variance needs images in grey levels, which --codec {options.codec} has not"
        )
    card = Card(
        method="teacher",
        plans=(plan("ancestral-learned" if learned else "ancestral", angles),),
        abilities=("denoise", "variance") if learned else ("denoise",),
        net=networks.to_json(options.net),
        denoiser=config.to_json(),
        condition=condition.to_json(kinds),
        codec=codecs.to_json(codec),
        shift=options.shift,
        data=asdict(dataset.spec),
        training=Training(
            schedule=options.schedule, levels=options.levels, weighting=options.weighting
        ),
    )
    torch.manual_seed(seed32(options.fit.seed))
    denoiser = build(options.net, config, kinds, options.fit.precision)
    angles = angles.to(this_device())
    bound = VariationalBound(angles, grey_levels) if learned and grey_levels else None
    objective = OBJECTIVES[options.levels](angles, options.weighting, bound=bound)
    method = one_network(denoiser, objective)
    advice = partial(faster, options.net, options.fit)
    return train_model(out, method, dataset, options.fit, card, advice)


def grain(net: NetworkConfig, prediction: str) -> str:
    """What to do where images would keep grain, as the network is narrow for its patches.

    v and eps hold the noise of every number of a patch, and the network has to carry it beside what
    it knows of the image: fewer dimensions cannot, and as many did not learn to (docs/latents.md).
    x0 lies near fewer (Li & He 2025, arXiv 2511.13720).
    """
    if prediction == "x0" or not isinstance(net, UNetConfig | DiTConfig):
        return ""
    numbers = net.channels * net.patch**2
    if net.patch == 1 or 2 * numbers <= net.width:
        return ""
    return (
        f"a patch of {net.patch}x{net.patch} holds {numbers} numbers, and the network is only "
        f"{net.width} wide: noise that it cannot carry stays in the images as grain; give a "
        "smaller --patch or a larger --width"
    )


def faster(net: NetworkConfig, fit: FitConfig) -> str:
    """Which smaller network would train faster here, and how much, by a few of its passes."""
    smaller = getattr(net, "smaller", None)
    if smaller is None:
        return ""
    small, shape = smaller(), (net.channels, net.size, net.size)
    mine, other = (
        passes_per_second(
            build(each, DenoiserConfig(), {}, fit.precision).to(this_device()).train(), shape
        )
        for each in (net, small)
    )
    return f"{small.flags()} is {other / mine:.0f} times as fast" if other >= 1.5 * mine else ""


def run_folder(data: str) -> Path:
    """runs/ and the data's name, or that of the folder that they lie in."""
    return Path("runs") / datasets.title(data)


def peek(flag: str, default: str) -> str:
    """The value of one option, before the others: their defaults depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, default=default)
    return getattr(parser.parse_known_args()[0], flag.strip("-"))


def parse(
    default: T, prog: str, arguments: Sequence[str] | None = None, description: str | None = None
) -> T:
    """Options of a training command, by --iterations or by --minutes; those left out are default's.

    arguments: the command line's by default. description: above the help, in place of the options'.
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
    net, codec = peek("--net", "unet"), peek("--codec", "scale")
    default = Options.default(peek("--data", "digits"), *shape, net, codec)
    train_teacher(parse(Command(**vars(default), network=net), "python -m teachers.ddpm"))


if __name__ == "__main__":
    run(main)
