"""Steps within a budget, and no more calls than an image needs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import students
from diffusion.console import UserError
from diffusion.model import load
from diffusion.samplers import SOLVERS
from students import budget, filters, generate, watermark
from students.adaptive import Adaptive, Stopping
from students.api import Checkpoint
from tests.made_up import record


def table(path, rows):
    """A results.jsonl of these rows: (sha256, sampler, steps, distance, parent)."""
    from eval.results import jsonl

    jsonl.write(path, [
        record(sha256=sha256, sampler=sampler, steps=steps, nfe=steps, score=distance,
               parent=parent, method="x")
        for sha256, sampler, steps, distance, parent in rows
    ])  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model(teacher):
    return load(teacher)


@pytest.fixture
def measured(model, tmp_path):
    """The teacher's table: 8 calls are no better than 4, and another's best is 1."""
    rows = [
        (model.sha256, "ddim", 1, 9.0, None),
        (model.sha256, "ddim", 4, 2.0, None),
        (model.sha256, "unipc", 8, 2.1, None),
        ("ab" * 32, "ddim", 2, 1.0, None),
        ("cd" * 32, "ddim", 2, 0.5, "ab" * 32),
    ]
    return table(tmp_path / "results.jsonl", rows)


@pytest.fixture
def clock(monkeypatch):
    """Each call of the network takes 10 ms, and a batch 5 ms besides."""
    monkeypatch.setattr(
        budget, "timed", lambda model, ways, batch: [0.005 + 0.01 * way.calls for way in ways]
    )


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({"time_budget": "20ms"}, 1),
        ({"time_budget": "45ms"}, 4),
        ({"time_budget": "10s"}, 4),  # not 8, which measured worse
        ({"quality": "2x"}, 4),
        ({"quality": "9x"}, 1),
        ({"quality": "9x", "time_budget": "1s"}, 1),
    ],
)
def test_the_table_decides_what_is_best_and_the_clock_what_fits(
    model, measured, clock, asked, steps
):
    choice = budget.choose(model, 1, 256, table=measured, **asked)
    assert choice.way.plan.num_steps == steps
    assert f"{steps} steps" in choice.words


def test_images_beyond_a_batch_take_their_time(model, measured, clock):
    one = budget.choose(model, 256, 256, "1s", table=measured)
    four = budget.choose(model, 1000, 256, "1s", table=measured)
    assert four.seconds == pytest.approx(4 * one.seconds)


def test_without_a_table_more_calls_are_taken_for_better(model, clock):
    choice = budget.choose(model, 1, 256, "165ms")
    assert (choice.way.calls, "not known" in choice.words) == (8, True)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"time_budget": "20"}, "such as 20ms"),
        ({"time_budget": "0s"}, "above 0"),
        ({"time_budget": "10ms"}, "quickest way takes about 15 ms"),
        ({"quality": "1.5x"}, "the best of this model's 3 ways"),
        ({"quality": "1.5"}, "such as 1.2x"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(model, measured, clock, asked, words):
    with pytest.raises(UserError, match=words):
        budget.choose(model, 1, 256, table=measured, **asked)


def test_times_of_all_ways_follow_from_two(model, monkeypatch):
    now = [0.0]

    def sample(self, plan, seed, indices, given=None):
        now[0] += 0.004 + 0.006 * SOLVERS[plan.sampler].calls(plan.num_steps)
        return torch.zeros(1)

    monkeypatch.setattr(type(model), "sample", sample)
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    ways = budget.ways_without(model, None)
    expected = [0.004 + 0.006 * way.calls for way in ways]
    assert budget.timed(model, ways, 1) == pytest.approx(expected)


def test_a_table_beside_the_runs_is_seen(tmp_path, measured):
    run = tmp_path / "runs" / "digits" / "progressive" / "0004"
    place = tmp_path / "runs" / "digits" / budget.PLACE
    for folder in (run, place.parent):
        folder.mkdir(parents=True)
    assert budget.table_of(run) is None
    place.write_text(measured.read_text())
    assert budget.table_of(run) == place
    assert budget.table_of(run / "model.safetensors") == place


def test_a_call_from_python_takes_what_fits_its_budget(teacher, clock, monkeypatch):
    monkeypatch.setattr(budget, "table_of", lambda checkpoint: None)
    model = students.load(teacher, precision="fp32")
    assert (model(2, time_budget="45ms") == model(2, steps=4)).all()
    with pytest.raises(UserError, match="leave steps out"):
        model(2, time_budget="45ms", steps=4)
    with pytest.raises(UserError, match="model of captions"):
        model(2, prompt="a cat")


def test_generate_says_what_it_chose(command, teacher, measured, tmp_path):
    flags = ["--num", 2, "--precision", "fp32", "--table", measured, "--out", tmp_path / "g.png"]
    outcome = command(generate.main, teacher, *flags, "--quality", "2x")
    assert (outcome.code, "chosen: ddim in 4 steps" in outcome.out) == (0, True)
    outcome = command(generate.main, teacher, *flags, "--quality", "2x", "--steps", 3)
    assert (outcome.code, "leave --steps out" in outcome.err) == (2, True)
    measured.write_text(json.dumps({"sha256": 5}) + "\n")
    outcome = command(generate.main, teacher, *flags, "--quality", "2x")
    assert (outcome.code, "line 1: sha256" in outcome.err) == (2, True)


@pytest.mark.parametrize("sampler", ["ddim", "unipc", "heun", "ancestral"])
def test_without_a_tolerance_an_image_is_as_ever(model, sampler):
    plan, numbers = model.plan(6, sampler), torch.arange(5)
    adaptive = Adaptive(model, "", 0.0)
    assert torch.equal(
        adaptive.make(plan, 0, numbers, {}), Checkpoint(model, "").make(plan, 0, numbers, {})
    )
    assert adaptive.calls.tolist() == [SOLVERS[sampler].calls(plan.num_steps)] * 5


def test_each_image_stops_by_itself_and_is_not_called_again():
    asked = []

    def denoise(x, t, condition=None):  # image i settles after i calls
        asked.append(x[:, 0, 0, 0].tolist())
        steps = len(asked)
        return torch.minimum(x, torch.full_like(x, float(steps)))

    stopping = Stopping(denoise, 0.5)
    x = torch.tensor([1.0, 2.0, 4.0])[:, None, None, None]
    for _ in range(6):
        x0 = stopping(x, torch.tensor(1.0))
    assert asked == [[1, 2, 4], [1, 2, 4], [2, 4], [4], [4]]
    assert stopping.calls.tolist() == [2, 3, 5]
    assert x0.flatten().tolist() == [1, 2, 4]


def test_calls_are_counted_in_files_and_words(command, teacher, tmp_path):
    out = tmp_path / "images.npz"
    flags = ["--num", 6, "--steps", 8, "--sampler", "ddim", "--precision", "fp32", "--out", out]
    outcome = command(generate.main, teacher, *flags, "--tolerance", 20)
    calls = np.load(out)["calls"]
    assert calls.min() < 8
    assert f"8 steps at most, {calls.mean():.2f} calls" in outcome.out


def even(images):
    """A filter for the next test: blocks every other image."""
    return np.arange(len(images)) % 2


def test_generate_blocks_what_a_filter_scores_high(command, teacher, tmp_path):
    out = tmp_path / "images.npz"
    flags = ["--num", 5, "--filter", "module:tests.test_budget:even", "--out", out]
    outcome = command(generate.main, teacher, *flags)
    made = np.load(out)
    assert made["blocked"].tolist() == [False, True, False, True, False]
    assert ((made["images"] == filters.GREY).all((1, 2, 3)) == made["blocked"]).all()
    assert "2 blocked" in outcome.out


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_an_onnx_classifier_is_a_filter(tmp_path, kind):
    from onnx import TensorProto, helper, save

    number = TensorProto.UINT8 if kind == "uint8" else TensorProto.FLOAT
    shape = ["n", 1, 8, 8]
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["m"], axes=[1, 2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("x", number, shape)],
        [helper.make_tensor_value_info("m", TensorProto.FLOAT, ["n"])],
    )
    path = tmp_path / "filter.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    bright = filters.load(str(path), 100.0 if kind == "uint8" else 100 / 255)
    images = torch.tensor([99, 101], dtype=torch.uint8)[:, None, None, None].expand(2, 1, 8, 8)
    kept, blocked = bright(images)
    assert blocked.tolist() == [False, True]
    assert kept[:, 0, 0, 0].tolist() == [99, filters.GREY]


def test_a_mark_is_found_after_jpeg_and_in_no_other_picture(command, tmp_path):
    import io

    from PIL import Image

    pytest.importorskip("imwatermark")
    generator = torch.Generator().manual_seed(0)
    coarse = 128 + 50 * torch.randn(1, 3, 32, 32, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=256, mode="bicubic").clamp(0, 255).byte()
    for name, images in {"plain": image, "marked": watermark.marked(image)}.items():
        buffer = io.BytesIO()
        Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=80)
        (tmp_path / f"{name}.jpg").write_bytes(buffer.getvalue())
    said = command(watermark.main, tmp_path).out
    assert "marked.jpg  marked, " in said
    assert "plain.jpg  no mark" in said


def test_a_mark_in_small_or_grey_images_is_refused(command, teacher):
    outcome = command(generate.main, teacher, "--watermark")
    assert (outcome.code, "images are grey" in outcome.err) == (2, True)
    with pytest.raises(UserError, match="at least 256x256"):
        watermark.check(128)
