"""Editing: what is known of an image stays to the grey level, whatever the network makes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion import codec, networks
from diffusion.checkpoint import Card, save
from diffusion.denoiser import DenoiserConfig
from diffusion.model import build, load
from diffusion.networks import UNetConfig
from diffusion.noise import Noise
from diffusion.plan import plan
from students import edit, restore
from students import load as load_maker

SHAPES = (3, 8, 8)
MASK = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
MEASURES = {
    "pixels": restore.pixels(MASK, 3),
    "blocks of 2": restore.blocks(SHAPES, 2),
    "blocks of 4": restore.blocks(SHAPES, 4),
    "luma": restore.luma(SHAPES),
}
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_measure
def test_keeping_is_the_orthogonal_projection_onto_what_measures_so(measure):
    x, target, other = (drawn(seed, 2, *SHAPES) for seed in range(3))
    measured = measure.of(target)
    kept = measure.keep(x, measured)
    assert (measure.of(kept) - measured).abs().max() < 1e-12
    torch.testing.assert_close(measure.keep(kept, measured), kept)
    other = measure.keep(other, measured)  # any other image that measures so lies farther away,
    inner = ((x - kept) * (other - kept)).flatten(1).sum(1)  # at a right angle
    assert inner.abs().max() < 1e-12
    assert torch.equal(measure.put(measure.split(x), x), x)


def test_what_is_measured_is_what_others_compute():
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    means = torch.nn.functional.avg_pool2d(images.double(), 4).flatten(1)
    torch.testing.assert_close(MEASURES["blocks of 4"].of(images.double()), means)
    grey = MEASURES["luma"].of(images.double()).reshape(2, 8, 8)
    for image, levels in zip(images, grey, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).byte().numpy()).convert("L")
        assert np.abs(np.asarray(pillow) - levels.numpy()).max() < 0.51


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from([*MEASURES]), seed=st.integers(0, 10**6), spread=st.floats(0, 1e4))
def test_settled_images_measure_so_to_the_grey_level_however_wild_they_were(name, seed, spread):
    measure, generator = MEASURES[name], torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, measure.of(drawn(0, 2, *SHAPES)).shape, generator=generator)
    settled = measure.settle(128 + spread * drawn(seed, 2, *SHAPES), levels)
    assert settled.dtype == torch.uint8
    assert measure.difference(settled, levels) == 0


@every_measure
def test_an_image_that_measures_so_already_stays_as_it_is(measure):
    images = torch.randint(0, 256, (2, *SHAPES), generator=torch.Generator().manual_seed(2))
    if measure is not MEASURES["luma"]:  # whose values are no whole numbers
        images = images // 16 * 16
    settled = measure.settle(images.double(), measure.of(images.double()))
    assert (settled.double() - images).abs().max() <= 1


def test_an_image_of_which_nothing_is_known_is_rounded_alone():
    measure, images = (
        restore.pixels(torch.zeros(8, 8, dtype=torch.bool), 3),
        300 * drawn(0, 2, *SHAPES),
    )
    levels = measure.of(images)
    settled = measure.settle(images, levels)
    assert torch.equal(settled, images.round().clamp(0, 255).byte())
    assert measure.difference(settled, levels) == 0


def test_restoring_as_algorithm_4_written_out():
    """Song et al. 2023: fill in, jump, fill in, and again from less noise."""
    x, mask = drawn(0, 1, 1, 4, 4), torch.tensor([True, False]).repeat(8).reshape(4, 4)
    angles = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    noises = [drawn(10 + i, 1, 1, 4, 4) for i in range(3)]

    def jump(x_t, t):
        return x_t * t.cos() + 0.1 * t

    measure = restore.pixels(mask, 1)
    known = measure.of(x)
    blank = measure.keep(torch.zeros_like(x), known)
    result = restore.restore(jump, iter(noises), angles, blank, lambda y: measure.keep(y, known))
    expected = torch.where(mask, x, 0)
    for t, z in zip([1.5, 1.0, 0.5], noises, strict=True):
        noisy = np.cos(t) * expected + np.sin(t) * z
        expected = torch.where(mask, x, noisy * np.cos(t) + 0.1 * t)
    torch.testing.assert_close(result, expected)


@pytest.fixture(scope="module")
def jumper(tmp_path_factory):
    """(channels) -> the file of a consistency student of random weights."""

    def make(channels: int):
        net = UNetConfig(channels, 8, width=8, multipliers=(1,), blocks=1, attention=())
        spec = {"name": "noise", "channels": channels, "size": 8}
        card = Card(
            method="consistency-cd",
            plans=(plan("consistency", torch.tensor([0.0, 1.5])),),
            abilities=("jump",),
            net=networks.to_json(net),
            denoiser=DenoiserConfig().to_json(),
            condition={},
            codec=codec.to_json(codec.Scale(77.0, 90.0)),
            data=spec,
        )
        torch.manual_seed(0)
        network = build(net, DenoiserConfig(), {}, "fp32").net
        path = tmp_path_factory.mktemp("jumper") / "model.safetensors"
        save(path, network.state_dict(), card)
        return path

    return make


@pytest.fixture
def inputs(tmp_path):
    """A folder of two colour pictures, their grey and small forms, and a mask."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        for name, picture in {
            "colour": Image.fromarray(image),
            "grey": Image.fromarray(image).convert("L"),
            "small": Image.fromarray(image[::2, ::2]),
        }.items():
            (tmp_path / name).mkdir(exist_ok=True)
            picture.save(tmp_path / name / f"{i}.png")
    Image.fromarray(np.where(MASK, 0, 255).astype(np.uint8)).save(tmp_path / "mask.png")
    return tmp_path


