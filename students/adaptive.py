"""As many calls as each image needs: it is left as it is once a call has hardly changed it."""

import torch
from torch import Tensor

from diffusion.condition import Condition, take
from diffusion.console import UserError
from diffusion.model import Model
from diffusion.noise import Noise
from diffusion.plan import Plan
from diffusion.samplers import SOLVERS, sample
from students.api import Checkpoint


class Stopping:
    """A denoiser that calls the network for those images alone that still change.

    An image of which two calls in a row gave x0 that differ by less than the tolerance, in root
    mean square, is left: the later x0 stands for every call to come. So any sampler ends there.
    """

    def __init__(self, denoiser: torch.nn.Module, tolerance: float):
        self.denoiser, self.tolerance = denoiser, tolerance
        self.x0: Tensor | None = None
        self.moving = torch.empty(0)
        self.calls = torch.empty(0)
        """(B,) int64, network calls for each image so far."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        if self.x0 is None:
            self.moving = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
            self.calls = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)
        rows = self.moving.nonzero()[:, 0]
        if not len(rows):
            assert self.x0 is not None
            return self.x0
        made = self.denoiser(x_t[rows], t, take(condition, rows))
        self.calls[rows] += 1
        if self.x0 is None:
            self.x0 = made
            return made
        change = (made - self.x0[rows]).square().flatten(1).mean(1).sqrt()
        self.x0 = self.x0.index_copy(0, rows, made)
        self.moving[rows] = change >= self.tolerance
        return self.x0


class Adaptive(Checkpoint):
    """A checkpoint whose plans' calls are the most that an image gets."""

    def __init__(self, model: Model, name: str, tolerance: float):
        """tolerance: in grey levels."""
        super().__init__(model, name)
        levels = model.codec.grey_levels
        if levels is None:
            raise UserError("--tolerance is in grey levels, which this model's values are not")
        self.tolerance = tolerance / levels[1]
        self.calls = torch.zeros(0, dtype=torch.int64)
        """(B,) of the last batch that was made."""

    def x0(self, plan: Plan, seed: int | Tensor, numbers: Tensor, condition: Condition) -> Tensor:
        if "variance" in SOLVERS[plan.sampler].needs:
            raise UserError(f"--tolerance does not go with {plan.sampler}: name another --sampler")
        model = self.model
        stopping = Stopping(model.denoiser, self.tolerance)
        noise, angles = Noise(seed, numbers, model.shape), plan.on(numbers.device)
        x0 = sample(stopping, noise, plan.sampler, angles, model.inputs(plan, numbers, condition))
        self.calls = stopping.calls.cpu() * model.calls_per_step(plan)
        return x0
