import math

import pytest
import torch

from diffusion.noise import Noise
from diffusion.samplers import sample
from diffusion.schedules import linear_beta, respace
from diffusion.sde import PROCESSES, VP, Process
from tests.analytic import BIMODAL, DATA, SKEWED, Gaussian, Mixture, normal

close = torch.testing.assert_close


def runge_kutta(slope, y: torch.Tensor, start: float, end: float, steps: int) -> torch.Tensor:
    h = (end - start) / steps
    for i in range(steps):
        tau = torch.tensor(start + i * h, dtype=torch.float64)
        a = slope(tau, y)
        b = slope(tau + h / 2, y + h / 2 * a)
        c = slope(tau + h / 2, y + h / 2 * b)
        y = y + h / 6 * (a + 2 * b + 2 * c + slope(tau + h, y + h * c))
    return y


@pytest.mark.parametrize("tau", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_an_sdes_moments_are_those_of_its_point_on_the_circle_scaled(process: Process, tau):
    """Gaussian data, from the SDE's own drift and diffusion (Sarkka & Solin 2019, eq. 5.50 and 5.51)."""

    def slope(tau, y):
        f, g = process.drift(tau), process.diffusion(tau)
        return torch.stack([f * y[0], 2 * f * y[1] + g**2])

    moments = torch.tensor([SKEWED.mean, SKEWED.scale**2], dtype=torch.float64)
    moments = runge_kutta(slope, moments, 0.0, tau, 400)
    tau = torch.tensor(tau, dtype=torch.float64)
    t, scale = process.angle(tau), process.scale(tau)
    mean = SKEWED.mean * t.cos()
    variance = SKEWED.scale**2 * t.cos() ** 2 + t.sin() ** 2
    close(torch.stack([scale * mean, scale**2 * variance]), moments, rtol=1e-7, atol=1e-9)


def log_density(data: Gaussian | Mixture, process: Process, x, tau) -> torch.Tensor:
    """Of alpha x0 + sigma eps, summed over pixels."""
    if isinstance(data, Gaussian):
        data = Mixture((1.0,), (data.mean,), (data.scale,))
    weight, mean, scale = (
        torch.tensor(n, dtype=torch.float64) for n in (data.weights, data.means, data.scales)
    )
    deviation = (process.alpha(tau) ** 2 * scale**2 + process.sigma(tau) ** 2).sqrt()
    z = (x[..., None] - process.alpha(tau) * mean) / deviation
    return (weight.log() - deviation.log() - z**2 / 2).logsumexp(-1).sum()


@pytest.mark.parametrize("tau", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("data", [SKEWED, BIMODAL], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_score_is_the_gradient_of_the_log_density(process, data, tau):
    tau = torch.tensor(tau, dtype=torch.float64)
    x = (process.scale(tau) * normal(0, 4, 1, 3, 3, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(data, process, x, tau), x)
    close(process.score(data, x.detach(), tau), gradient, rtol=1e-7, atol=1e-9)


def test_the_score_takes_a_time_for_each_image():
    tau, x = torch.tensor([0.2, 0.7], dtype=torch.float64), normal(0, 2, 1, 2, 2)
    each = [VP.score(BIMODAL, x[i : i + 1], tau[i]) for i in range(2)]
    close(VP.score(BIMODAL, x, tau), torch.cat(each))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_at_time_0_a_process_is_the_data_itself(process):
    assert process.angle(DATA) == 0
    assert process.scale(DATA) == 1


def test_vp_is_the_limit_of_ddpms_linear_betas():
    """Song et al. 2021b, appendix B: within the first order of 1000 steps."""
    close(VP.angles().sin(), linear_beta().sin(), rtol=0, atol=3e-3)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_predictor_and_corrector_reverse_the_sde_to_the_datas_moments(process):
    """Within 5 standard errors, and 3% in deviation, of which Langevin steps leave 1.3%."""
    images, pixels = 64, 256
    noise = Noise(0, torch.arange(images), (1, 16, 16))
    x0 = sample(SKEWED, noise, "predictor-corrector", respace(process.angles(), 200)).double()
    error = SKEWED.scale / math.sqrt(images * pixels)
    # VE ends at 50 data deviations of noise, from where x0 is still seen a little
    assert x0.mean().item() == pytest.approx(SKEWED.mean, abs=5 * error + 0.01)
    assert x0.std().item() == pytest.approx(SKEWED.scale, rel=0.03 + 5 * error)
