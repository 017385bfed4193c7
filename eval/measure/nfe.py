"""Network calls of a plan: counted, and checked against what its sampler claims."""

import torch
from torch import Tensor, nn

from diffusion.console import UserError
from diffusion.model import Model
from diffusion.plan import Plan
from eval.measure.stream import indices


class Counted(nn.Module):
    """A network that counts its calls; each image of a batch counts as one."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x_t: Tensor, *others) -> Tensor:
        self.calls += len(x_t)
        return self.net(x_t, *others)


def count_calls(model: Model, plan: Plan) -> int:
    """Network calls per image, in an eager pass that nobody times, by a wrapper of the network."""
    counted = Counted(model.denoiser.net)
    model.denoiser.net = counted
    try:
        with torch.compiler.set_stance("force_eager"):
            model.sample(plan, 0, indices(model, 0, 1))
    finally:
        model.denoiser.net = counted.net
    claimed = model.calls(plan)
    if counted.calls != claimed:
        raise UserError(
            f"{plan.sampler} claims {claimed} network calls in {plan.num_steps} steps, "
            f"but made {counted.calls}"
        )
    return counted.calls
