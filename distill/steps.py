"""Steps of a teacher, or of the data in its place: the x0 that a rotation t -> s heads for."""

from collections.abc import Callable

from torch import Tensor

from diffusion.batches import Batch
from diffusion.circle import rotate

Denoise = Callable[..., Tensor]  # (x_t, t, condition) -> x0
Step = Callable[[Batch, Tensor, Tensor, Tensor], Tensor]  # (batch, x_t, t, s) -> x0


def euler_step(teacher: Denoise) -> Step:
    """The teacher's DDIM step."""
    return lambda batch, x_t, t, s: teacher(x_t, t, batch.condition)


def heun_step(teacher: Denoise) -> Step:
    """The teacher's second-order step: the trapezoid rule in cot t, diffusion.samplers.heun."""

    def step(batch: Batch, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x0 = teacher(x_t, t, batch.condition)
        return (x0 + teacher(rotate(x_t, x0, t, s), s, batch.condition)) / 2

    return step


def data_step(batch: Batch, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The true x0: consistency training."""
    return batch.x0


STEPS = {"heun": heun_step, "euler": euler_step, "data": lambda teacher: data_step}
