"""How near each method's one-step student comes to the exact map: `python -m experiments.mixture`.

Data is a mixture of Gaussians in one dimension, or two of them side by side: there the ODE's map
from noise to data is known, as the map between quantiles. The mixture is its own teacher; a
student is a network of four small layers, trained on one core for less than a minute.
"""

import os
import time
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import tyro
from torch import Tensor, nn

from diffusion.config import FitConfig
from diffusion.console import UserError, at_least, out, run
from diffusion.data import Dataset, ImageSpec
from diffusion.denoiser import Denoiser
from diffusion.schedules import cosine
from diffusion.training import Objective, fit
from distill.consistency import MODES, settings
from distill.consistency import Options as Settings
from experiments.exact import DATA, NOISE, Mixture

TEACHER = Mixture(weights=(0.4, 0.6), means=(-0.9, 0.6), scales=(0.5, 0.4))
FIT = FitConfig(
    iterations=6000, batch_size=512, learning_rate=5e-3, warmup=50, ema=0.999, precision="fp32"
)


@dataclass(frozen=True)
class Method:
    mode: str
    options: dict
    """Options of the mode, where its defaults will not do."""
    fit: FitConfig = FIT
    start: "Method | None" = None
    """The method whose student it starts from; None for untrained weights."""
    normalised: bool = True
    """Whether the tangent of scm is normalised."""


# The exact map is a mean over the data that x_t may come from. In one dimension the norm of a
# difference is least at a median, and normalised tangents cancel at one: methods that learn from
# the data take the square and plain tangents. So few iterations need, in continuous time, a start
# near the map.
SQUARED = {"distance": "squared"}
SCM = replace(FIT, iterations=4000, learning_rate=1e-3)
ECT = Method("ect", {"stages": 8, **SQUARED})
NEAR = replace(ECT, fit=replace(FIT, iterations=3000))
METHODS = {
    "cd": Method("cd", {"num_angles": 32}),
    "ct": Method("ct", SQUARED),
    "ict": Method("ict", SQUARED),
    "ect": ECT,
    "ect-heun": Method("ect", {"stages": 8, "solver": "heun"}),
    "scm": Method("scm", {"tangent_warmup": 0.0}, SCM, NEAR),
    "scm-data": Method(
        "scm",
        {"solver": "data", "tangent_warmup": 0.0},
        replace(SCM, iterations=2500, batch_size=1024),
        NEAR,
        normalised=False,
    ),
}
# Other settings of ct and ict than the defaults; the table in docs/methods.md has them.
SETTINGS = {
    "ct-150-0.9": Method("ct", {"num_angles": 150, "target_ema": 0.9, **SQUARED}),
    "ct-80-0": Method("ct", {"num_angles": 80, "target_ema": 0.0, **SQUARED}),
    "ct-40-0.1": Method("ct", {"num_angles": 40, "target_ema": 0.1, **SQUARED}),
    "ict-160-gap": Method("ict", {"num_angles": 160, "weight": "sigma-gap", **SQUARED}),
    "ict-320-gap": Method("ict", {"num_angles": 320, "weight": "sigma-gap", **SQUARED}),
    "ict-320": Method("ict", {"num_angles": 320, **SQUARED}),
}
ALL = METHODS | SETTINGS


class Mlp(nn.Module):
    """(x_t (B, D, 1, 1), t (B,), label) -> velocity."""

    def __init__(self, dimensions: int, width: int = 128):
        super().__init__()
        sizes = [dimensions + 8, width, width, width]
        hidden = [(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*chain(*hidden), nn.Linear(width, dimensions))

    def forward(self, x_t: Tensor, t: Tensor, label=None) -> Tensor:
        phase = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        inputs = torch.cat([x_t.flatten(1), phase.sin(), phase.cos()], dim=1)
        return self.layers(inputs).reshape(x_t.shape)


def samples(count: int, dimensions: int) -> Dataset:
    """Samples of the mixture, as images of one pixel in as many channels."""
    random = torch.Generator().manual_seed(0)
    shape = (count, dimensions, 1, 1)
    weights, means, scales = (
        torch.tensor(n) for n in (TEACHER.weights, TEACHER.means, TEACHER.scales)
    )
    rows = torch.multinomial(weights, count * dimensions, True, generator=random).reshape(shape)
    x0 = means[rows] + scales[rows] * torch.randn(shape, generator=random)
    spec = ImageSpec("mixture", dimensions, 1, num_classes=0, mean=0.0, std=1.0)
    return Dataset(spec, x0, None, x0, None)


def objective(method: Method, student: nn.Module) -> Objective:
    options = Settings(mode=method.mode, **method.options)
    options = replace(options, **settings(options))
    teacher = SimpleNamespace(denoiser=TEACHER, schedule=cosine(), device=torch.device("cpu"))
    teacher.card = SimpleNamespace(shift=1.0)
    made = MODES[method.mode].objective(options, teacher, student)
    return made if method.normalised else replace(made, normalise=lambda g: g)


def train(method: Method, dimensions: int, share: float = 1.0) -> Denoiser:
    """A student of the mixture, by this method in that share of its iterations."""
    config = replace(method.fit, iterations=round(method.fit.iterations * share))
    torch.manual_seed(config.seed)
    student = train(method.start, dimensions, share) if method.start else Denoiser(Mlp(dimensions))
    dataset = samples(1 << 18, dimensions)
    with TemporaryDirectory() as folder:
        for _ in fit(student, objective(method, student), dataset, config, Path(folder, "state")):
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
    """Say how near each method's one-step student comes to the exact answer, on a mixture of
    Gaussians."""

    methods: tuple[str, ...] = tuple(METHODS)
    """The methods to try, by name; besides these, other settings of ct and ict: ct-150-0.9,
    ct-80-0, ct-40-0.1 (angles, decay of the target), ict-160-gap, ict-320-gap and ict-320
    (angles, --weight)."""
    dimensions: tuple[int, ...] = (1, 2)
    """Dimensions of the data, one comparison a number."""
    share: float = 1.0
    """Share of each method's iterations to train: less than 1 for a quicker look."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m experiments.mixture")
    at_least(1, options, "dimensions")
    if unknown := [name for name in options.methods if name not in ALL]:
        raise UserError(f"--methods must be of {', '.join(ALL)}, got {', '.join(unknown)}")
    if not 0 < options.share <= 1:
        raise UserError(f"--share must be above 0 and at most 1, got {options.share:g}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all of it is on the CPU
    torch.set_num_threads(1)
    for dimensions in options.dimensions:
        ddim = distance(TEACHER, dimensions)
        out.print(f"dimensions: {dimensions}, one step of DDIM: {ddim:.4f}")
        for name in options.methods:
            start = time.process_time()
            student = train(ALL[name], dimensions, options.share)
            seconds, error = time.process_time() - start, distance(student, dimensions)
            out.print(f"{name:12} {error:.4f}  {ddim / error:6.1f} times nearer  {seconds:5.1f} s")


if __name__ == "__main__":
    run(main)
