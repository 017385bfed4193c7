"""A whole pipeline of Stable Diffusion's layout: latents, prompts, guidance; there and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion import autoencoder, text_encoder
from diffusion.config import FitConfig
from diffusion.model import Model, load
from diffusion.samplers import sample
from distill import guidance, progressive
from eval.measure.nfe import count_calls
from students import generate
from students.to_diffusers import to_diffusers
from tests.test_foreign import SCALED, at, conditioned, save_reader

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array__ implementation")

PROMPTS = ["a red cat", "dog", "", "the moon and a star"]
WEIGHT = 4.0
QUICK = FitConfig(iterations=2, batch_size=4, warmup=1, precision="fp32")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Random weights; 16x16 images, latents of 8x8, texts of 16 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    encoder, tokenizer = save_reader(folder / "reader")
    torch.manual_seed(2)
    made = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
        ).eval(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=conditioned(in_channels=4, out_channels=4),
        scheduler=diffusers.DDIMScheduler(**SCALED, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder / "pipeline")
    return made, Path(f"diffusers:{folder / 'pipeline'}")


@pytest.fixture
def captioned(tmp_path) -> Path:
    """A folder of images with a text beside each."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for i in range(8):
        levels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"cat {'abcdefgh'[i]}")
    return folder


def noise() -> Tensor:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def theirs(pipeline, num_steps: int) -> Tensor:
    """Images (4, 16, 16, 3) from 0 to 1 by their own call."""
    asked = {"guidance_scale": WEIGHT, "num_inference_steps": num_steps, "output_type": "np"}
    return torch.from_numpy(pipeline(prompt=PROMPTS, latents=noise(), **asked).images)


def ours(model: Model, angles: Tensor, home: Path) -> Tensor:
    read = text_encoder.load(home / "text_encoder")
    condition = {
        "text": read.prompts(PROMPTS, model.kinds["text"]),
        "guidance": torch.full((4,), WEIGHT),
    }
    x0 = sample(model.denoiser, iter([noise()]), "ddim", angles, condition)
    decoder = autoencoder.load(model.codec.autoencoder)
    std = torch.tensor(model.codec.std)[:, None, None]
    with torch.no_grad():
        images = decoder.decode(x0 * std) / 2 + 0.5
    made = model.codec.decode(x0)
    assert (made.float() / 255 - images).abs().max() < 0.51 / 255 or images.abs().max() > 1
    return images.clamp(0, 1).permute(0, 2, 3, 1)


def test_a_pipelines_images_are_its_own_for_prompts_and_guidance(pipeline):
    made, place = pipeline
    model = load(place)
    assert model.spec.shape == (3, 16, 16)
    assert model.shape == (4, 8, 8)
    expected = theirs(made, 8)
    images = ours(model, at(model, made.scheduler.timesteps), Path(str(place).partition(":")[2]))
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)
    assert expected.std() > 0.01


def test_a_guided_student_takes_four_calls_and_goes_back(
    pipeline, captioned, tmp_path, monkeypatch
):
    _, place = pipeline
    monkeypatch.chdir(tmp_path)
    asked = guidance.Options(place, data=str(captioned), guidance=(1.0, 6.0), fit=QUICK)
    guided = guidance.distill(asked)
    halving = {"start_steps": 8, "rounds": (4,), "fit": QUICK}
    student = progressive.distill(progressive.Options(Path("runs/pipeline/guided"), **halving))[0]
    plan = student.plan(4, guidance=WEIGHT)
    assert count_calls(student, plan) == 4
    assert count_calls(load(place), load(place).plan(4, "ddim", guidance=WEIGHT)) == 8
    weights = set(guided.denoiser.net.state_dict()) - set(load(place).denoiser.net.state_dict())
    assert weights == {"time_embedding.cond_proj.weight"}

    # one guided step later the weight is heard; made loud, so that it shows
    torch.nn.init.normal_(student.denoiser.net.time_embedding.cond_proj.weight, std=0.3)
    assert to_diffusers(student, tmp_path / "back") == [999, 749, 499, 249]
    back = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "back" / "unet"),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(tmp_path / "back" / "scheduler"),
    }
    home = Path(str(place).partition(":")[2])
    again = diffusers.StableDiffusionPipeline.from_pretrained(home, **back, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    images = ours(student, plan.on(student.device), home)
    torch.testing.assert_close(images, theirs(again, 4), atol=1e-3, rtol=0)


def test_a_command_makes_images_of_a_prompt(pipeline, tmp_path, command):
    _, place = pipeline
    asked = ["--prompt", "a red cat", "--guidance", 3, "--num", 1, "--steps", 2]
    asked += ["--sampler", "unipc", "--out", tmp_path / "cat.png"]
    done = command(generate.main, place, *asked)
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "cat.png").size >= (16, 16)
