"""How near each method's one-step student comes to the exact map: `python -m benchmarks.mixture`.

Data is a mixture of Gaussians in one dimension, or two of them side by side: there the ODE's map
from noise to data is known, as the map between quantiles. The mixture is its own teacher, a
student is a network of four small layers, trained on one core for less than a minute.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from torch import Tensor, nn

from diffusion.config import FitConfig
from diffusion.console import out, run
from diffusion.data import Dataset, ImageSpec
from diffusion.denoiser import Denoiser
from diffusion.schedules import cosine
from diffusion.training import fit
from distill.consistency import MODES, settings
from distill.consistency import Options as Settings
from tests.analytic import DATA, NOISE, Mixture

TEACHER = Mixture(weights=(0.4, 0.6), means=(-0.9, 0.6), scales=(0.5, 0.4))
FIT = FitConfig(
    iterations=6000, batch_size=512, learning_rate=5e-3, warmup=50, ema=0.999, precision="fp32"
)
# Forward mode makes an iteration of scm about twice as long.
SCM = replace(FIT, iterations=4000, learning_rate=3e-3)
# What is told where the command's defaults will not do. The exact map is a mean over the data
# that x_t may come from, but in one dimension the norm of a difference is least at a median: what
# is taught by the data takes the square. So few iterations call for few angles and fast targets.
METHODS = {
    "cd": ({"mode": "cd", "num_angles": 32}, FIT),
    "ct": ({"mode": "ct", "num_angles": 80, "target_ema": 0.1, "distance": "squared"}, FIT),
    "ict": ({"mode": "ict", "num_angles": 320, "distance": "squared"}, FIT),
    "ect": ({"mode": "ect", "stages": 8, "distance": "squared"}, FIT),
    "ect, teacher's step": ({"mode": "ect", "stages": 8, "solver": "heun"}, FIT),
    "scm": ({"mode": "scm"}, SCM),
    "scm, training": ({"mode": "scm", "solver": "data"}, SCM),
}


class Mlp(nn.Module):
    """(x_t (B, D, 1, 1), t (B,), label) -> velocity."""

    def __init__(self, dimensions: int, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dimensions + 8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dimensions),
        )

    def forward(self, x_t: Tensor, t: Tensor, label=None) -> Tensor:
        phase = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        inputs = torch.cat([x_t.flatten(1), phase.sin(), phase.cos()], dim=1)
        return self.layers(inputs).reshape(x_t.shape)


def samples(count: int, dimensions: int) -> Dataset:
    """The mixture's, as images of one pixel in as many channels."""
    random = torch.Generator().manual_seed(0)
    shape = (count, dimensions, 1, 1)
    weights, means, scales = (
        torch.tensor(n) for n in (TEACHER.weights, TEACHER.means, TEACHER.scales)
    )
    which = torch.multinomial(weights, count * dimensions, True, generator=random).reshape(shape)
    x0 = means[which] + scales[which] * torch.randn(shape, generator=random)
    spec = ImageSpec("mixture", dimensions, 1, num_classes=0, mean=0.0, std=1.0)
    return Dataset(spec, x0, None, x0, None)


def train(method: dict, dimensions: int, config: FitConfig) -> Denoiser:
    """A student by these settings, of the mixture as its teacher."""
    options = Settings(fit=config, **method)
    options = replace(options, **settings(options))
    teacher = SimpleNamespace(denoiser=TEACHER, schedule=cosine(), device=torch.device("cpu"))
    torch.manual_seed(config.seed)
    student = Denoiser(Mlp(dimensions))
    objective = MODES[options.mode].objective(options, teacher, student)
    state = Path(tempfile.mkdtemp()) / "state"
    for _ in fit(student, objective, samples(1 << 18, dimensions), config, state):
        pass
    return student


@torch.no_grad()
def distance(denoise, dimensions: int) -> float:
    """Root mean square, over noise, of the distance between one step and the exact map."""
    noise = torch.randn(1 << 14, dimensions, 1, 1, generator=torch.Generator().manual_seed(1))
    exact = TEACHER.flow(noise, NOISE, DATA)
    return float((denoise(noise, NOISE) - exact).square().sum(1).mean().sqrt())


@dataclass(frozen=True)
class Options:
    """Train a one-step student by each method, and compare it with one step of DDIM."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Some of them."""
    dimensions: tuple[int, ...] = (1, 2)
    """Of the data."""
    share: float = 1.0
    """Of each method's iterations."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.mixture")
    torch.set_num_threads(1)
    for dimensions in options.dimensions:
        ddim = distance(TEACHER, dimensions)
        out.print(f"{dimensions} dimensions, one step of DDIM: {ddim:.4f}")
        for name in options.methods:
            method, config = METHODS[name]
            iterations = round(config.iterations * options.share)
            start = time.process_time()
            student = train(method, dimensions, replace(config, iterations=iterations))
            seconds, ours = time.process_time() - start, distance(student, dimensions)
            out.print(f"{name:20} {ours:.4f}  {ddim / ours:6.1f} times nearer  {seconds:5.1f} s")


if __name__ == "__main__":
    run(main)
