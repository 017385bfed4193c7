"""Blind judgement by people: the page in a real browser, and what is read from its results."""

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Opened, browser
from PIL import Image

from diffusion import checkpoint
from diffusion.console import UserError
from eval import human
from eval.human import Make, Read


@pytest.fixture
def browse(tmp_path) -> Callable[..., Opened]:
    return browser(tmp_path)


@pytest.fixture
def two_sets(tmp_path) -> tuple[str, str]:
    """An .npz of dark images and a folder of bright ones."""
    random = np.random.default_rng(0)
    dark = random.integers(0, 100, (12, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "murky.npz", images=dark)
    (tmp_path / "bright").mkdir()
    for i in range(12):
        pixels = random.integers(156, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "bright" / f"{i}.png")
    return str(tmp_path / "murky.npz"), str(tmp_path / "bright")


def content_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json".*?>(.*?)</script>', page)[1])


def results_of(page: str, answers: list[str], session: str = "one") -> dict:
    content = content_of(page)
    named = {key: content[key] for key in ("format", "a", "b")}
    return named | {"session": session, "answers": answers}


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_newcombes(successes, trials, low, high):
    assert human.interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = human.interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilsons_interval_of_no_trials_is_everything():
    assert human.interval(0, 0) == (0.0, 1.0)


def test_each_is_on_the_left_as_often_and_every_image_is_shown_once():
    for seed in range(20):
        order, a_left = human.arrange(50, seed)
        assert sorted(order) == list(range(50))
        assert sum(a_left) == 25
    starts = sum(human.arrange(50, seed)[1][0] for seed in range(200))
    assert 70 < starts < 130  # five standard deviations of a fair coin


def test_a_seed_makes_the_same_page_again_and_another_seed_another(two_sets):
    pages = [human.html(Make(*two_sets, pairs=12, seed=seed)) for seed in (0, 0, 1)]
    assert pages[0] == pages[1]
    assert pages[0] != pages[2]


def test_a_judge_sees_neither_the_names_nor_the_sides(two_sets):
    page = human.html(Make(*two_sets, pairs=12))
    seen = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert [word for word in ("murky", "bright") if word in seen] == []
    assert {pair["a"] for pair in content_of(page)["pairs"]} == {"left", "right"}


JUDGE = """
function brightness(image) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [8, 8];
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  return pen.getImageData(0, 0, 8, 8).data.reduce((sum, level) => sum + level, 0);
}
const press = (key) => dispatchEvent(new KeyboardEvent("keydown", { key }));
const seen = [];
const drawn = async (image) => {
  while (!image.complete) await new Promise((done) => setTimeout(done, 5));
};
async function judge() {
  for (let i = 0; i < pairs.length; i++) {
    await drawn($("left"));
    await drawn($("right"));
    const left = brightness($("left")) > brightness($("right"));
    if (i === 3) { press("ArrowDown"); seen.push($("count").textContent); press("Backspace"); }
    press(i === 5 ? "ArrowDown" : left ? "ArrowLeft" : "ArrowRight");
  }
  press("ArrowLeft");
  const kept = JSON.parse(localStorage.getItem(page));
  const out = document.createElement("pre");
  out.id = "check";
  const done = !$("done").hidden;
  out.textContent = JSON.stringify({ results: { ...results, ...session }, kept, seen, done });
  document.body.append(out);
}
judge();
"""


def test_a_judge_who_always_prefers_the_bright_ones_is_read_back_as_such(
    two_sets, browse, tmp_path, command
):
    path = tmp_path / "human.html"
    dark, bright = two_sets
    assert command(human.main, "make", bright, dark, "--pairs", 12, "--out", path).code == 0
    opened = browse(path, JUDGE)
    assert opened.console == []
    check = json.loads(html.unescape(re.search(r'<pre id="check">(.*?)</pre>', opened.dom)[1]))
    assert check["done"]
    assert check["seen"] == ["5 of 12"]
    assert check["kept"]["answers"] == check["results"]["answers"]
    (tmp_path / "results.json").write_text(json.dumps(check["results"]))
    tally = human.tally(tmp_path / "results.json")
    assert (tally.first, tally.second) == (bright, dark)
    assert (tally.wins, tally.losses, tally.neither) == (11, 0, 1)


PRESS = """
const press = (key) => dispatchEvent(new KeyboardEvent("keydown", { key }));
["ArrowLeft", "ArrowRight", "ArrowDown"].forEach(press);
const again = document.createElement("iframe");
again.srcdoc = PAGE;
document.body.append(again);
"""
SHOW = """
const side = (who, i) => ((pairs[i].a === "left") === (who === "a") ? "left" : "right");
const sides = session.answers.map((who, i) => (who === "neither" ? who : side(who, i)));
parent.document.title = $("count").textContent + " " + sides;
"""


def test_a_page_that_is_opened_again_goes_on_where_the_judge_left_it(two_sets, browse, tmp_path):
    path = tmp_path / "human.html"
    page = human.html(Make(*two_sets, pairs=12))
    path.write_text(page)
    # opened again in a frame, for which the outer page's loading waits: a browser writes its
    # storage to disk when it likes, and dumps a page without waiting for one that replaces it
    again = page.replace("</body>", f"<script>{SHOW}</script></body>")
    opened = browse(path, PRESS.replace("PAGE", json.dumps(again).replace("</", "<\\/")))
    assert opened.console == []
    assert "<title>4 of 12 left,right,neither</title>" in opened.dom


def test_files_are_reported_one_by_one_and_together(two_sets, tmp_path, command):
    page = human.html(Make(*two_sets, pairs=12))
    judged = {"one": ["a"] * 9 + ["b"] * 3, "two": ["b"] * 3 + ["neither"]}
    for name, answers in judged.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(results_of(page, answers, name)))
    outcome = command(human.main, "read", tmp_path / "one.json", tmp_path / "two.json")
    assert outcome.code == 0
    low, high = human.interval(9, 15)
    for words in ("75.0%", "0.0%", "60.0%", "9 of 15", f"{low:.1%} to {high:.1%}"):
        assert words in outcome.out


