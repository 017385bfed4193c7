"""What is exported makes the checkpoint's images: in other libraries, and without this one."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill
import teachers
from diffusion.console import UserError
from diffusion.model import load as load_model
from diffusion.plan import Plan
from distill import cd
from eval.measure import outside
from students import export, formats, judging, load
from students.bundle import bundle
from students.export import Options
from students.graph import Sampling, draws, trace

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classes(tmp_path_factory, tiny, quick) -> Path:
    """A teacher that takes labels."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    options = replace(teachers.Options.default("digits"), net=tiny, num_classes=10, out=out)
    teachers.train(replace(options, fit=quick))
    return out


@pytest.fixture(scope="module")
def student(classes, quick) -> Path:
    """Its consistency student: two steps of it take a label, and noise twice."""
    options = replace(distill.preset(cd.Options, classes), fit=quick)
    distill.train(replace(options, out=classes.parent / "student"))
    return classes.parent / "student"


@pytest.fixture(scope="module")
def onnx(student) -> Path:
    """Its two steps as a graph, by the command's own function."""
    folder, (itself, row) = export.export(Options(student, "onnx", steps=2, license="mit"))
    assert folder == student / "export" / "onnx-2"
    assert itself.difference is None
    assert row.difference < formats.TOLERANCE
    assert row.levels == 0
    return folder


@pytest.mark.parametrize(
    ("sampler", "taken"),
    [("ddim", 1), ("unipc", 1), ("heun", 1), ("ancestral", 3), ("stochastic", 3),
     ("consistency", 3), ("predictor-corrector", 5)],
)  # fmt: skip
def test_a_graph_takes_the_noise_that_its_sampler_draws_in_three_steps(sampler, taken):
    assert draws(Plan(sampler, (0.0, 0.4, 0.9, 1.5))) == taken


def test_a_traced_guided_plan_makes_the_models_images_of_any_batch(classes):
    model = load_model(classes)
    plan = model.plan(2, "unipc", None, 2.0)
    sampling = Sampling(model, plan)
    program = trace(sampling, sampling.inputs(model, 0, torch.arange(2))).module()
    for batch in (1, 5):
        numbers = torch.arange(batch)
        with torch.no_grad():
            images, x0 = program(*sampling.inputs(model, 3, numbers))
        assert torch.equal(x0, model.x0(plan, 3, numbers))
        assert torch.equal(images.permute(0, 3, 1, 2), model.sample(plan, 3, numbers))


@pytest.mark.parametrize("num", [1, 7, 64])
def test_an_onnx_file_makes_the_images_of_the_checkpoint(student, onnx, num):
    label = [3] * num
    made, checkpoint = load(onnx), load(student, precision="fp32")
    assert made.num_classes == 10
    assert (made(num, seed=4, label=label) == checkpoint(num, steps=2, seed=4, label=label)).all()
    assert (load(onnx / "model.onnx")(num) == made(num)).all()


def test_the_example_needs_numpy_and_onnxruntime_alone(onnx, tmp_path):
    source = (onnx / "example.py").read_text()
    packages = {
        name.name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert packages == {"struct", "zlib", "numpy"}
    assert "from onnxruntime import" in source
    assert len(source.splitlines()) <= 20
    (tmp_path / "model.onnx").symlink_to(onnx / "model.onnx")
    (tmp_path / "example.py").write_text(source)
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "images.png") as picture:
        assert (picture.size, picture.mode) == ((64, 64), "L")
        assert np.asarray(picture).std() > 10


def test_the_card_names_the_licence_and_the_line(student, onnx):
    card, model = (onnx / "MODEL_CARD.md").read_text(), load_model(student)
    for words in ("license: mit", model.sha256, model.card.parent, model.spec.sha256, "2 network"):
        assert words in card
    assert json.loads((onnx / "fewstep.json").read_text())["plan"]["sampler"] == "consistency"


def test_a_graph_does_what_it_was_exported_for_and_nothing_else(onnx):
    for asked in ({"steps": 1}, {"sampler": "ddim"}, {"guidance": 2.0}):
        with pytest.raises(UserError, match="exported"):
            load(onnx)(1, **asked)


def test_the_harness_scores_an_export_by_the_noise_of_its_checkpoint(student, onnx):
    row = outside.row(onnx / "model.onnx", load_model(student).spec, 4, (0,), (-1, 1), CPU)
    images = row.codec.decode(row.x0(None, 5, torch.arange(4)))
    model = load_model(student)
    assert torch.equal(images, model.sample(model.plan(2), 5, torch.arange(4)))


def test_a_graph_that_does_not_agree_is_refused_and_nothing_is_left(
    student, onnx, tmp_path, monkeypatch
):
    exact = formats.pytorch

    def moved(*arguments) -> Callable:
        make = exact(*arguments)
        return lambda numbers: (make(numbers)[0], make(numbers)[1] + 2 * formats.TOLERANCE)

    monkeypatch.setattr(formats, "pytorch", moved)
    monkeypatch.setattr(formats, "write_onnx", copied(onnx))
    with pytest.raises(UserError, match="refused: its x0 differ"):
        export.export(Options(student, "onnx", steps=2, out=tmp_path / "out"))
    assert [*tmp_path.iterdir()] == []


