"""Our samplers against diffusers' schedulers, on one network: `python -m benchmarks.schedulers`.

Both take the same timesteps of DDPM's linear-beta schedule from the same noise, the network being
told the angle. Shown is the largest difference of any pixel of x0, whose deviation is about 1.
Theirs keep their tables in float32. Their Heun is the trapezoid rule in sigma, ours in cot t, so
the two are not compared; Euler in sigma (Karras et al. 2022) is DDIM.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import tyro
from torch import Tensor

from benchmarks.theirs import diffusers
from diffusion.circle import FROM_X0
from diffusion.console import out, run
from diffusion.denoiser import Denoiser
from diffusion.networks import UNet, UNetConfig
from diffusion.samplers import Denoise, sample
from diffusion.schedules import linear_beta, respace

# betas from 0.0001 to 0.02, taken from the last timestep on
LINEAR = {"beta_schedule": "linear", "timestep_spacing": "trailing"}
PEERS = {
    "ddim": partial(diffusers.DDIMScheduler, clip_sample=False),
    "ancestral": partial(diffusers.DDPMScheduler, clip_sample=False, variance_type="fixed_small"),
    "dpm-solver++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "ddim, as euler": diffusers.EulerDiscreteScheduler,
}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # their names


def draws(seed: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator, dtype=torch.float64)


def theirs(peer: str, denoise: Denoise, noise: Tensor, num_steps: int, told: str) -> Tensor:
    """x0 by the peer, which is told the denoiser's x0 in terms of "eps", "v" or "x0"."""
    scheduler = PEERS[peer](**LINEAR, prediction_type=PREDICTIONS[told])
    scheduler.set_timesteps(num_steps)
    # what `draws` draws
    random = {"generator": torch.Generator().manual_seed(1)} if peer == "ancestral" else {}
    angles, x = linear_beta()[1:], noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t, x_t = angles[int(timestep)], scheduler.scale_model_input(x, timestep)
        prediction = FROM_X0[told](x_t, denoise(x_t, t), t)
        x = scheduler.step(prediction, timestep, x, **random).prev_sample
    return x


@torch.no_grad()
def difference(peer: str, denoise: Denoise, num_steps: int, told: str = "eps") -> float:
    """The largest of any pixel of 8 images; num_steps divides 1000."""
    shape = (8, 1, 8, 8)
    first = next(draws(0, shape))
    noise = chain([first], draws(1, shape))
    angles = respace(linear_beta(), num_steps)
    x0 = sample(lambda x_t, t, label: denoise(x_t, t), noise, peer.split(",")[0], angles)
    return (x0 - theirs(peer, denoise, first, num_steps, told)).abs().max().item()


def random_network() -> Denoiser:
    """A small U-Net in float64, its weights all at random, those that start at zero too."""
    net = UNet(UNetConfig(width=16, multipliers=(1, 2), blocks=1, attention=()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return Denoiser(net.double())


@dataclass(frozen=True)
class Options:
    """Print the largest difference of each sampler from diffusers' scheduler."""

    steps: tuple[int, ...] = (4, 10, 50)
    """Steps to compare at. Each must divide 1000."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.schedulers")
    denoise = random_network()
    for peer in PEERS:
        for told in PREDICTIONS:
            found = (f"{n}: {difference(peer, denoise, n, told):.1e}" for n in options.steps)
            out.print(f"{peer:15} {told:3} ", "  ".join(found))


if __name__ == "__main__":
    run(main)
