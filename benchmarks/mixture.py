"""How near each method's one-step student comes to the exact map: `python -m benchmarks.mixture`.

Data is a mixture of Gaussians in one dimension, or two of them side by side: there the ODE's map
from noise to data is known, as the map between quantiles. The mixture is its own teacher, a
student is a network of three small layers, trained on one core for less than a minute.
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
from diffusion.console import out, run, say
from diffusion.data import Dataset, ImageSpec
from diffusion.denoiser import Denoiser
from diffusion.schedules import cosine
from diffusion.training import fit
from distill.consistency import MODES, settings
from distill.consistency import Options as Settings
from tests.analytic import BIMODAL, DATA, NOISE

NOISY_SETTINGS = {"distance": "squared"}
# What differs from the command's defaults, and why. In so few dimensions the norm of a difference
# has its least value at a median over the data that x_t may come from, the exact map is a mean:
# what is taught by the data takes the square, and no normalised tangent.
METHODS = {
    "cd": {"mode": "cd", "num_angles": 32},
    "ct": {"mode": "ct", **NOISY_SETTINGS},
    "ict": {"mode": "ict", **NOISY_SETTINGS},
    "ect": {"mode": "ect", "stages": 8, **NOISY_SETTINGS},
    "ect, teacher's step": {"mode": "ect", "stages": 8, "solver": "heun"},
    "scm": {"mode": "scm"},
    "scm, training": {"mode": "scm", "solver": "data"},
}
FIT = FitConfig(
    iterations=5000, batch_size=2048, learning_rate=1e-2, warmup=50, ema=0.999, precision="fp32"
)


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
        torch.tensor(n) for n in (BIMODAL.weights, BIMODAL.means, BIMODAL.scales)
    )
    which = torch.multinomial(weights, count * dimensions, True, generator=random).reshape(shape)
    x0 = means[which] + scales[which] * torch.randn(shape, generator=random)
    spec = ImageSpec("mixture", dimensions, 1, num_classes=0, mean=0.0, std=1.0)
    return Dataset(spec, x0, None, x0, None)


def train(method: dict, dimensions: int, config: FitConfig) -> Denoiser:
    """A student by these settings, of the mixture as its teacher."""
    options = Settings(fit=config, **method)
    options = replace(options, **settings(options))
    teacher = SimpleNamespace(denoiser=BIMODAL, schedule=cosine(), device=torch.device("cpu"))
    torch.manual_seed(config.seed)
    student = Denoiser(Mlp(dimensions))
    objective = MODES[options.mode].objective(options, teacher, student)
    if options.mode == "scm" and options.solver == "data":
        objective = replace(objective, normalise=lambda g: g)
    state = Path(tempfile.mkdtemp()) / "state"
    for _ in fit(student, objective, samples(1 << 18, dimensions), config, state):
        pass
    return student


@torch.no_grad()
def distance(denoise, dimensions: int) -> float:
    """Root mean square, over noise, of the distance between one step and the exact map."""
    noise = torch.randn(1 << 14, dimensions, 1, 1, generator=torch.Generator().manual_seed(1))
    exact = BIMODAL.flow(noise, NOISE, DATA)
    return float((denoise(noise, NOISE) - exact).square().sum(1).mean().sqrt())


@dataclass(frozen=True)
class Options:
    """Train a one-step student by each method, and compare it with one step of DDIM."""

    methods: tuple[str, ...] = tuple(METHODS)
    dimensions: tuple[int, ...] = (1, 2)
    iterations: int = FIT.iterations


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.mixture")
    config = replace(FIT, iterations=options.iterations, log_every=options.iterations)
    torch.set_num_threads(1)
    for dimensions in options.dimensions:
        ddim = distance(BIMODAL, dimensions)
        out.print(f"{dimensions} dimensions, one step of DDIM: {ddim:.4f}")
        for name in options.methods:
            start = time.perf_counter()
            student = train(METHODS[name], dimensions, config)
            seconds, ours = time.perf_counter() - start, distance(student, dimensions)
            say(f"{name:20} {ours:.4f}  {ddim / ours:6.1f} times nearer  {seconds:5.1f} s")


if __name__ == "__main__":
    run(main)
