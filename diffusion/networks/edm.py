"""A denoiser D(x, sigma) of the user's own code, read as v: `--teacher edm:mymodule:load`.

The convention is that of Karras et al. 2022, section 2: x = x0 + sigma eps, and D says x0. So
sigma = tan t, x = x_t / cos t, and v = (cos t x_t - D) / sin t. D is asked at no less than
sigma_min; as their preconditioning has D(x, 0) = x, so has the denoiser that reads this v.
"""

from dataclasses import dataclass
from functools import partial
from math import atan
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffusion import typed
from diffusion.circle import broadcast
from diffusion.condition import Condition, Kinds, Label
from diffusion.console import UserError, first_line
from diffusion.networks.module import imported, is_trusted

EXPORTED = ".pt2"
EXPECTED = (
    "expected a torch.nn.Module D(x, sigma) with parameters, and with img_channels and "
    "img_resolution as attributes"
)


@dataclass(frozen=True)
class EDMConfig:
    """A denoiser by the place of what makes it, and what its own attributes say."""

    place: typed.Text
    """PACKAGE.MODULE:FUNCTION, a function without arguments that returns the module; or a file
    that torch.export.save wrote."""
    channels: Annotated[int, Field(ge=1, le=1024)]
    size: Annotated[int, Field(ge=1, le=65536)]
    sigma_min: Annotated[float, Field(gt=0, le=1e6)]
    sigma_max: Annotated[float, Field(gt=0, le=1e6)]

    @property
    def exported(self) -> bool:
        return self.place.endswith(EXPORTED)

    def check(self) -> None:
        """UserError for a denoiser that cannot be had."""
        denoiser(self.place)

    def build(self, outputs: int, kinds: Kinds) -> nn.Module:
        """The denoiser as (x_t, t, condition) -> v."""
        if taken := kinds.keys() - {"label"}:
            raise UserError(f"a denoiser D(x, sigma) takes no {min(taken)}: choose another network")
        return EDM(denoiser(self.place), self, kinds)


class EDM(nn.Module):
    """(x_t (B, C, H, W), t (B,) radians, condition or None) -> v, by a denoiser D(x, sigma)."""

    def __init__(self, denoiser: nn.Module, config: EDMConfig, kinds: Kinds):
        super().__init__()
        self.denoiser, self.first = denoiser, atan(config.sigma_min)
        label = kinds.get("label")
        self.classes = label.num_classes if isinstance(label, Label) else 0
        self.fewest = 2 if config.exported else 1  # an exported program may take no batch of one

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        t = t.clamp(min=self.first)
        cos, sin = broadcast(t.cos(), x), broadcast(t.sin(), x)
        given: list[Tensor] = [x / cos, t.tan()]
        if self.classes:  # (B, classes) float, as EDM has them; zeros for an unknown one
            unknown = torch.full(t.shape, self.classes, device=t.device)
            label = (condition or {}).get("label", unknown)
            given.append(F.one_hot(label, self.classes + 1)[:, :-1].to(x.dtype))
        repeats = self.fewest if len(x) < self.fewest else 1
        x0 = self.denoiser(*(part.repeat(repeats, *[1] * (part.ndim - 1)) for part in given))
        return (cos * x - x0[: len(x)].to(x)) / sin


def denoiser(place: str) -> nn.Module:
    """What the user's function returns, or an exported file holds. UserError where it is not there
    or is not trusted."""
    with torch.device("cpu"):  # in earnest, where ours would be built dry
        return _exported(Path(place)) if place.endswith(EXPORTED) else _made(place)


def _made(place: str) -> nn.Module:
    expected = f"expected edm:PACKAGE.MODULE:FUNCTION, got edm:{place}"
    made = imported(place, expected)
    try:
        network = made()
    except Exception as error:  # a function fails in as many ways as there are functions
        raise UserError(
            f"edm:{place}: calling it without arguments failed ({first_line(error)})"
        ) from error
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        raise UserError(f"edm:{place} returns {type(network).__name__}: {EXPECTED}")
    return network


def _exported(path: Path) -> nn.Module:
    if not is_trusted(str(path)):
        raise UserError(
            f"{path} can run code of its maker when it is loaded: add --trust if you know its maker"
        )
    try:
        program = torch.export.load(path)
        network: Any = program.module()
        images = next(
            node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
        )
        _, channels, size, _ = images.meta["val"].shape
    except Exception as error:  # a wrong file fails in as many ways as there are files
        raise UserError(
            f"{path} does not load: expected a denoiser D(x, sigma) that torch.export.save wrote "
            f"({first_line(error)})"
        ) from error
    network.img_channels, network.img_resolution = int(channels), int(size)
    for mode in ("eval", "train"):  # which an exported program refuses
        setattr(network, mode, partial(_as_it_was, network))
    return network


def _as_it_was(network: nn.Module, mode: bool = True) -> nn.Module:
    """In place of eval and train."""
    return network


def described(place: str) -> tuple[dict[str, Tensor], EDMConfig, int]:
    """Its weights, its config, and how many classes it takes, by its own attributes."""
    network: Any = denoiser(place)
    try:
        channels, size = int(network.img_channels), int(network.img_resolution)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"edm:{place}: {EXPECTED} ({error})") from error
    # EDM's own sampler has 0.002 and 80 within what the network takes
    low = max(0.002, float(getattr(network, "sigma_min", 0.0)))
    high = min(80.0, float(getattr(network, "sigma_max", 80.0)))
    config = EDMConfig(place, channels, size, low, high)
    weights = EDM(network, config, {}).state_dict()
    return weights, config, int(getattr(network, "label_dim", 0) or 0)
