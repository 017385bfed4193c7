import os
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from diffusion import checkpoint
from diffusion.circle import add_noise, rotate
from diffusion.console import UserError
from diffusion.model import load
from diffusion.plan import Plan, plan
from diffusion.schedules import SCHEDULES, cosine, even, halve, respace, shifted
from distill.progressive import (
    Halving,
    Options,
    budgets,
    counts,
    distill,
    merged,
    merged_target,
    steps_table,
)
from distill.steps import euler_step, heun_step
from tests.analytic import BIMODAL, SKEWED, grid_batch, normal

close = torch.testing.assert_close
EIGHT_TO_FOUR = steps_table(SCHEDULES["cosine"](8), halve(SCHEDULES["cosine"](8)))


def ddim_steps(teacher, x: torch.Tensor, angles: list[torch.Tensor]) -> torch.Tensor:
    """The teacher's steps, by velocity and in float64 (Salimans & Ho 2022, appendix D)."""
    for t, s in pairwise(angle[:, None, None, None] for angle in angles):
        v = (t.cos() * x - teacher(x, t)) / t.sin()
        x = (t - s).cos() * x - (t - s).sin() * v
    return x


def target_of(teacher, x_t: torch.Tensor, angles: list[torch.Tensor]) -> torch.Tensor:
    """The target of the teacher's DDIM steps, without labels."""
    return merged_target(euler_step(teacher), grid_batch(1, 1, 2, 2), x_t, angles)


def columns(table: torch.Tensor) -> list[torch.Tensor]:
    return list(table.unbind(1))


COUNTS = [(2000, 1000), (125, 63), (4, 2), (2, 1), (1000, 250), (63, 16), (48, 16), (10, 4), (3, 1)]
COUNTS += [(10, 7), (23, 9), (16, 1)]  # ragged: steps of unequal numbers; all in one


@pytest.fixture(params=COUNTS, ids=str)
def counted(request) -> tuple[int, int]:
    """Steps of the teacher and of the student."""
    return request.param


