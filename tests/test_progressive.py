from itertools import pairwise

import pytest
import torch

from diffusion.circle import add_noise, rotate
from diffusion.schedules import SCHEDULES, halve, respace
from distill.progressive import Halving, merged_target, steps_table
from tests.analytic import BIMODAL, SKEWED, grid_batch, normal

close = torch.testing.assert_close


def ddim_steps(teacher, x: torch.Tensor, angles: list[torch.Tensor]) -> torch.Tensor:
    """The teacher's steps, by velocity and in float64 (Salimans & Ho 2022, appendix D)."""
    for t, s in pairwise(angle[:, None, None, None] for angle in angles):
        v = (t.cos() * x - teacher(x, t)) / t.sin()
        x = (t - s).cos() * x - (t - s).sin() * v
    return x


def columns(table: torch.Tensor) -> list[torch.Tensor]:
    return list(table.unbind(1))


@pytest.fixture(params=[(2000, 2), (125, 2), (4, 2), (2, 2), (1000, 4), (63, 4), (3, 4)], ids=str)
def count_and_factor(request) -> tuple[int, int]:
    return request.param


@pytest.fixture(params=["linear", "cosine", "karras"])
def angles(request, count_and_factor) -> torch.Tensor:
    return SCHEDULES[request.param](count_and_factor[0])


@pytest.fixture
def table(angles, count_and_factor) -> torch.Tensor:
    return steps_table(angles, count_and_factor[1])


def test_a_table_spans_the_teachers_list_by_the_students(angles, table, count_and_factor):
    student = halve(angles, count_and_factor[1])
    assert torch.equal(table[:, 0], student[1:])
    assert torch.equal(table[:, -1], student[:-1])
    assert set(table.flatten().tolist()) == set(angles.tolist())
    assert (table.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("teacher", [SKEWED, BIMODAL], ids=["gaussian", "mixture"])
def test_the_target_is_the_x0_of_one_step_that_does_all_the_teachers(table, teacher):
    """Salimans & Ho 2022, appendix G, solved for x0 in float64; one image for each student step."""
    x_t = normal(0, len(table), 1, 2, 2)
    x_s = ddim_steps(teacher, x_t.double(), columns(table))
    t, s = table[:, 0, None, None, None], table[:, -1, None, None, None]
    exact = (t.sin() * x_s - s.sin() * x_t) / (t - s).sin()
    target = merged_target(teacher, x_t, columns(table))
    assert target.dtype == torch.float32
    close(target.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_rotation_towards_the_target_arrives_where_the_teachers_steps_do(table):
    x_t = normal(0, len(table), 1, 2, 2)
    target = merged_target(SKEWED, x_t, columns(table))
    x_s = rotate(x_t, target, table[:, 0], table[:, -1])
    close(x_s.double(), ddim_steps(SKEWED, x_t.double(), columns(table)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weighting", ["truncated", "v"])
def test_student_that_hits_its_target_reproduces_two_teacher_steps_and_has_no_loss(weighting):
    table = steps_table(respace(SCHEDULES["cosine"](), 125), 2)
    objective, batch = Halving(SKEWED, table, weighting), grid_batch(4 * 63, 1, 2, 2)
    visited = []

    def student(x_t, t, label):
        visited.append(t)
        rows = table[torch.searchsorted(table[:, 0].contiguous(), t.contiguous())]
        return merged_target(SKEWED, x_t, columns(rows))

    assert objective(student, batch, 0.0).tolist() == [0.0] * 252
    assert torch.equal(visited[0], table[:, 0].repeat_interleave(4))
    assert (objective(SKEWED, batch, 0.0)[4:] > 0).all()  # the odd row is the teacher's own step


def test_the_loss_is_the_weighted_distance_to_the_target():
    """max(SNR, 1) |x0 - target|^2, Salimans & Ho 2022, eq. 9, of a student off by 0.1."""
    table = steps_table(SCHEDULES["cosine"](8), 2)
    batch = grid_batch(4, 1, 2, 2)
    t = table[:, 0]
    target = merged_target(BIMODAL, add_noise(batch.x0, batch.eps, t), columns(table))
    loss = Halving(BIMODAL, table)(lambda x_t, t, label: target + 0.1, batch, 0.0)
    snr = (1 / t.tan()).square()
    close(loss.double(), 0.01 * snr.clamp(min=1), rtol=1e-5, atol=0)


def test_the_target_carries_no_gradient_to_the_teacher():
    scale = torch.ones((), requires_grad=True)
    theta = torch.ones((), requires_grad=True)
    objective = Halving(
        lambda *inputs: scale * SKEWED(*inputs), steps_table(SCHEDULES["cosine"](8), 2)
    )
    objective(lambda *inputs: theta * SKEWED(*inputs), grid_batch(8, 1, 2, 2), 0.0).sum().backward()
    assert theta.grad.abs() > 0
    assert scale.grad is None


def test_teacher_and_student_are_told_the_label():
    label = torch.arange(4)
    told = []

    def denoiser(x_t, t, given):
        told.append(given)
        return SKEWED(x_t, t)

    batch = grid_batch(4, 1, 2, 2)._replace(label=label)
    Halving(denoiser, steps_table(SCHEDULES["cosine"](8), 2))(denoiser, batch, 0.0)
    assert [given is label for given in told] == [True] * 3
