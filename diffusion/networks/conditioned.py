"""What a network is told of the image as a whole, as one vector."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusion.condition import Condition, Guidance, Kind, Kinds, Label
from diffusion.console import UserError


class AngleEmbedding(nn.Module):
    """Sines and cosines of t at frequencies 0.5 to 64, then a small MLP: (B,) -> (B, width).

    The frequencies stay low enough for a smooth d/dt (Lu & Song 2024, section 4.1).
    """

    frequencies: Tensor

    def __init__(self, width: int):
        super().__init__()
        half = width // 4
        octaves = torch.linspace(-1, 6, half)
        self.register_buffer("frequencies", 2**octaves, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * half, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        phase = t[:, None] * self.frequencies
        return self.mlp(torch.cat([phase.sin(), phase.cos()], dim=1))


class Conditioned(nn.Module):
    """A network with an embedding of the angle, of a label, which is unknown by default, and of a
    guidance weight, which is 1 by default.

    The weight is embedded as the angle atan(w), and its embedding starts at zero, so that it
    changes nothing before it is trained.
    """

    TAKES: ClassVar[dict[str, type[Kind]]] = {"label": Label, "guidance": Guidance}

    def __init__(self, width: int, kinds: Kinds):
        """UserError for a condition that the network does not take."""
        super().__init__()
        for name, kind in kinds.items():
            if not isinstance(kind, self.TAKES.get(name, ())):
                network, takes = type(self).__name__.lower(), " and ".join(self.TAKES)
                raise UserError(
                    f"the network {network} takes {takes}, not {name}: choose another network"
                )
        self.angle = AngleEmbedding(width)
        label = kinds.get("label")
        self.unknown = label.num_classes if isinstance(label, Label) else None
        if self.unknown is not None:
            self.classes = nn.Embedding(self.unknown + 1, width)
        self.guidance = AngleEmbedding(width) if "guidance" in kinds else None
        if self.guidance:
            zero(self.guidance.mlp[-1])

    def embedding(self, t: Tensor, condition: Condition) -> Tensor:
        """(B, width)."""
        embedding = self.angle(t)
        if self.unknown is not None:
            label = condition.get("label")
            if label is None:
                label = torch.full(t.shape, self.unknown, device=t.device)
            embedding = embedding + self.classes(label)
        if self.guidance is not None:
            weight = condition.get("guidance", torch.ones_like(t))
            embedding = embedding + self.guidance(weight.atan())
        return embedding


def zero(module: nn.Module) -> nn.Module:
    """The layer, with every parameter 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