@pytest.mark.parametrize("real_first", [True, False])
def test_against_real_images_the_rate_is_that_of_generated_ones_taken_for_real(
    two_sets, tmp_path, real_first
):
    pair = ("real:digits", two_sets[0]) if real_first else (two_sets[0], "real:digits")
    page = human.html(Make(*pair, pairs=12))
    assert f"<h1>{human.QUESTIONS[True]}</h1>" in page
    fooled = ["b" if real_first else "a"] * 12
    (tmp_path / "r.json").write_text(json.dumps(results_of(page, fooled[:7])))
    tally = human.tally(tmp_path / "r.json")
    assert (tally.first, tally.second) == (two_sets[0], "real:digits")
    assert (tally.wins, tally.losses) == (7, 0)


def test_a_checkpoint_shows_the_images_that_generate_makes(student):
    options = Make(f"{student}@4", "real:digits", pairs=3, seed=5)
    made = human.images_of(options.a, options, None)
    assert torch.equal(made, human.images_of(str(student), options, None))
    assert made.shape == (3, 1, 8, 8)


@pytest.mark.parametrize(("background", "level"), [(None, 0), ("white", 255)])
def test_real_images_lie_on_the_checkpoints_background(tmp_path, teacher, background, level):
    weights, card, _ = checkpoint.load(teacher)
    black = replace(card, data=card.data | {"background": "black"})
    checkpoint.save(tmp_path / "model.safetensors", weights, black)
    (tmp_path / "photos").mkdir()
    for alpha in (0, 255):
        Image.new("LA", (8, 8), (128, alpha)).save(tmp_path / "photos" / f"{alpha}.png")
    real, made = f"real:{tmp_path / 'photos'}", str(tmp_path / "model.safetensors")
    for a, b in ((real, made), (made, real)):
        options = Make(a, b, pairs=2, background=background)
        images = human.images_of(real, options, (1, 8, 8))
        assert sorted(images[:, 0, 0, 0].tolist()) == sorted([level, 128])


def spoilt(page: str) -> dict[str, str]:
    whole = results_of(page, ["a"])
    return {
        "no JSON": "{",
        "a list": "[]",
        "another format": json.dumps(whole | {"format": "x"}),
        "an unknown answer": json.dumps(whole | {"answers": ["up"]}),
        "no list of answers": json.dumps(whole | {"answers": "ab"}),
        "no answers": json.dumps({k: v for k, v in whole.items() if k != "answers"}),
    }


def test_a_spoilt_results_file_is_one_line_and_exit_code_2(two_sets, tmp_path, command):
    page = human.html(Make(*two_sets, pairs=12))
    for name, text in spoilt(page).items():
        (tmp_path / "bad.json").write_text(text)
        outcome = command(human.main, "read", tmp_path / "bad.json")
        assert (name, outcome.code, outcome.err.count("\n")) == (name, 2, 1)
        assert "bad.json" in outcome.err
    assert command(human.main, "read", tmp_path / "missing.json").code == 2


def test_one_session_is_not_counted_twice(two_sets, tmp_path):
    page = human.html(Make(*two_sets, pairs=12))
    files = (tmp_path / "a.json", tmp_path / "b.json")
    for path in files:
        path.write_text(json.dumps(results_of(page, ["a"])))
    with pytest.raises(UserError, match="one session"):
        human.read(Read(files))


def test_a_mistake_in_making_is_one_line_and_leaves_no_page(two_sets, tmp_path, command):
    dark, bright = two_sets
    np.savez(tmp_path / "float.npz", images=np.zeros((12, 8, 8, 1)))
    np.savez(tmp_path / "large.npz", images=np.zeros((12, 9, 9, 1), np.uint8))
    (tmp_path / "cut.npz").write_bytes(Path(dark).read_bytes()[:-50])
    mistakes = {
        f"{dark} {bright} --pairs 13": "--pairs 13",
        f"{dark} {bright} --pairs 0": "--pairs",
        f"{dark} real:no-such": "no-such",
        f"{dark} missing": "missing",
        f"{dark} {tmp_path}/float.npz": "float64",
        f"{dark} {tmp_path}/large.npz": "(9, 9)",
        f"{dark} {tmp_path}/cut.npz": "cut.npz",
    }
    for arguments, word in mistakes.items():
        pairs = [] if "--pairs" in arguments else ["--pairs", 12]
        out = tmp_path / "out.html"
        outcome = command(human.main, "make", *arguments.split(), *pairs, "--out", out)
        assert (arguments, outcome.code, outcome.err.count("\n")) == (arguments, 2, 1)
        assert word in outcome.err
        assert not out.exists()
