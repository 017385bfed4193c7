"""A folder of images that moved is known again by its content, and one that changed is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion import checkpoint
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.networks import UNetConfig
from distill import progressive
from eval import compare, report
from teachers import ddpm

NET = UNetConfig(channels=3, size=8, width=8, multipliers=(1,), blocks=1, attention=())
FIT = FitConfig(iterations=4, batch_size=8, warmup=1, precision="fp32")


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of images that are half transparent."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        levels = np.random.default_rng(i).integers(0, 256, (8, 8, 4), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{i}.png")
    return folder


def teach(photos: Path, run: Path, **changes) -> Path:
    options = ddpm.Options(data=str(photos), net=NET, fit=FIT, out=run, background="black")
    ddpm.train_teacher(replace(options, **changes))
    return run


def compared(runs: Path, **changes) -> compare.Options:
    few = {"steps": "1", "long": False, "solvers": ("ddim",), "features": "random"}
    few |= {"num_images": 80, "likelihood": 0, "times": False, "precision": "fp32", "seeds": (0,)}
    return compare.Options((runs,), **few | changes)


def test_a_moved_folder_is_trained_distilled_compared_and_reported_with_as_before(
    tmp_path, photos, command
):
    runs = tmp_path / "runs"
    teacher = teach(photos, runs / "teacher")
    (before,) = compare.compare(compared(runs))
    moved = photos.rename(tmp_path / "elsewhere")

    student = progressive.Options(teacher=teacher, start_steps=2, end_steps=1, fit=FIT)
    for ask in (
        lambda: progressive.distill(student),
        lambda: compare.compare(compared(runs)),
    ):
        with pytest.raises(UserError, match=rf"{photos} are no longer there: name with --data"):
            ask()
    teach(moved, teacher)  # finished before, on these images
    progressive.distill(replace(student, data=str(moved)))
    progressive.distill(replace(student, data=str(moved)))
    records = compare.compare(compared(runs, data=str(moved)))
    assert [record for record in records if record.parent is None] == [before]
    assert len(records) == 2
    assert before.data["background"] == "black"
    page = command(report.main, runs / "compare", "--no-times", "--data", moved)
    assert page.code == 0
    assert "Nearest training images" in (runs / "compare" / "report.html").read_text()


def test_images_that_changed_in_place_are_refused_in_one_line(tmp_path, photos):
    runs = tmp_path / "runs"
    teacher = teach(photos, runs / "teacher")
    for file in photos.iterdir():
        with Image.open(file) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    student = progressive.Options(teacher=teacher, start_steps=2, end_steps=1, fit=FIT)
    for ask, words in (
        (lambda: teach(photos, teacher), "trained on other images than .*photos holds"),
        (lambda: progressive.distill(student), "does not hold the images that the model was"),
        (lambda: compare.compare(compared(runs)), "does not hold the images that the model was"),
    ):
        with pytest.raises(UserError, match=words) as error:
            ask()
        assert "\n" not in str(error.value)


def test_another_background_makes_other_images(tmp_path, photos):
    teach(photos, tmp_path / "teacher")
    with pytest.raises(UserError, match="--background"):
        teach(photos, tmp_path / "teacher", background="white")


def test_a_card_from_before_fingerprints_is_taken_with_the_images_of_its_name(tmp_path, photos):
    runs = tmp_path / "runs"
    teacher = teach(photos, runs / "teacher")
    weights, card, _ = checkpoint.load(teacher)
    old = {k: v for k, v in card.data.items() if k not in ("sha256", "background")}
    settings = {k: v for k, v in card.training["settings"].items() if k != "data_sha256"}
    card = replace(card, data=old, training=card.training | {"settings": settings})
    checkpoint.save(teacher / "model.safetensors", weights, card)
    teach(photos, teacher)
    student = progressive.Options(teacher=teacher, start_steps=2, end_steps=1, fit=FIT)
    progressive.distill(student)
    assert len(compare.compare(compared(runs))) == 2


def test_a_folder_of_this_place_gives_its_name_to_the_runs(monkeypatch, photos):
    monkeypatch.chdir(photos)
    assert ddpm.run_folder(".") == Path("runs/photos")
    assert ddpm.run_folder("../photos/") == Path("runs/photos")
    assert ddpm.run_folder("digits") == Path("runs/digits")


def test_a_teacher_in_its_own_folder_of_photos_learns_from_the_photos_alone(
    monkeypatch, photos, capsys
):
    monkeypatch.chdir(photos)
    teach(Path("."), None)
    assert Path("runs/photos/teacher/samples.png").exists()
    compare.compare(compared(Path("runs")))
    assert "12 images found, 12 taken" in capsys.readouterr().out
    compare.compare(compared(Path("runs")))
    said = capsys.readouterr().out
    assert "12 images found, 12 taken" in said
    assert "2 made by fewstep (runs/compare, runs/photos/teacher)" in said
