import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion import checkpoint, networks
from diffusion.config import FitConfig
from diffusion.model import load
from diffusion.plan import Plan
from distill import cd, progressive
from students.soup import FARTHEST, average, distance, main
from tests.analytic import normal, random_unet

close = torch.testing.assert_close


def layers(seed: int) -> dict[str, torch.Tensor]:
    return {"weight": normal(seed, 3, 4), "bias": normal(seed + 1, 3)}


def test_the_average_of_networks_has_the_mean_of_each_weight():
    mean = average([layers(0), layers(10), layers(20)])
    for name, value in mean.items():
        close(value, sum(layers(seed)[name] for seed in (0, 10, 20)) / 3)


def test_weights_keep_their_type_and_rounding_does_not_grow_with_their_number():
    ones = [{"w": torch.full((4,), 1 + 2**-7, dtype=torch.bfloat16)}] * 1000
    assert torch.equal(average(ones)["w"], ones[0]["w"])


@pytest.mark.parametrize("number", [2, 3, 8])
def test_distance_is_0_of_copies_and_1_of_orthogonal_networks(number):
    assert distance([layers(0)] * number) == pytest.approx(0, abs=1e-6)
    axes = [{"a": row[:5], "b": row[5:]} for row in torch.eye(number, 12)]
    assert distance(axes) == pytest.approx(1)


def test_distance_of_two_networks_that_share_a_part_is_the_share_of_the_other():
    shared, own = torch.tensor([3.0]), torch.eye(2)
    pair = [{"w": torch.cat([shared, row])} for row in own]
    assert distance(pair) == pytest.approx(math.sqrt(1 / 10))


@pytest.fixture(scope="module")
def chains(teacher, quick, tmp_path_factory) -> list[Path]:
    """Two of halving, from 8 steps to 4 and 2, of other seeds."""
    folder = tmp_path_factory.mktemp("chains")
    for seed in (0, 1):
        fit = replace(quick, iterations=2, batch_size=8, seed=seed)
        options = progressive.Options(
            teacher=teacher, out=folder / f"{seed}", start_steps=8, rounds=(4, 2), fit=fit
        )
        progressive.distill(options)
    return [folder / "0", folder / "1"]


@pytest.mark.parametrize("steps", ["0004", "0002"])
def test_chains_of_one_teacher_are_averaged_step_count_by_step_count(
    chains, teacher, command, tmp_path, steps
):
    runs = [chain / steps for chain in chains]
    cards = [checkpoint.load(run)[1] for run in runs]
    assert (cards[0].parent == cards[1].parent) == (steps == "0004")
    assert command(main, *runs, "--out", tmp_path / "soup").code == 0
    assert checkpoint.load(tmp_path / "soup")[1].origin == checkpoint.load(teacher)[2]


@pytest.mark.parametrize("steps", ["0004", "0002"])
def test_chains_of_other_teachers_are_not_averaged(chains, command, tmp_path, steps):
    weights, card, _ = checkpoint.load(chains[1] / steps)
    parent = "0" * 64 if steps == "0004" else card.parent
    other = replace(card, origin="0" * 64, parent=parent)
    checkpoint.save(tmp_path / "other.safetensors", weights, other)
    outcome = command(
        main, chains[0] / steps, tmp_path / "other.safetensors", "--out", tmp_path / "out"
    )
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "its teacher has the weights 00000000" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("steps", "code"), [("0004", 0), ("0002", 2)])
def test_of_older_students_the_parent_alone_is_known(chains, command, tmp_path, steps, code):
    runs = []
    for i, chain in enumerate(chains):
        weights, card, _ = checkpoint.load(chain / steps)
        runs.append(tmp_path / f"{i}.safetensors")
        checkpoint.save(runs[-1], weights, replace(card, origin=None))
    outcome = command(main, *runs, "--out", tmp_path / "out")
    assert outcome.code == code
    assert ("only the one before is known" in outcome.err) == (code == 2)


