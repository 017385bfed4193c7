"""Bits per dimension of real images under a denoiser: two upper bounds on -log2 P(x0) / D.

Both encode grey levels as z = x_t at the first angle t_1 of the model's list and decode them by
a discretised Gaussian around D(z, t_1). Whatever density p of z the model stands for,

    -log P(x0) <= E_q[log q(z | x0) - log p(z) - log P(x0 | z)].

The two differ in p. The variational bound's is where the chain of ancestral steps over the list
ends, and -log p(z) is itself bounded; the probability flow's is where the ODE ends, exactly. Both
are bounds for any network, however bad, and estimated without bias, but for the ODE solver's error.

Neither is tight. The exact denoiser of the 1438 training digits, which says each of them in
log2(1438) / 64 = 0.16 bits, has a variational bound of 0.69 and a flow of 0.68 on the cosine list
(0.28 and 0.26 on one of 4000 angles): half a bit is the decoder's, for at t_1 its Gaussian is 0.6
grey levels wide, and leaves part of an exact x0's probability to the levels beside it. So compare
models of one list with each other, and not their bits with those of other decoders.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.circle import FROM_X0, add_noise
from diffusion.codec import Codec
from diffusion.condition import Condition, take
from diffusion.console import UserError, track
from diffusion.grey_levels import log_levels
from diffusion.model import Model
from diffusion.noise import Noise
from diffusion.samplers import Denoise

DRAWS = 24  # steps of the list per image, for the variational bound
FLOW_STEPS = 24  # of 4 calls with gradients each: on 8x8 digits 0.0003 bits from many steps
GOLDEN = (math.sqrt(5) - 1) / 2


@torch.no_grad()
def bits_per_dim(
    model: Model,
    images: Tensor,
    condition: Condition | None,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, float]:
    """Both bounds in bits per channel value: means over the images, and their standard errors.

    Image i's noise is a function of (seed, i): the batch size changes only the rounding, and two
    models meet the same noise. images: (N, C, H, W) uint8, N >= 2. condition: (N, ...) each, what
    is given away, so that the bits are those of P(x0 | condition); None for nothing.
    """
    spec, device, angles = model.spec, model.device, model.schedule.to(model.device)
    if images.dtype != torch.uint8 or images.shape[1:] != spec.shape or len(images) < 2:
        raise UserError(
            f"bits per dimension need 2 or more uint8 images of the model's shape {spec.shape}, "
            f"got {images.dtype} of shape {tuple(images.shape)}: load the images it was trained on"
        )
    if not model.codec.grey_levels:
        raise UserError(
            "bits per dimension need a model of grey levels: --likelihood 0 leaves them"
        )
    if len(angles) < 3:
        raise UserError(
            "bits per dimension need a model of 2 or more steps, got one of 1: measure its teacher"
        )
    nats = []
    parts = torch.arange(len(images)).split(batch_size)
    for indices in track(parts, "likelihood", lambda part: (int(part[0]), len(images), "images")):
        given = take(condition, indices)
        given = given and {name: rows.to(device) for name, rows in given.items()}
        indices, part = indices.to(device), images[indices].to(device)
        noise, share = Noise(seed, indices, spec.shape), offsets(seed, indices)
        denoise = partial(model.denoiser, condition=given)
        nats.append(bounds(denoise, part, model.codec, angles, noise, share))
    bits = torch.cat(nats, dim=1) / (math.prod(spec.shape) * math.log(2))
    variational, flow = bits.mean(1).tolist()
    variational_error, flow_error = (bits.std(1) / math.sqrt(len(images))).tolist()
    return {
        "variational-bound": variational,
        "variational-bound-error": variational_error,
        "probability-flow": flow,
        "probability-flow-error": flow_error,
        "images": len(images),
    }


def bounds(
    denoise: Denoise,
    images: Tensor,
    codec: Codec,
    angles: Tensor,
    noise: Iterator[Tensor],
    offset: Tensor,
) -> Tensor:
    """Variational bound and probability flow, nats per image: (2, B) float64.

    The shared encoding has one draw of noise for both. images: (B, C, H, W) uint8; angles:
    ascending from 0; offset: see `diffusion_cost`.
    """
    first, x0, eps = angles[1], codec.encode(images), next(noise)
    assert codec.grey_levels
    mean, std = codec.grey_levels
    z = add_noise(x0, eps, first)
    # sin t_1: Ho et al. 2020, eq. 13 with sigma_1^2 = beta_1. Around D it takes 0.1 bits less on
    # digits than the grey levels' posterior around z alone does (Kingma et al. 2021).
    x0_levels = denoise(z, first).double() * std + mean
    decoder = -log_levels(images, x0_levels, first.sin() * std).flatten(1).sum(1)
    # sampled, not its mean, which is known: the same eps is in the other terms, and cancels
    encoder = log_normal(eps) - x0[0].numel() * first.sin().log()
    steps = flow_angles(first, angles[-1], FLOW_STEPS)
    probes = (torch.where(draw < 0, -1.0, 1.0) for draw in noise)
    flow = flow_log_density(denoise, z, steps, probes)
    return torch.stack(
        [decoder + diffusion_cost(denoise, x0, angles, noise, offset), decoder + encoder - flow]
    )


def diffusion_cost(
    denoise: Denoise, x0: Tensor, angles: Tensor, noise: Iterator[Tensor], offset: Tensor
) -> Tensor:
    """The variational bound without the decoder: a bound on E_q[log q(z | x0) - log p(z)], (B,).

    That is KL(q(x_{t_N} | x0) || N(0, I)) and, for each step t -> s of the list down to t_1,
    (cot^2 s - cot^2 t) / 2 |x0 - D(x_t, t)|^2 (Kingma et al. 2021, section 4). Steps are drawn
    with shares (cot^2 s - cot^2 t) sin^2 t, for at unit variance the squared error is sin^2 t.
    What remains is the plain mean of |x0 - D|^2 / sin^2 t, the velocity's squared error, times
    half the sum of the shares. One of an image's DRAWS steps lies in each of as many equal
    stretches of that sum, at the same place in all: `offset` (B,), uniform in [0, 1).
    """
    s, t, last = angles[1:-1], angles[2:], angles[-1]
    shares = ((t - s).sin() * (t + s).sin() / s.sin().square()).cumsum(0)
    cos2 = last.cos().square()
    prior = (cos2 * (x0.double().square() - 1) - torch.log1p(-cos2)).flatten(1).sum(1) / 2
    errors = torch.zeros_like(prior)
    for k in range(DRAWS):
        where = (k + offset) / DRAWS * shares[-1]
        t_k = t[torch.searchsorted(shares, where, right=True).clamp(max=len(t) - 1)]
        error = (x0 - denoise(add_noise(x0, next(noise), t_k), t_k)).double()
        errors += error.square().flatten(1).sum(1) / t_k.sin().square()
    return prior + shares[-1] / 2 * errors / DRAWS


def flow_log_density(
    denoise: Denoise, z: Tensor, angles: Tensor, probes: Iterator[Tensor]
) -> Tensor:
    """log p(z) (B,) where dx/dt = v carries p, at angles[0] > 0, to N(0, I) at angles[-1].

    log p(z) = log N(x_N) + the integral of div v (Chen et al. 2018, theorem 1), by Runge and
    Kutta's method of fourth order. div v is estimated as probe . dv/dx probe (Hutchinson 1989):
    without bias for probes of independent signs, exactly where dv/dx is diagonal. Each step has a
    fresh probe, which on digits leaves a fifth of the variance that one for all steps has.
    """

    def field(x: Tensor, t: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        """v, and the estimate of its divergence."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = FROM_X0["v"](x, denoise(x, t), t)
            (row,) = torch.autograd.grad((v * probe).sum(), x)
        return v.detach(), (row * probe).flatten(1).sum(1, dtype=torch.float64)

    x, divergence = z, torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for (t, s), probe in zip(pairwise(angles), probes):
        h, middle = s - t, (t + s) / 2
        v1, div1 = field(x, t, probe)
        v2, div2 = field(x + h / 2 * v1, middle, probe)
        v3, div3 = field(x + h / 2 * v2, middle, probe)
        v4, div4 = field(x + h * v3, s, probe)
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        divergence += h / 6 * (div1 + 2 * div2 + 2 * div3 + div4)
    return log_normal(x) + divergence


def flow_angles(first: Tensor, last: Tensor, num_steps: int) -> Tensor:
    """(num_steps + 1,) ascending angles, even in the fifth root of t.

    Nearly geometric: where a pixel never varies div v grows as 1 / t. Equal steps would have
    several hundred times the error.
    """
    between = torch.linspace(0, 1, num_steps + 1, dtype=first.dtype, device=first.device)[1:-1]
    roots = torch.lerp(first**0.2, last**0.2, between)
    return torch.cat([first[None], roots**5, last[None]])


def log_normal(x: Tensor) -> Tensor:
    """log N(x; 0, I), (B,) float64."""
    return -(x.double().square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2


def offsets(seed: int, indices: Tensor) -> Tensor:
    """A number in [0, 1) for each image: steps of the golden ratio from the seed's own start.

    Over the seeds each is uniform; over images 0 to N they are spread evenly.
    """
    start = next(Noise(seed, torch.full_like(indices[:1], -1), (1,))).double()
    return (torch.special.ndtr(start[0]) + GOLDEN * indices.double()) % 1
