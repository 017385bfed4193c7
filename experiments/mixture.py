"""How near each method's one-step student comes to the exact map: `python -m experiments.mixture`.

Data is a mixture of Gaussians in one dimension, or two of them side by side: there the ODE's map
from noise to data is known, as the map between quantiles. The mixture is its own teacher; a
student is a network of four small layers, trained on one core for less than a minute.
"""

import os
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
import tyro
from torch import Tensor, nn

from diffusion.codec import Scale
from diffusion.condition import Condition
from diffusion.config import FitConfig
from diffusion.console import UserError, at_least, out, run
from diffusion.data import Dataset, ImageSpec
from diffusion.denoiser import Denoiser
from diffusion.images import InMemory
from diffusion.schedules import cosine, even
from diffusion.training import fit, one_network
from distill import cd, ct, ect, ict, scm
from distill.steps import Denoise
from experiments.exact import DATA, NOISE, Mixture

TEACHER = Mixture(weights=(0.4, 0.6), means=(-0.9, 0.6), scales=(0.5, 0.4))
FIT = FitConfig(
    iterations=6000, batch_size=512, learning_rate=5e-3, warmup=50, ema=0.999, precision="fp32"
)


@dataclass(frozen=True)
class Method:
    mode: ModuleType
    """The file of distill/ that has the objective."""
    loss: object
    """The settings of the mode's loss."""
    fit: FitConfig = FIT
    start: "Method | None" = None
    """The method whose student it starts from; None for untrained weights."""
    normalised: bool = True
    """Whether the tangent of scm is normalised."""


# The exact map is a mean over the data that x_t may come from. In one dimension the norm of a
# difference is least at a median, and normalised tangents cancel at one: methods that learn from
# the data take the square and plain tangents. So few iterations need, in continuous time, a start
# near the map.
SCM = replace(FIT, iterations=4000, learning_rate=1e-3)
ECT = Method(ect, ect.Loss(stages=8, distance="squared"))
NEAR = replace(ECT, fit=replace(FIT, iterations=3000))
METHODS = {
    "cd": Method(cd, cd.Loss(num_angles=32)),
    "ct": Method(ct, ct.Loss(distance="squared")),
    "ict": Method(ict, ict.Loss(distance="squared")),
    "ect": ECT,
    "ect-heun": Method(ect, ect.Loss(stages=8, solver="heun")),
    "scm": Method(scm, scm.Loss(tangent_warmup=0.0), SCM, NEAR),
    "scm-data": Method(
        scm,
        scm.Loss(solver="data", tangent_warmup=0.0),
        replace(SCM, iterations=2500, batch_size=1024),
        NEAR,
        normalised=False,
    ),
}


def from_scratch(mode: ModuleType, num_angles: int, **settings: float | str) -> Method:
    return Method(mode, mode.Loss(distance="squared", num_angles=num_angles, **settings))


# Other settings of ct and ict than the defaults; the table in docs/methods.md has them.
SETTINGS = {
    "ct-150-0.9": from_scratch(ct, 150, target_ema=0.9),
    "ct-80-0": from_scratch(ct, 80, target_ema=0.0),
    "ct-40-0.1": from_scratch(ct, 40, target_ema=0.1),
    "ict-160-gap": from_scratch(ict, 160, weight="sigma-gap"),
    "ict-320-gap": from_scratch(ict, 320, weight="sigma-gap"),
    "ict-320": from_scratch(ict, 320),
}
ALL = METHODS | SETTINGS


class Mlp(nn.Module):
    """(x_t (B, D, 1, 1), t (B,), condition) -> velocity."""

    def __init__(self, dimensions: int, width: int = 128):
        super().__init__()
        sizes = [dimensions + 8, width, width, width]
        hidden = [(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*chain(*hidden), nn.Linear(width, dimensions))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
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
    spec, images = ImageSpec("mixture", dimensions, 1), InMemory(x0)
    return Dataset(spec, images, images, Scale(mean=0.0, std=1.0))


def train(method: Method, dimensions: int, share: float = 1.0) -> Denoiser:
    """A student of the mixture, by this method in that share of its iterations."""
    config = replace(method.fit, iterations=round(method.fit.iterations * share))
    torch.manual_seed(config.seed)
    student = train(method.start, dimensions, share) if method.start else Denoiser(Mlp(dimensions))
    objective = method.mode.objective(method.loss, TEACHER, student, partial(even, cosine()))
    if not method.normalised:
        objective = replace(objective, normalise=lambda g: g)
    trained = getattr(method.mode, "method", one_network)(student, objective)
    dataset = samples(1 << 18, dimensions)
    with TemporaryDirectory() as folder:
        for _ in fit(trained, dataset, config, Path(folder, "state")):
            pass
    return student


@torch.no_grad()
def distance(denoise: Denoise, dimensions: int) -> float:
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
