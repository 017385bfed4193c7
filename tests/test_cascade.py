"""Coarse to fine: models that refine a smaller image, alone and one after the other."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusion import codec, condition
from diffusion.batches import Batches
from diffusion.circle import broadcast
from diffusion.condition import Small
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.data import DATASETS, Dataset, ImageSpec, load
from diffusion.images import InMemory, Reduced, Source
from diffusion.model import load as load_model
from diffusion.networks import UNetConfig
from diffusion.noise import Noise
from diffusion.plan import plan
from diffusion.samplers import DENOISE, SOLVERS, sample
from diffusion.schedules import cosine
from diffusion.training import make_worker
from distill import cd, progressive
from eval import compare
from students import generate
from students.api import Checkpoint
from students.cascade import Cascade
from teachers import ddpm

SMALL = Small(1, 4, mean=100.0, std=50.0)
QUICK = FitConfig(iterations=4, batch_size=16, precision="fp32", log_every=2)
NET = UNetConfig(size=8, width=8, multipliers=(1,), blocks=1, attention=())


def images(count: int, size: int = 8) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    shape = count, 1, size, size
    return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)


def test_a_clean_small_image_is_the_mean_of_squares_in_unit_variance():
    rows = SMALL.of(images(5))
    assert rows.shape == (5, 2, 4, 4)
    squares = images(5).double().reshape(5, 1, 4, 2, 4, 2).mean((3, 5))
    assert (rows[:, :1] * 50 + 100 - squares).abs().max() <= 0.5 + 1e-4
    assert (rows[:, 1] == 0).all()


def test_noise_on_a_small_image_keeps_unit_variance_and_says_how_much_it_is():
    random = torch.Generator().manual_seed(0)
    y, noise = torch.randn(2, 4000, 1, 4, 4, generator=random)
    share = torch.rand(4000, generator=random)
    rows = SMALL.trained(SMALL.noisy(y, torch.zeros(4000)), None, share, noise)
    angle = rows[:, 1:]
    assert torch.allclose(angle[:, 0, 0, 0], share * SMALL.most)
    assert rows[:, 0].var() == pytest.approx(1, abs=0.02)
    assert torch.allclose(rows[:, :1], angle.cos() * y + angle.sin() * noise, atol=1e-6)
    null = SMALL.null(rows)
    assert (null[:, 0] == 0).all()
    assert torch.allclose(null[:, 1], torch.full((4000, 4, 4), math.pi / 2))
    assert torch.equal(null[:3], SMALL.rows(torch.arange(3)))


def test_a_batch_has_the_small_version_of_each_image_mirrored_with_it():
    spec = ImageSpec("made up", 1, 8)
    source = InMemory(images(64))
    scale = codec.Scale(SMALL.mean, SMALL.std)
    config = replace(QUICK, flip=True, label_dropout=0.0, batch_size=64)
    kinds = {"small": replace(SMALL, most=0.0)}
    batch = Batches(Dataset(spec, source, source, scale), config, make_worker(), kinds).draw(0)
    pooled = F.adaptive_avg_pool2d(batch.x0, 4)
    assert (pooled - batch.condition["small"][:, :1]).abs().max() <= 0.5 / 50 + 1e-5
    config = replace(config, flip=False)
    plain = Batches(Dataset(spec, source, source, scale), config, make_worker(), kinds)
    assert not torch.equal(plain.draw(0).x0, batch.x0), "some images are mirrored"


def test_held_out_images_say_what_a_model_is_told_when_it_is_compared(digits):
    numbers = torch.tensor([0, 5, len(digits.test)])
    told = digits.given(numbers, {"small": SMALL})["small"]
    assert torch.equal(told[0], told[2]), "the order begins anew"
    rows = SMALL.of(digits.test.images)
    assert all((rows == each).flatten(1).all(1).any() for each in told)
    assert digits.given(numbers) == {}


def exact(x_t, t, condition):
    """E[x0 | x_t, small] where x0 = small, made larger, + d, of independent d ~ N(0, 1/4) whose
    mean over each square of 2x2 pixels is 0 (the normal distribution's conditional mean)."""
    mean = F.interpolate(condition["small"][:, :1], scale_factor=2.0).to(x_t.dtype)
    c, s = (broadcast(each, x_t) for each in (t.cos(), t.sin()))
    rest = x_t - c * mean
    rest = rest - F.interpolate(F.avg_pool2d(rest, 2), scale_factor=2.0)
    variance = 0.25
    return mean + c * variance / (c * c * variance + s * s) * rest


@pytest.mark.parametrize(
    "solver", [name for name, each in SOLVERS.items() if each.needs == DENOISE]
)
def test_every_solver_refines_to_the_exact_conditional_distribution(solver):
    count = 400
    given = SMALL.of(images(count))
    noise = Noise(1, torch.arange(count), (1, 8, 8))
    made = sample(exact, noise, solver, cosine(100), {"small": given})
    assert (F.avg_pool2d(made, 2) - given[:, :1]).abs().max() < 1e-4, "it is the small image's"
    detail = made - F.interpolate(given[:, :1], scale_factor=2.0)
    # of four numbers whose sum is 0, each has 3/4 of the variance
    assert detail.var() == pytest.approx(0.25 * 3 / 4, rel=0.1)


def test_the_u_net_is_as_it_was_where_nothing_is_refined():
    torch.manual_seed(0)
    before = NET.build(1, {}).state_dict()
    torch.manual_seed(0)
    with_small = NET.build(1, {"small": SMALL}).state_dict()
    assert {name for name in with_small if name not in before} == {
        name for name in with_small if name.startswith("small.")
    }
    assert before["stem.weight"].shape[1] + 1 == with_small["stem.weight"].shape[1]


def test_another_network_refuses_in_one_line(tmp_path):
    wrong = ddpm.Options.default("digits", net="dit")
    with pytest.raises(UserError, match=r"dit takes .*, not small"):
        ddpm.train_teacher(replace(wrong, from_size=4, out=tmp_path / "run"))


@pytest.mark.parametrize("size", [3, 8, 16, -1])
def test_a_size_that_is_no_divisor_is_one_line(tmp_path, size):
    with pytest.raises(UserError, match="--from-size must divide the images' size 8"):
        ddpm.train_teacher(replace(ddpm.Options(), from_size=size, out=tmp_path / "run"))


# Trained, on images of which the small one says all: each of its pixels, made larger


def blocks(data_dir, cache, download, form) -> Source:
    small = images(400, 4)
    large = small.repeat_interleave(8 // 4, -1).repeat_interleave(8 // 4, -2)
    chosen = small if form.size == 4 else large
    return Source(InMemory(chosen[:300]), InMemory(chosen[300:]), {})


@pytest.fixture(scope="module", autouse=True)
def with_blocks():
    DATASETS["blocks"] = blocks
    yield
    del DATASETS["blocks"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Not to be written to: `first` makes 4x4 images, `refine` makes 8x8 ones of them."""
    folder = tmp_path_factory.mktemp("runs")
    shared = {"data": "blocks", "clamp": True}
    ddpm.train_teacher(
        ddpm.Options(net=replace(NET, size=4), fit=QUICK, out=folder / "first", **shared)
    )
    fit = replace(QUICK, iterations=250, batch_size=32, learning_rate=1e-2, ema=0.95)
    ddpm.train_teacher(ddpm.Options(net=NET, fit=fit, from_size=4, out=folder / "refine", **shared))
    return folder


def test_what_a_trained_teacher_refines_is_near_the_small_image(runs):
    model = load_model(runs / "refine")
    held_out = load("blocks", form=ddpm.Form(8, 1)).test.images[:64]
    kind = model.kinds["small"]
    steps = model.plan(8, "ddim")
    near = model.sample(steps, 0, torch.arange(64), {"small": kind.of(held_out)})
    off = (kind.reduced(near).float() - kind.reduced(held_out).float()).abs().mean()
    untold = model.sample(steps, 0, torch.arange(64))
    lost = (kind.reduced(untold).float() - kind.reduced(held_out).float()).abs().mean()
    assert off < 25 < 60 < lost


def test_it_is_distilled_and_compared_like_any_other(runs, tmp_path, command):
    teacher = runs / "refine"
    progressive.distill(
        progressive.Options(teacher, out=tmp_path / "p", start_steps=4, rounds=(2,), fit=QUICK)
    )
    cd.distill(cd.Options(teacher, out=tmp_path / "cd", loss=cd.Loss(num_angles=4), fit=QUICK))
    few = "--no-long --no-times --solvers ddim --num-images 80 --features random --steps 2"
    names = [teacher, tmp_path / "p", tmp_path / "cd", "--likelihood", 2]
    done = command(compare.main, *names, *few.split(), "--out", tmp_path / "table")
    assert done.code == 0, done.err
    table = (tmp_path / "table" / "table.md").read_text()
    assert "progressive" in table
    assert "consistency-cd" in table


def worst(images):
    """A filter that blocks all."""
    return images.mean((1, 2, 3)) * 0 + 1


def test_generate_makes_the_small_images_first_and_then_the_larger_of_them(runs, tmp_path, command):
    few = "--sampler", "ddim", "--steps", 2, "--num", 3, "--then-steps", 4
    chain = runs / "first", "--then", runs / "refine", *few
    assert command(generate.main, *chain, "--out", tmp_path / "a.png").code == 0
    assert Image.open(tmp_path / "a.png").size == Image.open(tmp_path / "a-4.png").size
    assert (tmp_path / "a-4.png").stat().st_mtime <= (tmp_path / "a.png").stat().st_mtime
    assert command(generate.main, *chain, "--out", tmp_path / "many").code == 0
    assert {path.name for path in (tmp_path / "many-4").glob("*.png")} == {
        path.name for path in (tmp_path / "many").glob("*.png")
    }
    blocked = command(
        generate.main, *chain, "--out", tmp_path / "c.png", "--filter", "module:test_cascade:worst",
        "--filter-threshold", 0,
    )  # fmt: skip
    assert blocked.out.count(", 3 blocked: ") == 2  # each of its own
    alone = command(generate.main, runs / "refine", "--num", 2, "--out", tmp_path / "b.png")
    assert alone.code == 2
    assert "--then" in alone.err
    no = command(generate.main, runs / "first", "--then", runs / "first", *few[2:6])
    assert no.code == 2
    assert "--from-size" in no.err


def test_an_image_of_a_cascade_is_the_same_whatever_the_batch_and_near_its_small_one(runs):
    first, last = (Checkpoint(load_model(runs / name), name) for name in ("first", "refine"))
    made = {}
    for size in (2, 5):
        cascade = Cascade(first, first.plan(2, "ddim"), last)
        batches = cascade.batches(cascade.plan(4), 7, range(5), None, size)
        made[size] = torch.cat(list(batches))
    assert torch.equal(made[2], made[5])
    small = cascade.smaller(7, torch.arange(5), {})
    kind = last.kinds["small"]
    assert (kind.reduced(made[5]).float() - small.float()).abs().mean() < 40
    seeds = torch.tensor([7, 2**63 - 1])
    each = cascade.make(cascade.plan(4), seeds, torch.tensor([1, 1]), {})
    assert torch.equal(each[0], made[5][1]), "of a seed for each image"
    assert not torch.equal(each[0], each[1])


def test_models_of_a_cascade_share_no_noise():
    first = plan("ddim", cosine(2))

    class Recording(Checkpoint):
        def __init__(self, size, kinds):
            self.spec, self.kinds = ImageSpec("made up", 1, size), kinds
            self.device, self.name, self.method, self.sha256 = torch.device("cpu"), "", "", ""
            self.seeds = []

        def make(self, plan, seed, numbers, condition):
            self.seeds.append(seed)
            return images(len(numbers), self.spec.size)

    models = [Recording(4, {}), Recording(8, {"small": SMALL})]
    models.append(Recording(16, {"small": replace(SMALL, size=8)}))
    two = Cascade(models[0], first, models[1])
    Cascade(two, first, models[2], depth=2).make(first, 3, torch.arange(2), {})
    seeds = [seed for model in models for seed in model.seeds]
    assert len(seeds) == len({*seeds}) == 3


def test_the_kind_of_a_small_image_is_held_by_a_card():
    kinds = {"small": SMALL}
    assert condition.from_json(condition.to_json(kinds)) == kinds
    source = Reduced(InMemory(images(6)), kinds)
    assert torch.equal(source.take(torch.tensor([4])).condition["small"], SMALL.of(images(6))[4:5])
