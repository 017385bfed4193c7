"""Matching of a teacher by another network: `python -m distill.match --teacher … --net unet`.

For a teacher whose own network cannot be trained, or should be another. What comes of it says at
every noise level what the teacher says, and is distilled in its place.
"""

from dataclasses import asdict, dataclass, replace

import torch

from diffusion import networks
from diffusion.checkpoint import Card
from diffusion.console import run
from diffusion.denoiser import DenoiserConfig
from diffusion.dry import check_memory
from diffusion.model import Model, build
from diffusion.noise import seed32
from diffusion.runs import train_model
from diffusion.training import one_network
from distill import shared
from distill.guidance import Guidance
from students.start import StudentOptions, begin, parse
from teachers.presets import network, preset


@dataclass(frozen=True)
class Options(StudentOptions):
    """Make a network of another architecture say what a teacher says, at every noise level.

    It takes as many calls as the teacher does. Distil it by any other method."""

    net: str = "unet"
    """The network: unet, dit (a transformer over patches), or module:PACKAGE.MODULE:CLASS, your own
    torch module, of the shape that teachers.ddpm chooses for such images."""


PRESETS = {data: Options(fit=fit) for data, fit in shared.FITS.items()}


def distill(options: Options) -> Model:
    """The matching network of these options: loaded where it is finished, else trained."""
    options, teacher, dataset, out = begin(options, "matched")
    data, (channels, size, _) = dataset.spec.name, teacher.shape
    net = replace(
        network(options.net, data, preset(data, size, channels)), channels=channels, size=size
    )
    net.check()
    check_memory(lambda: net.build(channels, teacher.kinds))
    torch.manual_seed(seed32(options.fit.seed))
    config = DenoiserConfig(bounds=teacher.denoiser.config.bounds)
    student = build(net, config, teacher.kinds, options.fit.precision)
    card, sampler = teacher.card, teacher.card.sampler.removesuffix("-learned")
    matched = Card(
        method="matched",
        plans=tuple(replace(each, sampler=sampler) for each in card.plans),
        abilities=tuple(each for each in card.abilities if each != "variance"),
        net=networks.to_json(net),
        denoiser=config.to_json(),
        condition=card.condition,
        codec=card.codec,
        shift=card.shift,
        shifted=card.shifted,
        data=asdict(teacher.spec),
        parent=teacher.sha256,
        origin=card.origin if card.parent else teacher.sha256,
    )
    objective = Guidance(teacher.denoiser, teacher.schedule.to(teacher.device))
    return train_model(out, one_network(student, objective), dataset, options.fit, matched)


def main() -> None:
    distill(parse(PRESETS, "python -m distill.match"))


if __name__ == "__main__":
    run(main)
