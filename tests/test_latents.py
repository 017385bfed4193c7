"""Latents: a codec whose x0 has another shape than the pixels, and the autoencoders behind it."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import students
from diffusion import autoencoder, batches, checkpoint, codec, latents
from diffusion import data as datasets
from diffusion.autoencoder import Autoencoder, AutoencoderConfig, Posterior, psnr
from diffusion.config import FitConfig
from diffusion.images import Captioned, InMemory, Texts
from diffusion.latents import Latents
from diffusion.model import load
from diffusion.training import make_worker
from distill import cd
from eval import compare
from students import export, generate
from teachers import autoencoder as autoencoders
from teachers import ddpm

QUICK = FitConfig(iterations=4, batch_size=16, precision="fp32", log_every=2)
HAAR = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


class Haar(nn.Module):
    """One level of Haar's wavelets: orthogonal, so that its transpose decodes it exactly."""

    channels, latent_channels, factor, sha256 = 1, 4, 2, "0" * 64

    def encode(self, x):
        squares = nn.functional.pixel_unshuffle(x, 2)
        return torch.einsum("ij,bjhw->bihw", HAAR, squares)

    def decode(self, z):
        return nn.functional.pixel_shuffle(torch.einsum("ji,bjhw->bihw", HAAR, z), 2)


@pytest.fixture
def haar(monkeypatch):
    """The place of an autoencoder that loses nothing."""
    monkeypatch.setattr(autoencoder, "load", lambda place, sha256="": Haar())
    return "/haar"


def smooth(count: int) -> InMemory:
    """Images whose rows and columns resemble their neighbours', not mirror images of themselves."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 3, 3, generator=random)
    images = nn.functional.interpolate(coarse, (8, 8), mode="bilinear") * 255
    return InMemory(images.round().to(torch.uint8), {"label": torch.arange(count) % 10})


def test_x0_of_another_shape_has_unit_variance_and_decodes_to_the_same_pixels(haar):
    images = smooth(300)
    made = Latents.of(images, haar)
    assert made.shape((1, 8, 8)) == (4, 4, 4)
    x0 = made.encode(images.images)
    assert x0.shape == (300, 4, 4, 4)
    by_channel = x0.transpose(0, 1).flatten(1)
    assert by_channel.mean(1).abs().max() < 1e-3
    assert (by_channel.std(1) - 1).abs().max() < 1e-3
    assert len({round(value, 3) for value in made.std}) == 4, "each channel has its own scale"
    assert torch.equal(made.decode(x0), images.images)
    assert codec.from_json(codec.to_json(made)) == made


def test_cached_latents_are_those_of_the_images_and_of_the_mirrored_ones(haar, monkeypatch):
    images = smooth(100)
    made = Latents.of(images, haar)
    for flip in (False, True):
        source, x0 = made.prepared(images, flip)
        monkeypatch.setattr(latents, "_encode", None)  # from here on nothing is encoded
        again, _ = made.prepared(images, flip)
        monkeypatch.undo()
        monkeypatch.setattr(autoencoder, "load", lambda place, sha256="": Haar())
        which = torch.tensor([5, 99, 5, 0])
        rows = source.take(which)
        assert torch.equal(rows.images, again.take(which).images)
        assert torch.equal(rows.condition["label"], which % 10)
        mirrored = torch.tensor([True, False, False, True]) if flip else None
        pixels = images.images[which]
        if mirrored is not None:
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        assert (x0(rows.images, mirrored) - made.encode(pixels)).abs().max() < 5e-3  # float16


def test_a_damaged_cache_of_latents_is_made_anew(haar, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("diffusion.machine.CACHE", tmp_path)
    images = smooth(50)
    before = latents.encoded(images, haar, Haar.sha256, mirrored=False)
    (file,) = (tmp_path / "latents").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(content)
    after = latents.encoded(images, haar, Haar.sha256, mirrored=False)
    assert torch.equal(before, after)
    assert "damaged" in capsys.readouterr().out
    other = InMemory(images.images.flip(0))
    assert not torch.equal(latents.encoded(other, haar, Haar.sha256, mirrored=False), after)
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 2, "one for each fingerprint"


def test_images_with_texts_keep_them_beside_their_latents(haar):
    images = smooth(20)
    texts = Texts(torch.randn(3, 2, 4).half(), torch.arange(20) % 3, "1" * 64, ["", "a", "b"])
    source, _ = Latents.of(images, haar).prepared(Captioned(images, texts), flip=False)
    which = torch.tensor([4, 17])
    rows = source.take(which)
    assert rows.images.shape == (2, 4, 4, 4)
    assert torch.equal(rows.condition["text"], texts.take(which))
    assert torch.equal(rows.condition["label"], which % 10)


def test_batches_of_pixels_are_what_they_were_before_latents(digits):
    config = replace(QUICK, flip=True)
    drawn = batches.Batches(digits, config, make_worker()).draw(3)
    random = torch.Generator().manual_seed(batches.batch_seed(0, 3))
    which = torch.randint(len(digits.train), (16,), generator=random)
    eps = torch.randn(16, 1, 8, 8, generator=random)
    torch.rand((), generator=random, dtype=torch.float64)
    mirrored = torch.rand(16, generator=random) < 0.5
    images = digits.train.images[which]
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    assert torch.equal(drawn.x0, digits.codec.encode(images))
    assert torch.equal(drawn.eps, eps)


# Our own autoencoder


def test_the_posteriors_divergence_is_that_of_normal_distributions():
    mean, log_variance = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    normal = torch.distributions.Normal
    parts = torch.distributions.kl_divergence(
        normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)
    )
    assert torch.allclose(Posterior(mean, log_variance).kl(), parts.flatten(1).sum(1))


@pytest.mark.parametrize(("factor", "patch", "levels"), [(4, 2, 1), (8, 1, 3), (2, 2, 0)])
def test_an_autoencoder_makes_a_side_so_many_times_smaller(factor, patch, levels):
    config = AutoencoderConfig(3, factor, 5, 8, patch)
    network, x = Autoencoder(config), torch.randn(2, 3, 16, 16)
    assert config.levels == levels
    assert network.encode(x).shape == (2, 5, 16 // factor, 16 // factor)
    assert network.decode(network.encode(x)).shape == x.shape


def test_psnr_is_that_of_a_known_error():
    images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert psnr(images, images + 10).tolist() == pytest.approx([28.1308, 28.1308], abs=1e-4)


SMALL = AutoencoderConfig(channels=1, factor=2, latent_channels=2, width=8, patch=2)


def options(out, **fit) -> autoencoders.Options:
    return autoencoders.Options(
        data="digits", size=8, out=out, net=SMALL, fit=replace(QUICK, **fit)
    )


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """An autoencoder's run. Not to be written to."""
    out = tmp_path_factory.mktemp("latents") / "digits" / "autoencoder"
    autoencoders.train_autoencoder(options(out, iterations=120, learning_rate=1e-2, ema=0.9))
    return out


