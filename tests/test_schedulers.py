"""Our samplers are diffusers' schedulers, on the schedule and the steps that both have.

Both take the same timesteps of DDPM's linear-beta schedule from the same noise, the network being
given the angle. Their tables are float32. Their Heun is the trapezoid rule in sigma, ours in cot t,
so the two are not compared; Euler in sigma (Karras et al. 2022) is DDIM.
"""

from functools import partial
from itertools import chain

import pytest
import torch
from torch import Tensor

from diffusion.circle import FROM_X0
from diffusion.denoiser import Denoiser
from diffusion.samplers import Denoise, sample
from diffusion.schedules import linear_beta, respace
from tests.analytic import BIMODAL, normal, normals, random_unet

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

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
SHAPE = (8, 1, 8, 8)


def theirs(peer: str, denoise: Denoise, noise: Tensor, num_steps: int, prediction: str) -> Tensor:
    """x0 by the peer, which gets the denoiser's x0 in terms of "eps", "v" or "x0"."""
    scheduler = PEERS[peer](**LINEAR, prediction_type=PREDICTIONS[prediction])
    scheduler.set_timesteps(num_steps)
    # as normals(1) draws
    random = {"generator": torch.Generator().manual_seed(1)} if peer == "ancestral" else {}
    angles, x = linear_beta()[1:], noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t, x_t = angles[int(timestep)], scheduler.scale_model_input(x, timestep)
        output = FROM_X0[prediction](x_t, denoise(x_t, t), t)
        x = scheduler.step(output, timestep, x, **random).prev_sample
    return x


@torch.no_grad()
def difference(peer: str, denoise: Denoise, num_steps: int, prediction: str = "eps") -> float:
    """The largest of any pixel of 8 images, whose deviation is about 1; num_steps divides 1000."""
    first = normal(0, *SHAPE, dtype=torch.float64)
    noise = chain([first], normals(1, *SHAPE, dtype=torch.float64))
    angles, name = respace(linear_beta(), num_steps), peer.split(",")[0]
    x0 = sample(lambda x_t, t, condition: denoise(x_t, t), noise, name, angles)
    return (x0 - theirs(peer, denoise, first, num_steps, prediction)).abs().max().item()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_sampler_makes_its_peers_images_with_one_random_network(peer, prediction):
    """In float64 but for their tables; their Euler starts from sigma for sqrt(sigma^2 + 1)."""
    net = random_unet(width=16, multipliers=(1, 2), blocks=1, attention=()).double()
    assert difference(peer, Denoiser(net), 10, prediction) < 1e-4


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("num_steps", [4, 50, 250])
def test_a_sampler_makes_its_peers_images_of_a_mixture_of_gaussians(peer, num_steps):
    assert difference(peer, BIMODAL, num_steps) < 1e-4