def opened(folder, mode=None):
    images = [Image.open(path) for path in sorted(folder.glob("0*.png"))]
    return np.stack([np.asarray(each.convert(mode) if mode else each) for each in images])


@pytest.mark.parametrize("calls", [1, 4, 8])
def test_the_commands_keep_what_they_promise(command, jumper, inputs, calls):
    flags = ["--num", 2, "--steps", calls, "--out", inputs / "out"]
    given = {name: opened_all(inputs / name) for name in ("colour", "grey", "small")}
    outcome = command(
        edit.main, "inpaint", jumper(3), inputs / "colour", inputs / "mask.png", *flags
    )
    assert (outcome.code, "largest difference is 0 grey levels" in outcome.out) == (0, True)
    made = opened(inputs / "out")
    mask = MASK.numpy()
    assert (made[:, mask] == given["colour"].repeat(2, 0)[:, mask]).all()
    assert (made[:, ~mask] != given["colour"].repeat(2, 0)[:, ~mask]).any()
    assert (made[0] != made[1]).any()  # two ways
    assert command(edit.main, "upscale", jumper(3), inputs / "small", *flags).code == 0
    means = opened(inputs / "out").reshape(4, 4, 2, 4, 2, 3).mean((2, 4))
    assert (means == given["small"].repeat(2, 0)).all()
    assert command(edit.main, "colourise", jumper(3), inputs / "grey", *flags).code == 0
    colours = opened(inputs / "out")
    luma = (colours @ np.array(restore.LUMA)).round()
    assert (luma == given["grey"].repeat(2, 0)).all()
    text = Image.open(inputs / "out" / "000003.png").text
    assert (text["Edit"], text["Number"], text["Steps"]) == ("colourise", "3", str(calls))


def opened_all(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def test_an_interpolation_goes_from_one_image_to_the_other(command, jumper, inputs):
    student = jumper(1)
    flags = ["--first", 3, "--last", 8, "--num", 5, "--seed", 2, "--steps", 2]
    flags += ["--precision", "fp32", "--out", inputs / "out"]
    assert command(edit.main, "interpolate", student, *flags).code == 0
    images = load_maker(student, precision="fp32")(9, steps=2, seed=2)[..., 0]
    made = opened(inputs / "out")
    assert len(made) == 5
    for end, number in ((0, 3), (4, 8)):
        assert np.abs(made[end].astype(int) - images[number]).max() <= 1


def test_noise_on_the_way_between_is_standard_normal_again():
    start, end = (Noise(0, torch.tensor([i]), (1, 100, 100)) for i in (0, 1))
    shares = torch.linspace(0, 1, 5, dtype=torch.float64)
    x = next(edit.between(start, end, shares))
    assert (x.flatten(1).var(1) - 1).abs().max() < 0.05
    assert torch.equal(x[0], next(Noise(0, torch.tensor([0]), (1, 100, 100)))[0])


def test_a_sketch_with_little_noise_is_itself(jumper):
    model = load(jumper(1))
    editor = edit.editor_of(model, edit.Settings(steps=2))
    images = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images, numbers = images.byte(), torch.arange(2)
    little = editor.sketched(1e-4, images, numbers).int() - images.int()
    much = editor.sketched(1.5, images, numbers).int() - images.int()
    assert little.abs().max() <= 1
    assert much.abs().max() > 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("inpaint STUDENT missing.png mask.png", "no picture at missing.png"),
        ("inpaint STUDENT colour empty.png", "empty.png cannot be read"),
        ("upscale STUDENT small --factor 3", "--factor must divide the model's size 8"),
        ("colourise STUDENT grey", "needs a model of colour images"),
        ("sketch STUDENT grey --angle 2", "--angle must be above 0"),
        ("sketch STUDENT grey --steps 9", "--steps must be at least 1 and at most 8"),
        ("sketch STUDENT grey --out a.jpg", "--out must be a .png"),
        ("sketch STUDENT grey --label 1", "needs a model with classes"),
        ("interpolate STUDENT --num 1", "--num must be at least 2"),
        ("interpolate TEACHER", "needs a model that jumps"),
    ],
)
def test_a_mistake_is_one_line(command, jumper, teacher, inputs, monkeypatch, arguments, words):
    monkeypatch.chdir(inputs)
    (inputs / "empty.png").write_bytes(b"")
    words_of = {"STUDENT": str(jumper(1)), "TEACHER": str(teacher)}
    outcome = command(edit.main, *(words_of.get(word, word) for word in arguments.split()))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert words in outcome.err