def test_training_makes_images_like_the_originals(run, tmp_path):
    _, trained = autoencoders.train_autoencoder(
        options(run, iterations=120, learning_rate=1e-2, ema=0.9)
    )
    _, untrained = autoencoders.train_autoencoder(options(tmp_path / "run", iterations=1))
    assert trained > untrained + 3
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert names == {"autoencoder.safetensors", "log.jsonl", "samples.png"}


def test_an_autoencoder_stopped_and_resumed_ends_with_the_same_bits(tmp_path, stop_at_save):
    fit = {"iterations": 8, "save_every": 0.0}
    whole, _ = autoencoders.train_autoencoder(options(tmp_path / "whole", **fit))
    stop_at_save(lambda: autoencoders.train_autoencoder(options(tmp_path / "run", **fit)))
    resumed, _ = autoencoders.train_autoencoder(options(tmp_path / "run", **fit))
    assert whole.sha256 == resumed.sha256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 3}, "--factor must be a power of 2"),
        ({"patch": 4}, "--patch must be at most --factor 2"),
        ({"channels": 3}, "--channels is 3"),
    ],
)
def test_an_autoencoders_shape_that_cannot_be_is_one_line(tmp_path, change, words):
    wrong = options(tmp_path / "run")
    with pytest.raises(autoencoders.UserError, match=words):
        autoencoders.train_autoencoder(replace(wrong, net=replace(SMALL, **change)))


# A model in latents


@pytest.fixture(scope="session")
def teacher(run):
    """A teacher in latents. Not to be written to."""
    out = run.parent / "teacher"
    net = replace(ddpm.UNetConfig(), width=8, multipliers=(1,), blocks=1, attention=())
    chosen = ddpm.Options(codec=str(run), net=net, fit=QUICK, out=out)
    ddpm.train_teacher(chosen)
    return out


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_an_exported_graph_holds_the_autoencoder(teacher, tmp_path, to):
    chosen = export.Options(teacher, to, steps=2, sampler="ddim", out=tmp_path / "out")
    folder, _ = export.export(chosen)
    images = students.load(teacher, precision="fp32")(7, steps=2, sampler="ddim")
    assert (students.load(folder, trust=True)(7) == images).all()


