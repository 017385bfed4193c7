"""From Python: the images of the command, typed, in any number; and the page of examples."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
import teachers
from diffusion.console import UserError
from diffusion.model import load as load_model
from distill import cd
from eval.measure.npz import read_npz
from students import filters, generate, load, to_pil, to_tensor

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def jumper(teacher, quick, tmp_path_factory) -> Path:
    """A consistency student."""
    run = tmp_path_factory.mktemp("jumper") / "run"
    options = distill.preset(cd.Options, teacher)
    distill.train(replace(options, fit=replace(quick, iterations=3), out=run))
    return run


def test_a_call_and_the_command_make_the_same_images(jumper, tmp_path, command):
    out = tmp_path / "images.npz"
    flags = ["--num", 10, "--steps", 2, "--seed", 5, "--batch-size", 4, "--precision", "fp32"]
    assert command(generate.main, jumper, *flags, "--out", out).code == 0
    images = load(jumper, precision="fp32")(10, steps=2, seed=5, batch_size=4)
    assert (images.dtype, images.shape) == (np.uint8, (10, 8, 8, 1))
    assert (images == read_npz(out, ("images",), "images")["images"]).all()


def test_a_model_just_trained_and_its_checkpoint_are_the_same(student):
    model = load_model(student)
    assert (load(model)(5) == load(student, precision="fp32")(5)).all()


def test_a_stream_in_parts_is_the_stream(jumper):
    model = load(jumper)
    whole = model(11, seed=3)
    parts = [*model.stream(4, seed=3, batch_size=3), *model.stream(7, first=4, seed=3)]
    assert [len(part) for part in parts] == [3, 1, 7]
    assert (np.concatenate(parts) == whole).all()
    endless = model.stream(seed=3, batch_size=5)
    assert (np.concatenate([next(endless), next(endless)]) == whole[:10]).all()


def test_pictures_and_tensors_hold_the_same_grey_levels(jumper):
    images = load(jumper)(3)
    assert (np.stack([np.asarray(each) for each in to_pil(images)]) == images[..., 0]).all()
    assert torch.equal(to_tensor(images).permute(0, 2, 3, 1), torch.from_numpy(images))
    colours = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    assert (np.asarray(to_pil(colours)[0]) == colours[0]).all()


@pytest.fixture(scope="module")
def classes(tmp_path_factory, tiny, quick) -> Path:
    out = tmp_path_factory.mktemp("classes") / "teacher"
    options = replace(teachers.Options.default("digits"), net=tiny, num_classes=10, out=out)
    teachers.train(replace(options, fit=replace(quick, iterations=2)))
    return out


def test_labels_are_one_for_all_or_one_for_each(classes):
    model = load(classes)
    make = {"steps": 2, "sampler": "ddim"}
    assert model.num_classes == 10
    each = model(4, label=[3, 3, 1, 1], **make)
    assert (each[:2] == model(4, label=3, **make)[:2]).all()
    assert (each[2:] == model(4, label=1, **make)[2:]).all()
    assert (model(4, label=[0, 1, 2, 3], **make) == model(4, **make)).all()  # every class in turn
    (streamed,) = model.stream(4, label=3, **make)
    assert (streamed == model(4, label=3, **make)).all()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"label": 10}, "below the model's 10 classes"),
        ({"label": [1, 2]}, "one class, or 4, got 2"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"sampler": "consistency"}, "not by consistency"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"guidance": -1.0}, "--guidance must be from 0"),
    ],
)
def test_what_a_model_cannot_do_is_an_error_of_one_line(classes, asked, words):
    with pytest.raises(UserError, match=words):
        load(classes)(4, **asked)


def test_a_stream_refuses_before_its_first_batch(jumper):
    for asked in ({"label": 1}, {"seed": -1}, {"num": 0}, {"first": -1}):
        with pytest.raises(UserError):
            load(jumper).stream(**asked)
    with pytest.raises(UserError, match="cpu or cuda"):
        load(jumper, device="mps")


def test_a_filter_greys_what_it_blocks_and_counts_it(jumper):
    images = load(jumper)(16, steps=2)
    means = images.mean((1, 2, 3))
    bad = means >= np.median(means)
    screened = load(jumper, filter=lambda x: x.mean((1, 2, 3)), filter_threshold=np.median(means))
    made = screened(16, steps=2, batch_size=5)
    assert (made[bad] == filters.GREY).all()
    assert (made[~bad] == images[~bad]).all()
    (streamed,) = screened.stream(16, steps=2)
    assert (streamed == made).all()
    assert screened.blocked == 2 * bad.sum() > 0
    with pytest.raises(UserError, match="expected one number for each of 4 images"):
        load(jumper, filter=lambda x: x)(4)


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/api.md").read_text(), re.S | re.M)


def test_the_examples_of_the_page_run(teacher, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = replace(distill.preset(cd.Options, teacher), out=Path("runs/digits/consistency"))
    distill.train(replace(options, fit=replace(quick, iterations=3)))
    assert len(examples()) >= 6
    names: dict[str, object] = {}
    for example in examples():
        exec(example, names)
    assert Path("first.png").exists()
    assert "needs a model with classes" in capsys.readouterr().out


def test_training_from_python_is_the_command_s(teacher, jumper):
    card = load_model(jumper).card
    assert card.method == "consistency-cd"
    assert card.parent == load_model(teacher).sha256
    assert distill.preset(cd.Options, teacher).fit == cd.PRESETS["digits"].fit


def test_importing_a_package_imports_no_command_of_it():
    """Python would run such a command's module twice, and says so."""
    code = """
import sys, teachers
assert "teachers.ddpm" not in sys.modules
import distill, students
commands = {"distill.progressive", "distill.consistency", "students.generate", "students.soup"}
assert not commands & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
