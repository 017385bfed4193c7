"""Coarse to fine: a small image by one model, refined by the next (Ho et al. 2021)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion.condition import Condition, Small
from diffusion.console import UserError
from diffusion.noise import Noise
from diffusion.plan import Plan
from students.api import Checkpoint, ImageModel

AUGMENTATION = 0.2  # angle of the noise on a small image that a model made
GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**63 - 1
KEPT = 65_536  # small images, at most, that are not made again


class Cascade(ImageModel):
    """Images that one model makes small, and another larger."""

    def __init__(self, first: ImageModel, plan: Plan, last: Checkpoint, depth: int = 1):
        """plan: the first's. depth: how many models go before the last.

        UserError where the last does not refine images such as the first's.
        """
        kind = last.kinds.get("small")
        if not isinstance(kind, Small):
            raise UserError(
                f"--then {last.name}: this {last.method} model refines no smaller image: expected "
                "one that teachers.ddpm --from-size made, or a student of it"
            )
        if kind.shape != first.spec.shape:
            raise UserError(
                f"--then {last.name} refines images of shape {kind.shape}, and {first.name} makes "
                f"{first.spec.shape}: train it with --from-size {first.spec.size}"
            )
        for name in ("label", "text"):
            if name in last.kinds and last.kinds[name] != first.kinds.get(name):
                raise UserError(
                    f"--then {last.name} is told a {name} that {first.name} is not, or of another "
                    "kind: train both with the same one"
                )
        self.first, self.first_plan, self.last = first, plan, last
        self.small, self.depth = kind, depth
        self.name, self.spec, self.device = last.name, last.spec, last.device
        self.kinds = {**first.kinds, **last.kinds}
        self.method = f"{first.method} then {last.method}"
        self.sha256 = f"{first.sha256}+{last.sha256}"
        self.made: dict[tuple[int, int], Tensor] = {}

    def plan(
        self, steps: int | None = None, sampler: str | None = None, guidance: float | None = None
    ) -> Plan:
        """The last model's."""
        return self.last.plan(steps, sampler, guidance)

    def make(self, plan: Plan, seed: int | Tensor, numbers: Tensor, condition: Condition) -> Tensor:
        """Each model has noise of its own: the same would show in both."""
        small = self.smaller(seed, numbers, condition).to(self.device)
        noise = next(Noise(other(seed, 2 * self.depth - 1), numbers, self.small.shape))
        y = self.small.clean(small)[:, :-1]
        angle = torch.full((len(y),), min(AUGMENTATION, self.small.most), device=self.device)
        given = {name: rows for name, rows in condition.items() if name in self.last.kinds}
        given["small"] = self.small.noisy(y, angle, noise)
        return self.last.make(plan, other(seed, 2 * self.depth), numbers, given)

    def smaller(self, seed: int | Tensor, numbers: Tensor, condition: Condition) -> Tensor:
        """The first model's images (B, C, s, s) uint8 on the CPU: made once, for they are shown
        before they are refined."""
        seeds = torch.as_tensor(seed).expand(len(numbers))
        keys = list(zip(seeds.tolist(), numbers.tolist(), strict=True))
        lacking = [row for row, key in enumerate(keys) if key not in self.made]
        if lacking:
            which = torch.tensor(lacking, device=numbers.device)
            given = {k: rows[which] for k, rows in condition.items() if k in self.first.kinds}
            some = seeds.to(numbers.device)[which] if isinstance(seed, Tensor) else seed
            images = self.first.make(self.first_plan, some, numbers[which], given).cpu()
            if len(self.made) + len(lacking) > KEPT:
                self.made = {key: image for key, image in self.made.items() if key in keys}
            self.made |= {keys[row]: image for row, image in zip(lacking, images, strict=True)}
        return torch.stack([self.made[key] for key in keys])


def other(seed: int | Tensor, number: int) -> int | Tensor:
    """A seed, or one for each image, whose noise is none of the seed's own."""
    return (seed + (number * GOLDEN & MASK)) & MASK


def stages(
    first: ImageModel, plan: Plan, then: Sequence[Checkpoint], steps: Sequence[int | None]
) -> list[tuple[ImageModel, Plan]]:
    """What makes the images of each size, the smallest first, and its plan.

    plan: the first's. steps: of each further model; None for its own.
    """
    made = [(first, plan)]
    for depth, (last, count) in enumerate(zip(then, steps, strict=True), 1):
        cascade = Cascade(*made[-1], last, depth)
        made.append((cascade, cascade.plan(count)))
    return made


def place(out: Path, size: int) -> Path:
    """Where the images of a smaller size go: beside `out`, with their size in the name."""
    return out.with_name(f"{out.stem}-{size}{out.suffix}")
