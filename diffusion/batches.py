"""Training batches: batch i is a function of (seed, i), so nothing random needs to be saved."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.data import Dataset
from diffusion.denoiser import Condition
from diffusion.noise import seed32


class Batch(NamedTuple):
    """All that is random in a training step, so that an objective is a function of its inputs."""

    x0: Tensor
    """(B, C, H, W) float32, zero mean and unit variance."""
    eps: Tensor
    """(B, C, H, W) standard normal."""
    level: Tensor
    """(B,) float64 in [0, 1), stratified over the global batch (Kingma et al. 2021, app. I.1)."""
    label: Tensor | Condition | None
    """(B,) int64; with a guidance weight for a network that takes one. Objectives pass it on."""
    seed: int
    """torch.manual_seed(seed) before a second network pass repeats the first's dropout mask."""


def batch_seed(seed: int, i: int) -> int:
    """Another for every seed and batch: in 32 bits, all that a CPU's generator takes of it.

    Seeds' runs of batches begin at multiples of the golden ratio, which lie far apart.
    """
    return (seed32(seed) * 0x9E3779B9 + i) % 2**32


class Batches:
    """Batch i as a function of (seed, i): each process draws it whole and takes its share.

    guidance: the range that the network's guidance weights are drawn from, uniformly.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: FitConfig,
        worker: Accelerator,
        guidance: tuple[float, float] | None = None,
    ):
        if config.batch_size % worker.num_processes:
            raise UserError(
                f"--batch-size {config.batch_size} does not divide among {worker.num_processes} "
                "processes: give a multiple of their number"
            )
        self.config, self.spec, self.device = config, dataset.spec, worker.device
        self.rank, self.world = worker.process_index, worker.num_processes
        self.generator = self.picker = torch.Generator(worker.device)
        home = worker.device
        if not _fits(dataset.train, home):  # picked where they lie, so that nothing waits
            home, self.picker = torch.device("cpu"), torch.Generator()
        self.images = dataset.train.to(home)
        self.labels = None
        if dataset.spec.num_classes and dataset.train_labels is not None:
            self.labels = dataset.train_labels.to(home)
        self.guidance = guidance
        if guidance and self.labels is None:
            raise UserError(
                f"guidance needs classes, but {dataset.spec.name} has none: choose data with labels"
            )

    def draw(self, i: int) -> Batch:
        size, device, share = (
            self.config.batch_size,
            self.device,
            slice(self.rank, None, self.world),
        )
        seed = batch_seed(self.config.seed, i)
        random, picker = self.generator.manual_seed(seed), self.picker.manual_seed(seed)
        count, home = len(self.images), self.picker.device
        which = torch.randint(count, (size,), generator=picker, device=home)[share]
        eps = torch.randn(size, *self.spec.shape, generator=random, device=device)[share]
        offset = torch.rand((), generator=random, device=device, dtype=torch.float64)
        level = (torch.arange(size, device=device, dtype=torch.float64)[share] + offset) / size
        level = level.clamp(max=1 - 2**-53)  # the last may round to 1
        mirrored = torch.rand(size, generator=random, device=device)[share] < 0.5
        x0 = self.spec.to_unit(_moved(self.images[which], device))
        if self.config.flip:
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        label = None
        if self.labels is not None:
            known = _moved(self.labels[which], device)
            dropped = torch.rand(size, generator=random, device=device)[share]
            label = known.where(dropped >= self.config.label_dropout, self.spec.num_classes)
        if self.guidance:
            low, high = self.guidance
            share_of_range = torch.rand(size, generator=random, device=device)[share]
            label = Condition(label, low + (high - low) * share_of_range)
        seed += self.rank << 24
        torch.manual_seed(seed)
        return Batch(x0, eps, level, label, seed)


def _moved(rows: Tensor, device: torch.device) -> Tensor:
    """To the device, at once: a copy from memory that is not pinned would wait for it."""
    there = rows.device.type == device.type
    return rows if there else rows.pin_memory().to(device, non_blocking=True)


def _fits(images: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 4
