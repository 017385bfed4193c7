"""Where a consistency student's further steps restart: the angles of the least distance."""

from itertools import product

import torch
from torch import Tensor

from diffusion.console import say, track
from diffusion.model import Model
from diffusion.plan import plan
from diffusion.schedules import even
from eval.measure.judge import Judge
from eval.measure.metrics import Moments, frechet_distance
from eval.measure.stream import indices

SEED = 1_000_003  # its noise alone: the figures in the table are of other seeds
GRID = 7  # angles tried between two neighbours
REACH = (1.0, 0.3)  # of the way to its neighbours, pass by pass


def search_angles(
    judge: Judge, model: Model, num_steps: int, num_images: int, batch_size: int
) -> Tensor:
    """The (num_steps + 1,) ascending angles, from 0 to the model's last, of the least distance.

    Coordinate descent from equal steps: each inner angle in turn tries an even grid between its
    neighbours, all with the same noise; the second pass tries a finer grid about what the first
    found. A search over a noisy metric fits the noise too, so whoever reports draws anew.
    """

    def distance(angles: Tensor) -> float:
        parts = []
        for start in range(0, num_images, batch_size):
            numbers = indices(model, start, min(start + batch_size, num_images))
            tried = plan("consistency", angles, model.card.guidance)
            given = judge.dataset.given(numbers, model.kinds)
            images = model.sample(tried, SEED, numbers, given)
            parts.append(Moments.of(judge.extractor.extract(images)))
        return frechet_distance(sum(parts[1:], parts[0]), judge.real["own"])

    best = even(model.schedule, num_steps, model.card.shift)
    least = distance(best)
    turns = [*product(REACH, range(1, num_steps))]
    title, count = f"search, {num_steps} steps", len(turns)
    for _, (reach, i) in track(enumerate(turns), title, lambda turn: (turn[0], count, "angles")):
        below, here, above = best[i - 1 : i + 2].tolist()
        low, high = here - reach * (here - below), here + reach * (above - here)
        for angle in torch.linspace(low, high, GRID + 2, dtype=torch.float64)[1:-1]:
            tried = best.clone()
            tried[i] = angle
            if (value := distance(tried)) < least:
                best, least = tried, value
    restarts = ", ".join(f"{angle:.4f}" for angle in best.flip(0)[:-1])
    say(f"search: {num_steps} steps at {restarts}: {least:.4g} of the search's own noise")
    return best
