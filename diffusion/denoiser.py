"""Denoiser: a network that predicts a velocity, read as an x0. Precision is decided here."""

import torch
from torch import Tensor, nn

from diffusion.circle import TO_X0


class Denoiser(nn.Module):
    """D(x_t, t) = cos(t) x_t - sin(t) v(x_t, t), so D(x, 0) = x holds exactly.

    At unit variance this is the preconditioning of Karras et al. 2022, table 1, and the
    boundary condition of a consistency model (Song et al. 2023, section 3) at no cost.

    net: (x_t (B, C, H, W), t (B,) float32, label (B,) int64 or None) -> velocity (B, C, H, W)
    precision: "fp32" or "bf16" (autocast of the network alone; angles and sums stay float32).
    layout: of weights and activations; channels_last is the fast one on GPUs with tensor cores,
    while on CPUs group norm makes it the slow one (1.3 times at 8x8).
    """

    def __init__(
        self,
        net: nn.Module,
        precision: str = "fp32",
        layout: torch.memory_format = torch.contiguous_format,
    ):
        super().__init__()
        self.net = net.to(memory_format=layout)
        self.precision, self.layout = precision, layout

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x0 (B, C, H, W) float32. t: (B,) or scalar radians; label: (B,), None without classes."""
        t = t.expand(len(x_t))
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            x = x_t.contiguous(memory_format=self.layout)
            velocity = self.net(x, t.float(), label)
        return TO_X0["v"](x_t, velocity.float(), t)
