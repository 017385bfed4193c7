"""A pipeline of words that diffusers and transformers trained alone, and its student."""

import json
from pathlib import Path

import pytest
import torch

from diffusion import data as datasets
from diffusion.config import FitConfig
from diffusion.image_file import Form
from diffusion.model import load
from distill import guidance, progressive
from eval.measure.nfe import count_calls
from experiments import diffusers_words
from tests import test_emoji
from tests.test_pipelines import WEIGHT, ours, theirs

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array__ implementation")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """Drawings of "thing 0" to "thing 39", as npm's packages hold them."""
    folder = tmp_path_factory.mktemp("packages")
    about = [test_emoji.entry(number) for number in range(test_emoji.GLYPHS)]
    for i, name in enumerate(test_emoji.VENDORS):
        pictures = {j: test_emoji.drawing(1000 * i + j) for j in range(test_emoji.GLYPHS)}
        test_emoji.write(folder, name, pictures, about)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, packages) -> Path:
    """Its folder, after seconds of training."""
    seconds = {"autoencoder_minutes": 0.03, "unet_minutes": 0.03}
    out = tmp_path_factory.mktemp("words") / "pipeline"
    options = diffusers_words.Options(**seconds, batch_size=8, data_dir=packages, out=out)
    return diffusers_words.train(options)


def test_diffusers_reads_what_was_saved_and_its_images_are_ours(pipeline):
    made = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    made.set_progress_bar_config(disable=True)
    model = load(Path(f"diffusers:{pipeline}"))
    assert model.spec.shape == (3, 32, 32)
    angles = model.plan(8, "ddim", guidance=WEIGHT).on(model.device)
    images = ours(model, angles, pipeline)
    torch.testing.assert_close(images, theirs(made, 8), atol=1e-3, rtol=0)


def test_latents_have_unit_variance_and_names_are_tokens_of_their_own(pipeline, packages):
    model = load(Path(f"diffusers:{pipeline}"))
    train = datasets.load("emoji", packages, Form(32)).train
    images = train.take(torch.arange(len(train))).images
    assert model.codec.encode(images).std() == pytest.approx(1, abs=0.01)
    words = json.loads((pipeline / "tokenizer" / "tokenizer.json").read_text())
    assert "thing</w>" in words["model"]["vocab"]


def test_its_guided_student_learns_from_emoji_and_their_names(
    pipeline, packages, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    quick = FitConfig(iterations=2, batch_size=4, warmup=1, precision="fp32")
    given = {"data": "emoji", "data_dir": packages, "fit": quick}
    guidance.distill(guidance.Options(Path(f"diffusers:{pipeline}"), **given))
    halving = {"start_steps": 8, "rounds": (4,), "data_dir": packages, "fit": quick}
    guided = Path("runs/pipeline/guided")
    student = progressive.distill(progressive.Options(guided, **halving))[0]
    assert student.card.data["name"] == "emoji"
    assert count_calls(student, student.plan(4, guidance=3.0)) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--unet-minutes", 0], "--unet-minutes must be above 0, got 0"),
        (["--batch-size", 3], "--batch-size must be at least 4"),
        (["--out", "."], "is there already: delete it, or give another --out"),
    ],
)
def test_what_cannot_be_trained_is_said_before_the_training(options, words, command):
    done = command(diffusers_words.main, *options)
    assert done.code == 2
    assert words in done.err
