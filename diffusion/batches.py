"""Training batches: batch i is a function of (seed, i), so nothing random needs to be saved."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion.codec import prepared
from diffusion.condition import Condition, Guidance, Kinds, Small, take
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.data import Dataset
from diffusion.images import Ahead, Rows, with_conditions
from diffusion.noise import seed32


class Batch(NamedTuple):
    """All that is random in a training step, so that an objective is a function of its inputs."""

    x0: Tensor
    """(B, C, H, W) float32, zero mean and unit variance."""
    eps: Tensor
    """(B, C, H, W) standard normal."""
    level: Tensor
    """(B,) float64 in [0, 1), stratified over the global batch (Kingma et al. 2021, app. I.1)."""
    condition: Condition | None = None
    """A row for each image, beside x_t and t. Objectives pass it on to the network."""
    seed: int = 0
    """The dropout masks' seed."""

    def dropout(self) -> torch.Generator:
        """For a network pass's dropout masks: a second pass by it has the first one's masks."""
        return torch.Generator(self.x0.device).manual_seed(self.seed)


def split(batch: Batch, count: int) -> list[Batch]:
    """So many parts, each of every count-th image, with dropout masks of its own."""
    return [
        Batch(
            *(rows[part::count] for rows in (batch.x0, batch.eps, batch.level)),
            take(batch.condition, slice(part, None, count)),
            batch.seed + (part << 24),
        )
        for part in range(count)
    ]


def batch_seed(seed: int, i: int) -> int:
    """Another for every seed and batch: in 32 bits, all that a CPU's generator takes of it.

    Seeds' runs of batches begin at multiples of the golden ratio, which lie far apart.
    """
    return (seed32(seed) * 0x9E3779B9 + i) % 2**32


class Batches:
    """Batch i as a function of (seed, i): each process draws it whole and takes its share.

    Of n processes each takes every n-th image: its levels are spread as the whole batch's are.
    """

    def __init__(
        self, dataset: Dataset, config: FitConfig, worker: Accelerator, kinds: Kinds | None = None
    ):
        """kinds: the conditions that the network takes. UserError where the data lack one."""
        if config.batch_size < worker.num_processes * config.accumulate:
            raise UserError(
                f"--batch-size {config.batch_size} leaves nothing for some of "
                f"{worker.num_processes} processes with --accumulate {config.accumulate}: give at "
                "least as many images as their product"
            )
        kinds = kinds or {}
        self.config, self.device = config, worker.device
        self.shape = dataset.codec.shape(dataset.spec.shape)
        self.rank, self.world = worker.process_index, worker.num_processes
        train = with_conditions(dataset.train, kinds or {})
        source, self.x0 = prepared(dataset.codec, train, config.flip)
        self.images = source.near(worker.device)
        self.generator = torch.Generator(worker.device)
        self.picker = torch.Generator(self.images.device)
        ahead = Ahead(self.images, self.which, config.iterations)
        self.ahead = ahead if self.images.slow else None
        weights = [kind for kind in kinds.values() if isinstance(kind, Guidance)]
        self.guidance = weights[0] if weights else None
        self.kinds = {name: kind for name, kind in kinds.items() if kind is not self.guidance}
        for name in [*self.kinds] or ["label"] * bool(self.guidance):
            if name not in dataset.kinds and not isinstance(kinds.get(name), Small):
                raise UserError(
                    f"the network takes a {name} for each image, but {dataset.spec.name} has none: "
                    "choose data with one"
                )

    def which(self, i: int, generator: torch.Generator | None = None) -> Tensor:
        """The indices of batch i's images, this process's share, where the images lie."""
        generator = generator or torch.Generator(self.images.device)
        generator.manual_seed(batch_seed(self.config.seed, i))
        size, device = (self.config.batch_size,), self.images.device
        which = torch.randint(len(self.images), size, generator=generator, device=device)
        return which[self.rank :: self.world]

    def close(self) -> None:
        if self.ahead:
            self.ahead.close()

    @torch.no_grad()  # a codec may be a network
    def draw(self, i: int) -> Batch:
        """This process's share of batch i."""
        size, device = self.config.batch_size, self.device
        share = slice(self.rank, None, self.world)
        seed = batch_seed(self.config.seed, i)
        random = self.generator.manual_seed(seed)
        # one generator where images and network are together, as the draws after it go on from it
        together = self.images.device.type == device.type
        which = self.which(i, random if together else self.picker)
        rows = self.ahead.take(i) if self.ahead else self.images.take(which)
        rows = _moved(rows, device)
        eps = torch.randn(size, *self.shape, generator=random, device=device)[share]
        offset = torch.rand((), generator=random, device=device, dtype=torch.float64)
        level = (torch.arange(size, device=device, dtype=torch.float64)[share] + offset) / size
        level = level.clamp(max=1 - 2**-53)  # the last may round to 1
        mirrored = torch.rand(size, generator=random, device=device)[share] < 0.5
        x0 = self.x0(rows.images, mirrored if self.config.flip else None)
        condition = {}
        if self.kinds:
            kept = torch.rand(size, generator=random, device=device)[share]
            kept = kept >= self.config.label_dropout
            for name, kind in self.kinds.items():
                known = rows.condition[name]
                if isinstance(kind, Small):
                    share_of_angle = torch.rand(size, generator=random, device=device)[share]
                    noise = torch.randn(size, *kind.shape, generator=random, device=device)[share]
                    turned = mirrored if self.config.flip else None
                    known = kind.trained(known, turned, share_of_angle, noise)
                row_kept = kept.reshape(-1, *(1,) * (known.ndim - 1))
                condition[name] = known.where(row_kept, kind.null(known))
        if self.guidance:
            low, high = self.guidance.low, self.guidance.high
            share_of_range = torch.rand(size, generator=random, device=device)[share]
            condition["guidance"] = low + (high - low) * share_of_range
        seed += self.rank * self.config.accumulate << 24
        return Batch(x0, eps, level, condition or None, seed)


def _moved(rows: Rows, device: torch.device) -> Rows:
    """To the device, at once: a copy from memory that is not pinned would wait for it."""

    def move(part: Tensor) -> Tensor:
        there = part.device.type == device.type
        return part if there else part.pin_memory().to(device, non_blocking=True)

    return Rows(move(rows.images), {name: move(part) for name, part in rows.condition.items()})
