"""A plan as one network: noise in, images out, all of its steps in between.

What torch.export and torch.onnx trace. The samplers are functions of a denoiser, of noise and of
angles, so that one module serves every plan; traced, its steps are unrolled and its angles are
constants.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from diffusion.console import UserError, first_line
from diffusion.latents import Latents
from diffusion.model import Model
from diffusion.noise import Noise
from diffusion.plan import Plan
from diffusion.samplers import sample

MOST_CALLS = 64  # of the network in one graph: each is a copy of its operations
OUTPUTS = ("images", "x0")


class Sampling(nn.Module):
    """(noise, conditions…) -> (images (B, H, W, C) uint8, x0 (B, C, H, W) float32).

    noise: (B, draws C, H, W) float32, standard normal: the noise that sampling starts from, and
    beneath it, as further channels, the noise of each step of a stochastic sampler. conditions:
    rows (B, ...) in the order of `names`.
    """

    def __init__(self, model: Model, plan: Plan):
        super().__init__()
        self.denoiser, self.codec, self.plan = model.denoiser, model.codec, plan
        if isinstance(model.codec, Latents):  # its weights are the graph's, too
            self.autoencoder = model.codec.network(model.device)
        self.draws = draws(plan)
        self.names = ("noise", *model.conditions(torch.arange(1)))
        if model.kinds and plan.guidance not in (None, 1):
            self.names += ("guidance",)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise, condition = inputs[0], dict(zip(self.names[1:], inputs[1:], strict=True))
        steps, angles = iter(noise.chunk(self.draws, dim=1)), self.plan.on(noise.device)
        x0 = sample(self.denoiser, steps, self.plan.sampler, angles, condition or None)
        return self.codec.decode(x0).permute(0, 2, 3, 1), x0

    def inputs(self, model: Model, seed: int | Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        """What it is called with for images of these numbers (B,): those that the model makes."""
        rows = inputs(model.conditions(numbers), self.plan, seed, numbers, model.shape, self.draws)
        return tuple(rows[name] for name in self.names)


def inputs(
    conditions: dict[str, Tensor],
    plan: Plan,
    seed: int | Tensor,
    numbers: Tensor,
    shape: tuple[int, int, int],
    draws: int,
) -> dict[str, Tensor]:
    """What a traced plan is called with, by name, for images of these numbers (B,) of the seed.

    shape: (C, H, W) of an x0.
    """
    noise = Noise(seed, numbers, shape)
    weight = 1.0 if plan.guidance is None else plan.guidance
    return {
        "noise": torch.cat([next(noise) for _ in range(draws)], dim=1),
        "guidance": torch.full(numbers.shape, weight, device=numbers.device),
        **conditions,
    }


def draws(plan: Plan) -> int:
    """How many standard normal images the plan's sampler takes."""
    taken = []

    def noises() -> Iterator[Tensor]:
        while True:
            taken.append(1)
            yield torch.ones(1, 1, 1, 1)

    def denoiser(x_t: Tensor, t: Tensor, condition: None, variance: bool = False) -> object:
        return (x_t, x_t) if variance else x_t

    sample(denoiser, noises(), plan.sampler, plan.on(torch.device("cpu")))
    return len(taken)


def trace(sampling: Sampling, example: tuple[Tensor, ...]) -> ExportedProgram:
    """The module as torch.export traces it, for any batch size.

    example: inputs of two images or more. UserError where a network, such as a user's own, does
    not trace.
    """
    shapes = (tuple({0: Dim("batch")} for _ in example),)
    try:
        with torch.no_grad():
            program = export(sampling.eval(), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the network's code does
        raise UserError(
            "the network cannot be traced for any batch size by torch.export "
            f"({first_line(error):.200}): it must not depend on values, nor take len() of a tensor"
        ) from error
    # a loop over no angles leaves a node without outputs, which torch.export.load cannot read
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program
