"""What is kept of a set of images that streams by, to take all figures from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.console import UserError
from eval.measure.metrics import Moments

# Of how many images, the first ones, a row each is kept: the rest are in the moments alone.
KEPT = {"features": 1024, "pixels": 256}
SHOWN = 16  # of the pixels, on pictures
FAR = 128.0  # grey levels beyond black or white


@dataclass
class Seen:
    """What is kept of a set of images while it streams by; two of them merge, in any order."""

    moments: dict[str, Moments] = field(default_factory=dict)
    """Extractor -> moments of the features; "own" alone is of all images."""
    odd: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    """(4,) float64: images, those not finite, those of one flat colour, share of far-off values."""
    parts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Number of a batch's first image -> the rows that are kept of it, by KEPT's names."""

    def __add__(self, other: "Seen") -> "Seen":
        if not self.parts:
            return other
        if not other.parts:
            return self
        moments = {name: self.moments[name] + other.moments[name] for name in self.moments}
        return Seen(moments, self.odd + other.odd, self.parts | other.parts)

    def has(self, name: str) -> bool:
        """Whether rows of that name are kept."""
        return all(name in rows for rows in self.parts.values())

    def rows(self, name: str) -> Tensor:
        """The kept rows of that name, in the order of the images."""
        return torch.cat([self.parts[start][name] for start in sorted(self.parts)])

    def refuse(self) -> None:
        """UserError where these cannot be a model's images."""
        images, broken, flat, far = self.odd.tolist()
        if broken:
            raise UserError(
                f"{broken:.0f} of {images:.0f} images hold NaN or infinity: the training failed"
            )
        self.moments["own"].refuse()
        same = images > 1 and self.moments["own"].scatter.trace() == 0
        if flat == images or same:
            raise UserError(f"all {images:.0f} images are the same, or of one flat colour each")
        if far > images / 2:
            raise UserError(
                f"{far / images:.0%} of all values lie more than {FAR:.0f} grey levels below black "
                "or above white: the model has diverged"
            )

    def tensors(self) -> dict[str, Tensor]:
        """To be saved or sent."""
        named = {"odd": self.odd}
        for name, moments in self.moments.items():
            named |= {f"moments.{name}.{key}": value for key, value in moments.tensors().items()}
        for start, rows in self.parts.items():
            named |= {f"parts.{start}.{name}": value for name, value in rows.items()}
        return {name: value.cpu() for name, value in named.items()}

    @staticmethod
    def of(tensors: dict[str, Tensor], device: torch.device) -> "Seen":
        """The inverse of tensors, on the device."""
        seen, moments = Seen(odd=tensors["odd"].to(device)), {}
        for name, value in tensors.items():
            kind, *place = name.split(".")
            if kind == "moments":
                moments.setdefault(place[0], {})[place[1]] = value.to(device)
            elif kind == "parts":
                seen.parts.setdefault(int(place[0]), {})[place[1]] = value.to(device)
        seen.moments = {name: Moments.from_tensors(value) for name, value in moments.items()}
        return seen
