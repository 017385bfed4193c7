"""Plan: what decides an image makes two plans differ, and nothing else does."""

from dataclasses import replace

import pytest
import torch

from diffusion.checkpoint import load as load_card
from diffusion.console import UserError
from diffusion.model import Model, load
from diffusion.plan import Plan, plan
from diffusion.samplers import SOLVERS
from diffusion.schedules import cosine
from tests.analytic import random_denoiser

PLAN = Plan("ddim", (0.0, 0.7, 1.5))


def test_a_plan_of_a_tensor_has_its_angles_to_the_last_bit():
    angles = cosine(7)
    made = plan("heun", angles, 2.0)
    assert made.num_steps == 7
    assert torch.equal(made.on(torch.device("cpu")), angles)
    assert made == Plan("heun", tuple(angles.tolist()), 2.0)


@pytest.mark.parametrize(
    "other",
    [
        Plan("heun", PLAN.angles),
        Plan("ddim", (0.0, 0.8, 1.5)),
        Plan("ddim", (0.0, 1.5)),
        PLAN.guided(2.0),
    ],
)
def test_sampler_angles_and_guidance_are_what_a_plan_is(other):
    assert other != PLAN
    assert {PLAN: "one"}.get(other) is None


def test_a_note_is_no_part_of_what_a_plan_is():
    noted = replace(PLAN, note="shift 2")
    assert noted.note == "shift 2"
    assert noted == PLAN
    assert hash(noted) == hash(PLAN)


def test_a_plan_made_again_is_the_same_key():
    again = Plan("ddim", tuple(float(angle) for angle in PLAN.angles))
    assert {PLAN: "one"}[again] == "one"
    assert {PLAN.guided(2): "one"}[PLAN.guided(2.0)] == "one"


def test_no_weight_leaves_a_plans_guidance_as_it_is():
    assert PLAN.guided(None) == PLAN
    assert PLAN.guided(3.0).guided(None).guidance == 3.0
    assert PLAN.guided(3.0).guided(0.5) == PLAN.guided(0.5)
    assert PLAN.guided(3.0).angles == PLAN.angles


# A model's plans


@pytest.fixture
def conditional(teacher) -> Model:
    """A model of three classes, guided by 2 unless it is asked otherwise."""
    card = load_card(teacher)[1]
    plans = tuple(own.guided(2.0) for own in card.plans)
    denoiser = random_denoiser(num_classes=3, width=8, multipliers=(1,), blocks=1, attention=())
    return Model(denoiser.eval().requires_grad_(False), replace(card, plans=plans), "")


def test_every_plan_of_a_model_has_the_cards_guidance_unless_another_is_asked_for(conditional):
    for num_steps, sampler in ((None, None), (3, None), (4, "heun"), (5, "truncated")):
        assert conditional.plan(num_steps, sampler).guidance == 2
        assert conditional.plan(num_steps, sampler, guidance=0.5).guidance == 0.5


@pytest.mark.parametrize("weight", [None, 1.0, 3.0])
def test_a_plan_at_another_weight_makes_the_images_of_that_weight_in_as_many_calls(
    conditional, weight
):
    calls = []
    conditional.denoiser.net.register_forward_hook(
        lambda _, inputs, output: calls.append(len(inputs[0]))
    )
    indices = torch.arange(3)
    asked = replace(conditional.plan(2, "ddim"), guidance=weight)
    images = conditional.x0(asked, 0, indices)
    times = conditional.calls_per_step(asked)
    assert calls == [3 * times] * 2
    assert times == (2 if weight == 3 else 1)
    assert torch.equal(images, conditional.x0(asked, 0, indices, {"label": indices % 3}))
    other = conditional.x0(replace(asked, guidance=5.0), 0, indices)
    assert not torch.allclose(images, other)


@pytest.mark.parametrize(
    ("weight", "words"), [(-1.0, r"from 0 to 1e\+06, got -1"), (torch.inf, "inf")]
)
def test_a_weight_that_no_model_can_be_guided_by_is_refused(conditional, weight, words):
    with pytest.raises(UserError, match=words):
        conditional.plan(2, guidance=weight)


def test_a_weight_beyond_the_range_that_a_network_takes_is_refused(conditional):
    denoiser = random_denoiser(num_classes=3, guidance=(0.5, 3.0))
    guided = replace(conditional, denoiser=denoiser)
    assert guided.plan(guidance=3.0).guidance == 3
    assert guided.calls_per_step(guided.plan(guidance=3.0)) == 1
    with pytest.raises(UserError, match=r"--guidance must be from 0\.5 to 3, got 4"):
        guided.plan(guidance=4.0)


def test_a_model_without_classes_is_not_guided(teacher):
    with pytest.raises(UserError, match="--guidance needs a model with classes"):
        load(teacher).plan(guidance=2.0)


def test_a_shift_that_was_asked_for_is_noted_and_the_cards_own_is_not(teacher):
    model = load(teacher)
    assert model.plan(4, "ddim").note == ""
    shifted = model.plan(4, "ddim", shift=2.0)
    assert shifted.note == "shift 2"
    assert shifted != model.plan(4, "ddim")


@pytest.mark.parametrize(
    ("abilities", "first"),
    [
        ((), None),
        (("denoise",), "ddim"),
        (("denoise", "variance"), "ddim"),
        (("jump",), "consistency"),
    ],
)
def test_a_model_runs_by_exactly_the_solvers_whose_needs_it_meets(teacher, abilities, first):
    model = load(teacher)
    model = replace(model, card=replace(model.card, abilities=abilities))
    expected = [name for name in SOLVERS if SOLVERS[name].needs <= {*abilities}]
    assert model.solvers == expected
    assert next(iter(model.solvers), None) == first