@pytest.fixture(scope="module")
def students(teacher, tmp_path_factory) -> list[Path]:
    """Two of one teacher, from other seeds."""
    folder = tmp_path_factory.mktemp("soup")
    for seed in (0, 1):
        fit = FitConfig(iterations=4, batch_size=8, warmup=0, seed=seed)
        loss = cd.Loss(num_angles=4, target_ema=0.5)
        cd.distill(cd.Options(teacher=teacher, out=folder / f"{seed}", loss=loss, fit=fit))
    return [folder / "0", folder / "1"]


def test_a_soup_is_a_student_like_those_it_is_made_of(students, teacher, command, tmp_path):
    assert command(main, *students, "--out", tmp_path / "soup").code == 0
    first, second, soup = (load(path) for path in (*students, tmp_path / "soup"))
    states = [model.denoiser.net.state_dict() for model in (first, second, soup)]
    for name, value in states[2].items():
        close(value, (states[0][name] + states[1][name]) / 2)
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    assert soup.card.method == "consistency-cd-soup"
    assert soup.card.parent == first.card.parent == load(teacher).sha256
    assert soup.card.training["total_images"] == 2 * 4 * 8
    assert soup.plan(2).sampler == "consistency"
    assert (tmp_path / "soup" / "samples.png").exists()


def test_the_same_command_finds_its_soup_and_another_one_is_told_so(students, command, tmp_path):
    out = tmp_path / "soup"
    command(main, *students, "--out", out)
    made = (out / "model.safetensors").read_bytes()
    assert "finished before" in command(main, *students, "--out", out).out
    outcome = command(main, *reversed(students), "--out", out)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert (out / "model.safetensors").read_bytes() == made


def test_networks_of_other_origins_are_not_averaged(students, command, tmp_path):
    _, card, _ = checkpoint.load(students[0])
    shape = vars(networks.from_json(card.net))
    torch.manual_seed(0)
    weights = random_unet(**shape).state_dict()
    checkpoint.save(tmp_path / "alien.safetensors", weights, card)
    assert distance([weights, load(students[0]).denoiser.net.state_dict()]) > FARTHEST
    outcome = command(main, students[0], tmp_path / "alien.safetensors", "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "too far apart" in outcome.err
    assert not (tmp_path / "out").exists()


def test_students_at_other_angles_are_not_averaged(students, command, tmp_path):
    weights, card, _ = checkpoint.load(students[1])
    plans = tuple(
        replace(plan, angles=tuple(angle * 0.9 for angle in plan.angles)) for plan in card.plans
    )
    checkpoint.save(tmp_path / "other.safetensors", weights, replace(card, plans=plans))
    outcome = command(main, students[0], tmp_path / "other.safetensors", "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "other angles" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (lambda plans: {"plans": tuple(replace(own, sampler="ddim") for own in plans)}, "sampler"),
        (lambda _: {"plans": (Plan("consistency", (0.0, 0.5, 0.8, 1.2, 1.5)),)}, "steps"),
        (lambda plans: {"plans": tuple(own.guided(2.0) for own in plans)}, "guidance"),
        (
            lambda _: {
                "plans": (
                    Plan("consistency", (0.0, 1.5)),
                    Plan("consistency", (0.0, 0.5, 1.5)),
                )
            },
            "steps of its own",
        ),
        (lambda _: {"parent": "1" * 64, "origin": None}, "teacher has the weights 11111111"),
        (lambda _: {"origin": "1" * 64}, "teacher has the weights 11111111"),
    ],
)
def test_students_that_are_used_otherwise_are_not_averaged(
    students, command, tmp_path, changes, word
):
    weights, card, _ = checkpoint.load(students[1])
    checkpoint.save(tmp_path / "other.safetensors", weights, replace(card, **changes(card.plans)))
    outcome = command(main, students[0], tmp_path / "other.safetensors", "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert word in outcome.err