def test_a_teacher_in_latents_is_distilled_generated_and_compared(teacher, tmp_path, command):
    model = load(teacher)
    assert (model.shape, model.spec.shape) == ((2, 4, 4), (1, 8, 8))
    assert (model.card.net["channels"], model.card.net["size"]) == (2, 4)
    cd.distill(cd.Options(teacher, loss=cd.Loss(num_angles=4), fit=QUICK, out=tmp_path / "cd"))
    made = next(generate.generate(load(tmp_path / "cd"), generate.Options(tmp_path / "cd", num=3)))
    assert made.shape == (3, 1, 8, 8)
    assert made.dtype == torch.uint8
    shutil.copytree(teacher, tmp_path / "teacher")
    few = "--no-long --no-times --solvers ddim --num-images 80 --features random --steps 2"
    runs = [tmp_path / "teacher", tmp_path / "cd", "--autoencoder", teacher.parent / "autoencoder"]
    done = command(compare.main, *runs, *few.split(), "--out", tmp_path / "table")
    assert done.code == 0, done.err
    assert "consistency-cd" in (tmp_path / "table" / "table.md").read_text()


def test_an_autoencoder_that_moved_is_found_beside_the_model_or_by_its_flag(
    run, teacher, tmp_path, command
):
    file, place = run / "autoencoder.safetensors", "autoencoder.safetensors"
    for folder in ("alone", "around"):
        model = tmp_path / folder / "model"
        shutil.copytree(teacher, model)
        hide(model, tmp_path)
        shutil.copy(file, (model if folder == "alone" else model.parent) / place)
        assert load(model).codec.sha256 == load(teacher).codec.sha256
    lost = tmp_path / "lost" / "far" / "away" / "model"
    shutil.copytree(teacher, lost)
    hide(lost, tmp_path)
    few = "--num", 2, "--sampler", "ddim", "--steps", 2, "--out", tmp_path / "grid.png"
    done = command(generate.main, lost, *few)
    assert done.code == 2
    assert "--autoencoder" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert command(generate.main, lost, *few, "--autoencoder", run).code == 0
    other = tmp_path / "other"
    autoencoders.train_autoencoder(options(other, iterations=1))
    done = command(generate.main, lost, *few, "--autoencoder", other)
    assert done.code == 2
    assert "another autoencoder" in done.err


def hide(model, tmp_path) -> None:
    """Let the model's card name a place where there is no autoencoder."""
    weights, card, _ = checkpoint.load(model)
    nowhere = card.codec | {"autoencoder": str(tmp_path / "nowhere")}
    checkpoint.save(model / "model.safetensors", weights, replace(card, codec=nowhere))


@pytest.mark.parametrize(
    ("choice", "words"),
    [("nothing", "unknown codec 'nothing'"), (".", "no autoencoder at"), ("latents", "unknown")],
)
def test_a_codec_that_is_none_is_one_line(choice, words):
    with pytest.raises(datasets.UserError, match=words):
        datasets.load("digits", codec=choice)


# Autoencoders of diffusers


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_an_autoencoder_of_diffusers_encodes_and_decodes_as_diffusers_does(kind, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
        }
        made = diffusers.AutoencoderKL(3, 3, latent_channels=2, **blocks)
    else:
        made = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=2,
        )
    made.eval().save_pretrained(tmp_path / "vae")
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    ours = Latents.of(InMemory(images), f"diffusers:{tmp_path / 'vae'}")
    assert ours.shape((3, 8, 8)) == (2, 4, 4)
    with torch.no_grad():
        coded = made.encode(images / 127.5 - 1)
        theirs = coded.latents if kind == "AutoencoderTiny" else coded.latent_dist.mode()
        mean, std = (torch.tensor(each)[:, None, None] for each in (ours.mean, ours.std))
        assert torch.allclose(ours.encode(images) * std + mean, theirs, atol=1e-5)
        again = (made.decode(theirs).sample * 127.5 + 127.5).round().clamp(0, 255)
    off = (ours.decode(ours.encode(images)).float() - again).abs().max()
    assert off <= 1, "to the rounding of a grey level"


def test_a_folder_of_another_network_of_diffusers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(datasets.UserError, match="expected one of AutoencoderKL"):
        autoencoder.load(f"diffusers:{tmp_path}")
