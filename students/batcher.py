"""Dynamic batching: requests that wait at the same time are made in one batch of the network."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffusion.condition import Condition
from diffusion.plan import Plan
from students.api import ImageModel
from students.filters import Filter


class Full(Exception):
    """More images wait than may. `seconds`: about how long until there is room."""

    def __init__(self, seconds: float):
        super().__init__(f"too many images wait: try again in {seconds:.0f} s")
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """A request's images."""

    plan: Plan
    seed: int
    numbers: range
    condition: Condition
    """Rows (len(numbers), ...) by name, for all that the model takes."""
    done: asyncio.Future
    parts: list[tuple[Tensor, np.ndarray]] = field(default_factory=list)
    taken: int = 0
    """How many of its images are in a batch, or made."""


Part = tuple[Job, slice]  # rows of a job


@dataclass
class Batcher:
    """Makes the images of jobs, in the order they came, several jobs in one batch.

    Jobs of one plan share a batch; image i of a seed does not depend on who else is in it. While a
    batch is made, in `thread`, requests gather for the next: nobody waits for a batch to fill.
    """

    maker: ImageModel
    size: int
    """Images of a batch at most."""
    most: int
    """Images that may wait."""
    screen: Filter | None = None
    seen: Callable[[int, int], None] = lambda images, blocked: None
    """Called after each batch: its images, and how many of them were blocked."""
    exact: bool = False
    """Whether every batch has `size` rows: how many there are can change the last bits."""
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    """The one thread in which the network is called."""
    jobs: deque[Job] = field(default_factory=deque)
    pace: float = 0.0
    """Seconds that an image took in the last batch."""

    def __post_init__(self):
        self.came = asyncio.Event()

    @property
    def waiting(self) -> int:
        return sum(len(job.numbers) - job.taken for job in self.jobs)

    async def images(
        self, plan: Plan, seed: int, numbers: range, condition: Condition
    ) -> tuple[Tensor, np.ndarray]:
        """The images (N, C, H, W) uint8, and which of them were blocked (N,) bool.

        Raises Full. When its caller is cancelled, what is not made yet is not made.
        """
        if self.waiting + len(numbers) > self.most:
            raise Full(max(1.0, self.pace * self.waiting))
        job = Job(plan, seed, numbers, condition, asyncio.get_running_loop().create_future())
        self.jobs.append(job)
        self.came.set()
        return await job.done

    async def run(self) -> None:
        """Make batches, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            parts = self._take()
            if not parts:
                self.came.clear()
                await self.came.wait()
                continue
            begun = time.perf_counter()
            try:
                images, blocked = await loop.run_in_executor(self.thread, self._make, parts)
            except Exception as error:  # the service goes on, and these requests hear of it
                for job, _ in parts:
                    if not job.done.done():
                        job.done.set_exception(error)
                continue
            seconds = time.perf_counter() - begun
            self.pace = seconds / len(images)
            self.seen(len(images), int(blocked.sum()))
            self._hand_out(parts, images, blocked)
            await self._settled(seconds)

    async def _settled(self, seconds: float) -> None:
        """Let those who were answered ask again, or they would share no batch with those who wait.

        seconds: what the last batch took. No more than a fifth of it is waited, and only while
        more come.
        """
        until, before = time.perf_counter() + seconds / 5, 0
        while before < self.waiting < self.size and time.perf_counter() < until:
            before = self.waiting
            await asyncio.sleep(seconds / 10)

    def _take(self) -> list[Part]:
        """The next batch: rows of the first job, and of others by the same plan."""
        while self.jobs and self.jobs[0].done.done():  # cancelled, or failed
            self.jobs.popleft()
        parts: list[Part] = []
        room = self.size
        for job in list(self.jobs):
            if room and job.plan == self.jobs[0].plan and not job.done.done():
                count = min(room, len(job.numbers) - job.taken)
                parts.append((job, slice(job.taken, job.taken + count)))
                job.taken += count
                room -= count
        self.jobs = deque(job for job in self.jobs if job.taken < len(job.numbers))
        return parts

    def _make(self, parts: Sequence[Part]) -> tuple[Tensor, np.ndarray]:
        device, plan = self.maker.device, parts[0][0].plan
        numbers = [number for job, rows in parts for number in job.numbers[rows]]
        seeds = [job.seed for job, rows in parts for _ in job.numbers[rows]]
        rows = torch.arange(max(self.size if self.exact else 0, len(numbers)), device=device)
        rows = rows.clamp(max=len(numbers) - 1)  # the last one again, where there are too few

        def whole(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)[rows]

        condition = {
            name: torch.cat([job.condition[name][part] for job, part in parts])[rows]
            for name in parts[0][0].condition
        }
        images = self.maker.make(plan, whole(seeds), whole(numbers), condition)
        images = images[: len(numbers)].cpu()
        return self.screen(images) if self.screen else (images, np.zeros(len(images), bool))

    def _hand_out(self, parts: Sequence[Part], images: Tensor, blocked: np.ndarray) -> None:
        start = 0
        for job, rows in parts:
            end = start + rows.stop - rows.start
            job.parts.append((images[start:end], blocked[start:end]))
            start = end
            if rows.stop == len(job.numbers) and not job.done.done():
                made, which = zip(*job.parts, strict=True)
                job.done.set_result((torch.cat(made), np.concatenate(which)))


def best_batch(maker: ImageModel, plan: Plan, most: int = 256, enough: float = 1.0) -> int:
    """The least batch of nearly the most images a second, up to `most`.

    Measured in powers of two, each once after a first call, until one takes `enough` seconds.
    """
    pace: dict[int, float] = {}
    size, seconds = 1, 0.0
    _timed(maker, plan, 1)  # what a first call prepares
    while size <= most and seconds < enough:
        seconds = _timed(maker, plan, size)
        pace[size] = size / seconds
        size *= 2
    return next(size for size in pace if pace[size] >= 0.9 * max(pace.values()))


def _timed(maker: ImageModel, plan: Plan, size: int) -> float:
    begun = time.perf_counter()
    maker.make(plan, 0, torch.arange(size, device=maker.device), {}).cpu()
    return time.perf_counter() - begun
