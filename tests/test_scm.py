"""Continuous time: the tangent against closed forms, and forward mode through every layer."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import checkpoint, runs
from diffusion.circle import FROM_X0, add_noise
from diffusion.denoiser import Denoiser
from diffusion.files import load_tensors
from distill.scm import (
    NOISE,
    ContinuousConsistency,
    LogWeight,
    Loss,
    Options,
    derivative,
    distill,
    tangent,
    unit,
)
from tests.analytic import (
    BIMODAL,
    SKEWED,
    consistency_function,
    grid_batch,
    normal,
    random_denoiser,
    random_unet,
)
from tests.stopped import stopped_after

close = torch.testing.assert_close
both_kinds_of_data = pytest.mark.parametrize("data", [SKEWED, BIMODAL], ids=["gaussian", "mixture"])
BATCH = grid_batch(180, 1, 2, 2, dtype=torch.float64)
T = NOISE.tan(BATCH.level, math.pi / 2).atan()
X = add_noise(BATCH.x0, BATCH.eps, T)


def towards(data):
    return lambda batch, x_t, t: data(x_t, t)


def from_data(batch, x_t, t):
    return batch.x0


def angles(level: Tensor) -> Tensor:
    return NOISE.tan(level, math.pi / 2).atan()


def column(angle: Tensor) -> Tensor:
    return angle.reshape(-1, 1, 1, 1)


# Against truth


@both_kinds_of_data
def test_the_exact_consistency_function_does_not_change_along_the_exact_ode(data):
    exact = consistency_function(data)
    assert tangent(exact, X, T, data(X, T)).abs().max() < 1e-8
    assert ContinuousConsistency(towards(data), angles)(exact, BATCH, 0.0).max() < 1e-16
    assert tangent(data, X, T, data(X, T)).abs().mean() > 0.1  # the denoiser is not it


@both_kinds_of_data
def test_the_tangent_is_cos_t_times_the_change_along_the_exact_ode(data):
    """The denoiser's change, by central differences between two points of the ODE."""
    h = 1e-4
    ahead, behind = (data(data.flow(X, T, T + d), T + d) for d in (h, -h))
    inside = math.pi / 2 - h > T
    expected = column(T.cos()) * (ahead - behind) / (2 * h)
    close(tangent(data, X, T, data(X, T))[inside], expected[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_tangent_is_lu_and_songs_in_terms_of_the_velocity(share):
    """g = -cos^2 (F - dx/dt) - r cos sin (x + dF/dt), 2024, algorithm 1."""
    velocity = FROM_X0["v"](X, BATCH.x0, T)

    def net(x, t):
        return (1.3 * x * column(t).cos()).sin() + column(t) ** 2

    cos, sin = column(T.cos()), column(T.sin())
    f, change = derivative(net, (X, T), (velocity, torch.ones_like(T)))
    expected = -(cos**2) * (f - velocity) - share * cos * sin * (X + change)

    def denoise(x, t):
        return column(t.cos()) * x - column(t.sin()) * net(x, t)

    close(tangent(denoise, X, T, BATCH.x0, share), expected, rtol=1e-9, atol=1e-11)


def test_the_data_gives_the_teachers_tangent_on_average():
    """It is affine in the x0 that the ODE heads for, whose mean is the teacher's."""
    several = [normal(seed, *X.shape, dtype=torch.float64) for seed in range(4)]
    mean = sum(several) / 4
    tangents = sum(tangent(BIMODAL, X, T, x0, 0.7) for x0 in several) / 4
    close(tangents, tangent(BIMODAL, X, T, mean, 0.7))


@both_kinds_of_data
@pytest.mark.parametrize("theta", [-0.1, 0.1])
@pytest.mark.parametrize("normalise", [unit, lambda g: g], ids=["unit", "plain"])
def test_the_gradient_leads_a_perturbed_student_back(data, theta, normalise):
    theta, exact = torch.tensor(theta, requires_grad=True), consistency_function(data)

    def student(x_t, t, condition, dropout=None):
        return exact(x_t, t) + theta * column(t.sin()) * x_t

    objective = ContinuousConsistency(towards(data), angles, normalise=normalise)
    objective(student, BATCH, 0.0).mean().backward()
    assert theta.grad * theta > 0


def test_the_gradient_is_that_of_the_closing_gap():
    """Lu & Song 2024, eq. 5: that of w(t) f- . df-/dt, with w(t) = cos(t) / sin(t), twice."""
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def student(x_t, t, condition=None, dropout=None):
        return theta * BIMODAL(x_t, t) + (1 - theta) * x_t

    gradient = ContinuousConsistency(towards(BIMODAL), angles)(student, BATCH, 0.0).mean()
    (gradient,) = torch.autograd.grad(gradient, theta)
    h = 1e-4
    ahead, behind = (student(BIMODAL.flow(X, T, T + d), T + d) for d in (h, -h))
    change = ((ahead - behind) / (2 * h)).detach()
    weight = column(T.cos() / T.sin())
    (expected,) = torch.autograd.grad(2 * (weight * student(X, T) * change).mean(), theta)
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-4)


def test_warming_up_begins_as_diffusion_training_in_velocity():
    """With no derivative, g = cos^2 (v - F)."""
    objective = ContinuousConsistency(from_data, angles, warmup=0.5)
    loss = objective(BIMODAL, BATCH, 0.0)
    v, F_t = (FROM_X0["v"](X, x0, T) for x0 in (BATCH.x0, BIMODAL(X, T)))
    close(loss, ((column(T.cos()) ** 2 * (v - F_t)) ** 2).mean((1, 2, 3)), rtol=1e-6, atol=1e-9)
    plain = ContinuousConsistency(from_data, angles)(BIMODAL, BATCH, 0.0)
    close(objective(BIMODAL, BATCH, 0.5), plain)
    close(objective(BIMODAL, BATCH, 0.99), plain)
    assert not torch.allclose(objective(BIMODAL, BATCH, 0.25), plain)


# Normalisation and weighting


def test_a_normalised_tangent_keeps_its_direction_and_is_never_longer_than_1():
    g = normal(0, 5, 3, 4, 4) * torch.tensor([0.0, 1e-3, 0.1, 1.0, 1e6]).reshape(-1, 1, 1, 1)
    scaled = unit(g)
    norm = scaled.flatten(1).square().mean(1).sqrt()
    before = g.flatten(1).square().mean(1).sqrt()
    close(norm, before / (before + 0.1))
    close(F.cosine_similarity(scaled.flatten(1), g.flatten(1))[1:], torch.ones(4))


def test_the_learnt_weight_rests_where_it_is_the_log_of_one_over_the_loss():
    log_weight, t = LogWeight(), torch.linspace(0.01, 1.56, 50, dtype=torch.float64)
    loss = (0.3 - (2 * t).cos()).exp().float()
    optimum = -loss.log()

    def gradient() -> Tensor:
        w = log_weight(t)
        (gradient,) = torch.autograd.grad((w.exp() * loss - w).mean(), [log_weight.coefficients])
        return gradient

    assert gradient().abs().max() > 0.1
    with torch.no_grad():
        log_weight.coefficients[:2] = torch.tensor([-0.3, 1.0])
    close(log_weight(t).detach(), optimum)
    assert gradient().abs().max() < 1e-6


def test_a_weighted_loss_is_the_weight_times_the_loss_plus_its_own():
    log_weight = LogWeight()
    torch.nn.init.normal_(log_weight.coefficients)
    plain = ContinuousConsistency(from_data, angles)
    w = log_weight(T).detach()
    weighted = replace(plain, log_weight=log_weight)(BIMODAL, BATCH, 0.0).detach()
    close(weighted, w.exp() * plain(BIMODAL, BATCH, 0.0) - w)


# Forward mode through the networks

FEATURES = {
    "plain": {},
    "attention": {"attention": (8, 4)},
    "levels": {"multipliers": (1, 2, 2)},
    "classes": {"num_classes": 3},
    "dropout": {"dropout": 0.3},
    "guidance": {"num_classes": 3, "guidance": (1.0, 4.0)},
    "all": {"attention": (4,), "multipliers": (1, 2), "num_classes": 3, "dropout": 0.3},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_a_networks_derivative_is_its_central_difference(features):
    shape = {"channels": 2, "width": 8, "blocks": 1, "attention": ()}
    net = random_denoiser(**shape | features).net.double()
    condition = {"label": torch.tensor([0, 1, 3])} if "num_classes" in features else None
    x, dx = (normal(seed, 3, 2, 8, 8, dtype=torch.float64) for seed in (1, 2))
    t, dt = (torch.tensor(n, dtype=torch.float64) for n in ([1e-3, 0.8, 1.57], [1.0, -0.5, 2.0]))

    def call(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same masks every time
        return net.train()(x, t, condition)

    value, change = derivative(call, (x, t), (dx, dt))
    h = 1e-5
    with torch.no_grad():
        difference = (call(x + h * dx, t + h * dt) - call(x - h * dx, t - h * dt)) / (2 * h)
        close(value, call(x, t), rtol=0, atol=0)
    close(change, difference, rtol=1e-5, atol=1e-6)
    assert not change.requires_grad


def test_fused_attention_has_a_derivative_as_its_plain_products():
    q, k, v, dq = (normal(seed, 2, 2, 5, 4, dtype=torch.float64) for seed in range(4))
    attention = F.scaled_dot_product_attention

    def call(q: Tensor) -> Tensor:
        return attention(q, k, v)

    _, change = derivative(call, (q,), (dq,))
    close(change, (call(q + 1e-5 * dq) - call(q - 1e-5 * dq)) / 2e-5, rtol=1e-5, atol=1e-7)


def test_in_bfloat16_the_tangent_is_finite_at_all_angles_and_near_float32s():
    shape = {"channels": 2, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}
    whole = random_denoiser(num_classes=3, **shape)
    t = torch.tensor([1e-3, 1e-2, 0.4, 1.2, 1.56, math.pi / 2], dtype=torch.float64)
    label = {"label": torch.tensor([0, 1, 2, 3, 0, 1])}
    x0, eps = (normal(seed, 6, 2, 8, 8) for seed in (1, 2))
    x_t = add_noise(x0, eps, t)

    def rounded(precision: str) -> Tensor:
        denoiser = Denoiser(whole.net, precision, kinds=whole.kinds)
        return tangent(partial(denoiser, condition=label), x_t, t, x0)

    full, half = rounded("fp32"), rounded("bf16")
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    error = (half - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
    assert error[:-1].max() < 0.05
    assert full[-1].abs().max() < 1e-6  # cos t: at pure noise f may change
    assert half[-1].abs().max() < 1e-6


class Wrapped:
    """As DistributedDataParallel: what is called past it, it does not see."""

    def __init__(self, module):
        self.module, self.calls = module, []

    def __call__(self, x_t, t, condition=None, dropout=None):
        self.calls.append((torch.is_grad_enabled(), torch.autograd.forward_ad._current_level))
        return self.module(x_t, t, condition, dropout=dropout)


def test_the_loss_alone_goes_through_the_wrapper_that_synchronises_gradients():
    student = Wrapped(Denoiser(random_unet(width=8, multipliers=(1,), blocks=1, attention=())))
    batch = grid_batch(4, 1, 8, 8)
    loss = ContinuousConsistency(from_data, angles)(student, batch, 0.0)
    assert student.calls == [(True, -1)]  # with gradients, without forward mode
    assert loss.requires_grad


def test_both_passes_drop_the_same_units():
    student = Denoiser(random_unet(width=8, multipliers=(1,), blocks=1, dropout=0.5)).train()
    values = []
    student.register_forward_hook(lambda module, inputs, x0: values.append(x0.detach().clone()))
    ContinuousConsistency(from_data, angles)(student, grid_batch(4, 1, 8, 8), 0.0)
    assert len(values) == 2
    close(values[0], values[1])


# Training


@pytest.mark.parametrize("solver", ["euler", "data"])
def test_a_stopped_run_resumes_with_its_learnt_weight_bit_for_bit(
    solver, teacher, quick, tmp_path, monkeypatch
):
    def student(out, **changes):
        config = replace(quick, iterations=10, **changes)
        options = Options(teacher=teacher, out=out, loss=Loss(solver=solver), fit=config)
        return distill(options)

    whole = student(tmp_path / "whole")
    monkeypatch.setattr(runs, "fit", stopped_after(1))
    with pytest.raises(KeyboardInterrupt):
        student(tmp_path / "stopped", save_every=0.0)
    state, _ = load_tensors(tmp_path / "stopped" / "state" / "state.safetensors")
    assert state["log_weight.coefficients"].abs().max() > 0
    monkeypatch.undo()
    resumed = student(tmp_path / "stopped")
    assert resumed.sha256 == whole.sha256
    assert "log_weight" not in " ".join(checkpoint.load(tmp_path / "whole")[0])