def copied(folder: Path) -> Callable:
    """What writes the graph that is there already, for its making takes seconds."""

    def write(model: object, about: object, path: Path) -> None:
        path.write_bytes((folder / "model.onnx").read_bytes())

    return write


@pytest.mark.parametrize(("quality", "kept"), [("1.2", True), ("1.3", False), ("0.7", False)])
def test_int8_is_kept_within_the_band_and_refused_on_either_side(
    student, onnx, tmp_path, monkeypatch, quality, kept
):
    def measured(arguments: list[str]) -> list[judging.Row]:
        columns = ("run", "sha256", "steps", "sampler", "quality", "quality low", "quality high")
        file = next(each for each in arguments if each.endswith(".npz"))
        assert np.load(file, allow_pickle=False)["images"].shape == (100, 8, 8, 1)
        whole = ("", load_model(student).sha256, "2", "consistency", "1.0", "0.9", "1.1")
        rows = whole, (file, "", "0", "npz", quality, "", "")
        return [dict(zip(columns, row), metric="fd") for row in rows]

    monkeypatch.setattr(judging, "figures", measured)
    monkeypatch.setattr(formats, "write_onnx", copied(onnx))
    if not kept:
        monkeypatch.setattr(formats, "write_int8", copied(onnx))
    options = Options(student, steps=2, int8=True, num_images=100, out=tmp_path / "out")
    if kept:
        folder, rows = export.export(options)
        assert 0 < rows[1].difference < 1
        assert "1.200×" in (folder / "README.md").read_text()
        assert load(folder).about.precision == "int8"
    else:
        with pytest.raises(UserError, match=r"refused.*expected 0.80× to 1.25×"):
            export.export(options)
        assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("steps", [1, 2])
def test_a_torch_program_makes_the_images_and_is_loaded_on_trust_alone(student, steps, tmp_path):
    folder, rows = export.export(Options(student, "torch", steps=steps, out=tmp_path / "out"))
    assert rows[1].difference == 0
    checkpoint = load(student, precision="fp32")
    assert (load(folder, trust=True)(7) == checkpoint(7, steps=steps)).all()
    with pytest.raises(UserError, match="trust=True"):
        load(folder)


def test_half_precision_halves_the_weights_and_hardly_moves_an_image(student, tmp_path):
    made = {}
    for dtype in ("fp32", "fp16"):
        options = Options(student, "safetensors", steps=2, dtype=dtype, out=tmp_path / dtype)
        made[dtype], _ = export.export(options)
    sizes = [(made[x] / "weights.safetensors").stat().st_size for x in ("fp16", "fp32")]
    assert sizes[0] < 0.7 * sizes[1]
    whole, half = (load(made[x], precision="fp32")(16) for x in ("fp32", "fp16"))
    assert (whole == load(student, precision="fp32")(16, steps=2)).all()
    assert np.abs(whole.astype(int) - half).max() <= 3
    assert load(made["fp16"]).plan().num_steps == 2  # what it was exported for is its usual plan


def test_a_folder_for_diffusers_makes_the_images_with_code_of_its_own(student, tmp_path):
    folder, _ = export.export(Options(student, "diffusers", steps=2, out=tmp_path / "out"))
    assert (load(folder, precision="fp32")(5) == load(student, precision="fp32")(5, steps=2)).all()
    for file in folder.rglob("*.py"):
        text = file.read_text()
        assert "import diffusion" not in text
        assert "from diffusion." not in text
    code = (
        "import torch; from diffusers import DiffusionPipeline as P;"
        "p = P.from_pretrained('.', trust_remote_code=True);"
        "print(p(3, label=[1, 2, 3], output_type='np').images.shape)"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    cache = {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=clean | cache, capture_output=True, text=True
    )
    assert "(3, 8, 8, 1)" in done.stdout, done.stderr


def test_a_bundle_leaves_out_what_annotations_alone_name():
    text = bundle(("diffusion.samplers", "consistency"), {}, "A sampler.")
    names: dict[str, Callable] = {}
    exec(text, names)
    assert "Denoise" not in names
    x = torch.ones(1, 1, 2, 2)
    angles = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    made = names["consistency"](lambda x_t, t: x_t, iter([x, 0 * x]), angles)
    assert torch.allclose(made, x * torch.cos(torch.tensor(0.5)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--int8 --to torch", ["--int8", "--to onnx"]),
        ("--dtype bf16 --to onnx", ["bf16", "take fp16"]),
        ("--aot", ["--aot", "--to torch"]),
        ("--to diffusers --dtype fp16", ["--dtype", "diffusers"]),
        ("--to diffusers --sampler unipc --steps 4", ["unipc", "--to onnx"]),
        ("--steps 0", ["--steps", "at least 1"]),
        ("--steps 65 --sampler ddim", ["65 network calls", "at most 64"]),
        ("--band 1", ["--band", "above 1"]),
        ("--to safetensors --results missing.jsonl", ["missing.jsonl", "eval.compare"]),
        ("--to safetensors --guidance 2 --out TAKEN", ["notes.txt", "--out"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(classes, tmp_path, command, flags, words):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    words_given = flags.replace("TAKEN", str(tmp_path / "taken")).split()
    if "--out" not in words_given:
        words_given += ["--out", str(tmp_path / "out")]
    outcome = command(export.main, classes, *words_given)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert all(word in outcome.err for word in words), outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