@pytest.fixture(params=["linear", "cosine", "karras", "random"])
def angles(request, counted) -> torch.Tensor:
    if request.param == "random":
        drawn = torch.rand(
            counted[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        return torch.cat([torch.zeros(1, dtype=torch.float64), 0.01 + 1.5 * drawn.sort().values])
    return SCHEDULES[request.param](counted[0])


@pytest.fixture
def kept(angles, counted) -> torch.Tensor:
    return merged(angles, counted[1])


@pytest.fixture
def table(angles, kept) -> torch.Tensor:
    return steps_table(angles, kept)


def test_a_student_keeps_so_many_of_its_teachers_steps_and_both_ends(angles, kept, counted):
    assert len(kept) - 1 == counted[1]
    assert set(kept.tolist()) <= set(angles.tolist())
    assert (kept.diff() > 0).all()
    assert kept[[0, -1]].tolist() == angles[[0, -1]].tolist()


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("num_steps", [1000, 125, 63])
def test_a_whole_factor_keeps_what_halve_keeps(num_steps, factor):
    angles = SCHEDULES["cosine"](num_steps)
    expected = halve(angles, factor)
    assert torch.equal(merged(angles, len(expected) - 1), expected)


def test_steps_merge_evenly_and_the_one_at_the_data_end_at_most_as_many(angles, kept):
    first, *others = torch.searchsorted(angles, kept).diff().tolist()
    assert max(others, default=0) - min(others, default=0) <= 1
    assert first <= max(others, default=first)


def test_a_table_spans_the_teachers_list_by_the_students(angles, kept, table):
    assert torch.equal(table[:, 0], kept[1:])
    assert torch.equal(table[:, -1], kept[:-1])
    assert set(table.flatten().tolist()) == set(angles.tolist())
    assert (table.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("teacher", [SKEWED, BIMODAL], ids=["gaussian", "mixture"])
def test_the_target_is_the_x0_of_one_step_that_does_all_the_teachers(table, teacher):
    """Salimans & Ho 2022, appendix G, solved for x0 in float64; one image for each student step."""
    x_t = normal(0, len(table), 1, 2, 2)
    x_s = ddim_steps(teacher, x_t.double(), columns(table))
    t, s = table[:, 0, None, None, None], table[:, -1, None, None, None]
    exact = (t.sin() * x_s - s.sin() * x_t) / (t - s).sin()
    target = target_of(teacher, x_t, columns(table))
    assert target.dtype == torch.float32
    close(target.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_rotation_towards_the_target_arrives_where_the_teachers_steps_do(table):
    x_t = normal(0, len(table), 1, 2, 2)
    target = target_of(SKEWED, x_t, columns(table))
    x_s = rotate(x_t, target, table[:, 0], table[:, -1])
    close(x_s.double(), ddim_steps(SKEWED, x_t.double(), columns(table)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("teacher", [SKEWED, BIMODAL], ids=["gaussian", "mixture"])
def test_heuns_steps_merge_to_an_end_far_nearer_to_the_odes(teacher):
    angles = columns(steps_table(SCHEDULES["cosine"](32), SCHEDULES["cosine"](32)[::8]))
    x_t = normal(0, 4, 1, 2, 2, dtype=torch.float64)
    exact = teacher.flow(x_t, angles[0], angles[-1])

    def error(step) -> float:
        target = merged_target(step(teacher), grid_batch(4, 1, 2, 2), x_t, angles)
        return (rotate(x_t, target, angles[0], angles[-1]) - exact).abs().mean().item()

    assert error(heun_step) < error(euler_step) / 3


@pytest.mark.parametrize("weighting", ["truncated", "v"])
def test_student_that_hits_its_target_reproduces_two_teacher_steps_and_has_no_loss(weighting):
    angles = respace(SCHEDULES["cosine"](), 125)
    table = steps_table(angles, halve(angles))
    objective, batch = Halving(euler_step(SKEWED), table, weighting), grid_batch(4 * 63, 1, 2, 2)
    visited = []

    def student(x_t, t, condition, dropout=None):
        visited.append(t)
        rows = table[torch.searchsorted(table[:, 0].contiguous(), t.contiguous())]
        return target_of(SKEWED, x_t, columns(rows))

    assert objective(student, batch, 0.0).tolist() == [0.0] * 252
    assert torch.equal(visited[0], table[:, 0].repeat_interleave(4))
    assert (objective(SKEWED, batch, 0.0)[4:] > 0).all()  # the odd row is the teacher's own step


def test_the_loss_is_the_weighted_distance_to_the_target():
    """max(SNR, 1) |x0 - target|^2, Salimans & Ho 2022, eq. 9, of a student off by 0.1."""
    table, batch = EIGHT_TO_FOUR, grid_batch(4, 1, 2, 2)
    t = table[:, 0]
    target = target_of(BIMODAL, add_noise(batch.x0, batch.eps, t), columns(table))
    loss = Halving(euler_step(BIMODAL), table)(lambda *_, **__: target + 0.1, batch, 0.0)
    snr = (1 / t.tan()).square()
    close(loss.double(), 0.01 * snr.clamp(min=1), rtol=1e-5, atol=0)


def test_the_target_carries_no_gradient_to_the_teacher():
    scale = torch.ones((), requires_grad=True)
    theta = torch.ones((), requires_grad=True)
    objective = Halving(euler_step(lambda *inputs: scale * SKEWED(*inputs)), EIGHT_TO_FOUR)

    def student(*inputs, **dropout):
        return theta * SKEWED(*inputs, **dropout)

    objective(student, grid_batch(8, 1, 2, 2), 0.0).sum().backward()
    assert theta.grad.abs() > 0
    assert scale.grad is None


def test_teacher_and_student_are_told_the_condition():
    condition = {"label": torch.arange(4)}
    conditions = []

    def denoiser(x_t, t, given, dropout=None):
        conditions.append(given)
        return SKEWED(x_t, t)

    batch = grid_batch(4, 1, 2, 2)._replace(condition=condition)
    Halving(euler_step(denoiser), EIGHT_TO_FOUR)(denoiser, batch, 0.0)
    assert [given is condition for given in conditions] == [True] * 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(), [500, 250, 125, 63, 32, 16, 8, 4, 2, 1]),
        (Options(start_steps=64, factor=4), [16, 4, 1]),
        (Options(start_steps=64, factor=3, end_steps=8), [22, 8]),
        (Options(start_steps=32, rounds=(16, 5, 1)), [16, 5, 1]),
    ],
)
def test_rounds_are_named_or_follow_from_the_factor(options, expected):
    assert counts(options) == expected


def test_a_round_has_its_own_budget_or_a_longer_one_at_the_end(quick):
    options = Options(fit=replace(quick, iterations=100), last_rounds=2.5)
    assert budgets(options, [8, 4, 2, 1]) == [100, 100, 250, 250]
    assert budgets(replace(options, round_iterations=(7, 9)), [4, 1]) == [7, 9]


def test_rounds_of_mixed_factors_each_train_their_own_number_of_steps(tmp_path, teacher, quick):
    options = Options(
        teacher=teacher,
        out=tmp_path,
        start_steps=8,
        rounds=(3, 1),
        round_iterations=(4, 6),
        fit=quick,
    )
    first, second = distill(options)
    schedule = checkpoint.load(teacher)[1].plan(8).angles
    assert first.card.plans == (Plan("ddim", tuple(schedule[i] for i in (0, 2, 5, 8))),)
    assert second.card.plans == (Plan("ddim", (0.0, schedule[-1])),)
    assert [model.card.training["iterations"] for model in (first, second)] == [4, 6]
    assert second.card.parent == first.sha256


def test_a_round_of_many_steps_draws_its_pictures_by_its_own_plan(tmp_path, train_tiny, quick):
    teacher = train_tiny(tmp_path / "teacher", angles=cosine(120))
    few = replace(quick, iterations=6)
    options = Options(
        teacher=teacher, out=tmp_path / "halved", start_steps=120, rounds=(60,), fit=few
    )
    (student,) = distill(options)
    assert student.solvers == []
    assert (tmp_path / "halved" / "0060" / "samples.png").exists()


def test_a_raw_student_that_teaches_the_next_is_what_would_be_kept_without_an_average(
    tmp_path, teacher, quick
):
    def students(out: str, **settings):
        fit = replace(quick, iterations=8, ema=settings.pop("ema"))
        options = Options(
            teacher=teacher, out=tmp_path / out, start_steps=8, rounds=(4, 2), fit=fit
        )
        return distill(replace(options, last_rounds=1, **settings))

    averaged = students("averaged", ema=0.9)
    taught = students("raw", ema=0.9, next_teacher="raw")
    plain = students("plain", ema=0.0)
    assert taught[0].sha256 == averaged[0].sha256 != plain[0].sha256
    assert averaged[1].card.parent == averaged[0].sha256
    assert taught[1].card.parent == plain[1].card.parent == plain[0].sha256
    last = checkpoint.load(tmp_path / "raw" / "0002" / "raw.safetensors")
    assert last[2] == plain[1].sha256
    again = students("raw", ema=0.9, next_teacher="raw")  # all is finished: read, not trained
    assert [model.sha256 for model in again] == [model.sha256 for model in taught]


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_compiled_networks_make_the_same_students(teacher, quick, tmp_path):
    """The teacher's, the student's, and in the second round those of the first."""

    def students(compile: bool) -> list:
        fit = replace(quick, iterations=3, compile=compile)
        out = tmp_path / f"compiled-{compile}"
        options = Options(teacher=teacher, out=out, start_steps=8, rounds=(4, 2), fit=fit)
        return distill(replace(options, last_rounds=1.0))

    for compiled, plain in zip(students(True), students(False), strict=True):
        for ours, theirs in zip(compiled.denoiser.parameters(), plain.denoiser.parameters()):
            close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_student_and_its_students_take_their_steps_where_the_teachers_shift_says(
    teacher, quick, tmp_path
):
    fit = replace(quick, iterations=1)
    options = Options(teacher=teacher, out=tmp_path, start_steps=8, rounds=(4,), shift=2.0, fit=fit)
    (student,) = distill(options)
    expected = shifted(respace(load(teacher).schedule, 8), 2.0)[::2]
    assert student.card.plans == (plan("ddim", expected),)
    assert student.card.shift == 2.0
    weights, card, _ = checkpoint.load(teacher)
    checkpoint.save(tmp_path / "wide.safetensors", weights, replace(card, shift=2.0))
    wide = load(tmp_path / "wide.safetensors")
    assert wide.plan(3, "ddim") == plan("ddim", shifted(respace(wide.schedule, 3), 2.0))
    unshifted = plan("ddim", respace(wide.schedule, 3), note="shift 1")
    assert wide.plan(3, "ddim", 1.0) == unshifted


def chain(out, teacher, fit, **options) -> list:
    return distill(Options(teacher=teacher, out=out, fit=fit, last_rounds=1.0, **options))


def test_a_chain_that_goes_on_from_its_own_student_keeps_the_angles_of_one_in_one_go(
    teacher, quick, tmp_path
):
    fit = replace(quick, iterations=1)
    whole = chain(tmp_path / "whole", teacher, fit, start_steps=8, rounds=(4, 2), shift=2.0)
    four = tmp_path / "whole" / "0004"
    (two,) = chain(tmp_path / "on", four, fit, start_steps=4, rounds=(2,))
    assert two.card.plans == whole[1].card.plans
    assert two.card.shifted
    (same,) = chain(tmp_path / "same", four, fit, start_steps=4, rounds=(2,), shift=2.0)
    assert same.card.plans == two.card.plans
    assert checkpoint.load(four)[1].shifted  # of a card from before there was this: test_older
    assert not load(teacher).card.shifted


def test_another_shift_of_a_student_whose_angles_are_shifted_is_refused(teacher, quick, tmp_path):
    chain(tmp_path, teacher, replace(quick, iterations=1), start_steps=8, rounds=(4,), shift=2.0)
    with pytest.raises(UserError, match=r"--shift 3 .* shifted by 2 already"):
        chain(tmp_path / "on", tmp_path / "0004", quick, start_steps=4, rounds=(2,), shift=3.0)


def test_a_solver_shifts_only_angles_that_are_not_shifted_already(teacher):
    model = load(teacher)
    plain = model.schedule
    card = replace(
        model.card,
        plans=(plan("ancestral", shifted(plain, 2.0)),),
        shift=2.0,
        shifted=True,
        abilities=("denoise", "jump"),
    )
    model = replace(model, card=card)

    def angles(*asked) -> torch.Tensor:
        return torch.tensor(model.plan(4, *asked).angles, dtype=torch.float64)

    close(angles("ddim"), shifted(respace(plain, 4), 2.0), rtol=0, atol=0)
    close(angles("ddim", 3.0), shifted(respace(plain, 4), 3.0), rtol=1e-12, atol=0)
    close(angles("consistency"), even(plain, 4, 2.0), rtol=0, atol=0)
