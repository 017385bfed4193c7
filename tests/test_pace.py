"""A budget in minutes, and a word before a long training."""

from dataclasses import replace

import pytest

from diffusion import pace
from diffusion.checkpoint import load
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.pace import with_warning
from diffusion.runs import settings_before
from diffusion.training import Progress
from distill import cd, progressive
from teachers import ddpm
from teachers.presets import folder_preset, preset


@pytest.fixture
def brief(tiny, quick, tmp_path) -> ddpm.Options:
    """A teacher of about two seconds."""
    fit = replace(quick, minutes=0.05, warmup=100)
    return replace(ddpm.Options.default(), net=tiny, fit=fit, out=tmp_path / "teacher")


def test_minutes_fix_the_iterations_and_the_same_number_makes_the_same_weights(brief, tmp_path):
    model = ddpm.train_teacher(brief)
    settings = model.card.training["settings"]
    assert settings["minutes"] == 0.05
    assert settings["warmup"] == min(100, settings["iterations"] // 10)
    fit = replace(
        brief.fit, minutes=None, iterations=settings["iterations"], warmup=settings["warmup"]
    )
    same = ddpm.train_teacher(replace(brief, fit=fit, out=tmp_path / "same"))
    assert same.sha256 == model.sha256


def test_a_run_by_minutes_keeps_its_iterations_when_it_resumes(brief, monkeypatch, stop_at_save):
    with monkeypatch.context() as patch:
        patch.setattr(pace, "_seconds_per_iteration", lambda *_: 1e-3)
        short = replace(brief, fit=replace(brief.fit, minutes=0.002))
        stop_at_save(lambda: ddpm.train_teacher(short))
    fixed = settings_before(brief.out)["iterations"]
    monkeypatch.setattr(pace, "_seconds_per_iteration", lambda *_: pytest.fail("measured again"))
    same = replace(brief, fit=replace(brief.fit, minutes=0.002))
    assert ddpm.train_teacher(same).card.training["iterations"] == fixed
    with pytest.raises(UserError, match=r"minutes was 0\.002, now 0\.05"):
        ddpm.train_teacher(brief)


def test_a_trial_leaves_the_student_its_followers_and_its_target_alone(
    tmp_path, teacher, quick, monkeypatch
):
    def student(name: str, **fit) -> str:
        loss, out = cd.Loss(num_angles=4), tmp_path / name
        options = cd.Options(teacher=teacher, out=out, loss=loss, fit=replace(quick, **fit))
        return cd.distill(options).sha256

    settings = load(teacher)[1].training["settings"]
    assert settings["minutes"] is None
    by_minutes = student("minutes", minutes=0.03)
    card = load(tmp_path / "minutes")[1]
    numbers = {name: card.training["settings"][name] for name in ("iterations", "warmup")}
    assert student("iterations", **numbers) == by_minutes


def test_rounds_share_the_minutes_by_what_their_iterations_cost(quick):
    options = progressive.Options(start_steps=64, fit=replace(quick, minutes=10.0))
    fits = progressive.round_fits(options, [8, 4, 2, 1], {8: 1.0, 4: 1.0, 2: 1.0, 1: 2.0})
    minutes = [fit.minutes for fit in fits]
    assert sum(minutes) == pytest.approx(10)
    # an iteration is 3 + 8 passes in the first round, 3 + 2 in the others
    assert minutes == pytest.approx([10 * n / 31 for n in (11, 5, 5, 10)])
    with pytest.raises(UserError, match="leave --minutes out"):
        progressive.round_fits(replace(options, round_iterations=(1, 1, 1, 1)), [8, 4, 2, 1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "1", "--iterations", "5"], "in place of --iterations"),
        (["--minutes", "0"], "--minutes must be above 0, at most 1e6, got 0"),
        (["--minutes", "nan"], "--minutes must be above 0, at most 1e6, got nan"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(command, tmp_path, arguments, words):
    outcome = command(ddpm.main, "--out", tmp_path / "teacher", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert not (tmp_path / "teacher").exists()


def lines(images_per_second: float):
    yield Progress(1, 100_001, 1.0, 1.0, 1e-3, images_per_second, 1.0)
    yield Progress(2, 100_001, 1.0, 1.0, 1e-3, images_per_second, 2.0)


def test_a_training_of_hours_says_so_first_and_what_would_be_faster(capsys):
    config = FitConfig(batch_size=256)
    list(with_warning(lines(116.0), config, lambda: "--width 32 is 8 times as fast"))
    assert capsys.readouterr().out == (
        "at 116 images/s this takes 61 hours; --minutes 60 fits an hour; "
        "--width 32 is 8 times as fast\n"
    )
    list(with_warning(lines(10_000.0), config, lambda: pytest.fail("asked for nothing")))
    list(with_warning(lines(116.0), replace(config, minutes=90.0), None))
    assert not capsys.readouterr().out


def test_the_advice_names_a_network_that_is_faster_by_a_measurement():
    net = replace(preset("fashion-mnist").net, width=64)
    words = ddpm.faster(net, FitConfig(precision="fp32"))
    assert words.startswith("--width 32 --multipliers 1 2 --blocks 1 --patch 2 --attention is ")
    assert float(words.split()[-4]) >= 2


@pytest.mark.parametrize("size", [8, 12, 20, 28, 32, 33, 48, 64, 96, 100, 128])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_folders_preset_fits_every_size(size, gpu):
    chosen = folder_preset(size, 3, gpu)
    replace(chosen.net, width=8).build(3, {})
    for net in (chosen.net, chosen.net.smaller()):
        net.check()
        assert not ddpm.grain(net, "v")
    levels = [size // chosen.net.patch >> n for n in range(len(chosen.net.multipliers))]
    assert set(chosen.net.attention) <= set(levels)
    assert chosen.teacher.minutes
