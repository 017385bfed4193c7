"""The two web pages, opened in a real browser, and the figures that they show."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.checkpoint import save_tensors
from diffusion.console import UserError
from eval import human, records, report, table
from eval.human import Make, Read
from eval.pages import chart, provenance
from eval.records import Record

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OFF = ("gpu", "quic", "sync", "background-networking", "component-update", "dev-shm-usage")
FLAGS = [f"--disable-{name}" for name in OFF]
FLAGS += ["--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"]
FLAGS += ["--dump-dom", "--virtual-time-budget=5000"]


class Opened(NamedTuple):
    dom: str
    console: list[str]


@pytest.fixture
def browse(tmp_path) -> Callable[..., Opened]:
    """Open a page, run a script at its end: (path, script, hash) -> the DOM then, and the console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")

    def open_page(path: Path, script: str = "", address: str = "") -> Opened:
        copy = tmp_path / "copy.html"
        copy.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"file://{copy}"]
        command[-1] += address
        home = os.environ | {"HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=home)
        return Opened(done.stdout, [x for x in done.stderr.splitlines() if ":CONSOLE" in x])

    return open_page


def record(method="teacher", nfe=8, score=4.0, seconds=0.1, **changes) -> Record:
    """A made-up row: a teacher's own, unless it is given a parent or own=False."""
    settings = {
        "run": f"runs/{method}/{nfe}", "method": method, "sha256": f"{method}-{nfe}".ljust(64, "0"),
        "parent": None, "sampler": "ddim", "steps": nfe, "own": True, "nfe": nfe,
        "angles": [1.5 * i / nfe for i in range(nfe + 1)],
        "metric": "fd-cnn-digits-0123abcd", "extractor": {"sha256": "0123abcd" * 8, "accuracy": 0.98},
        "num_images": 100, "seeds": [0, 1], "quality": [0.9 * score, 1.1 * score],
        "floor": [1.0, 3.0], "batch_size": 50, "batch_seconds": [10 * seconds] * 3,
        "single_seconds": [seconds, seconds, 2 * seconds], "parameters": 300_000,
        "environment": {"device": "a device", "precision": "fp32", "torch": "2.6", "threads": 1},
    }  # fmt: skip
    return Record(**settings | changes)


TEACHER = record("teacher", 1000, 4.0, 8.0)
SOLVER = record("teacher", 4, 6.0, 0.04, own=False, sampler="heun", sha256=TEACHER.sha256)
ROWS = [
    TEACHER,
    SOLVER,
    record("progressive", 4, 4.4, 0.04, parent=TEACHER.sha256),
    record("progressive", 1, 30.0, 0.01, parent=record("progressive", 4).sha256),
    record("consistency <b>&amp;", 2, 7.0, 0.02, parent=TEACHER.sha256),
]


def write_report(folder: Path, rows: list[Record], size: int = 8) -> Path:
    records.write(folder / "results.jsonl", rows)
    random = torch.Generator().manual_seed(0)
    images = {r.tag: torch.randint(256, (16, 1, size, size), generator=random).byte() for r in rows}
    save_tensors(folder / "samples.safetensors", images, {})
    return report.write(folder)


def body_rows(dom: str) -> list[list[str]]:
    """The text of each cell of the main table."""
    body = re.search(r'<table id="rows">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    lines = body.split("<tr")[1:]
    cells = [re.findall(r"<t[hd][ >].*?</t[hd]>", line, re.DOTALL) for line in lines]
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in line] for line in cells]


def test_the_console_is_seen_where_a_page_errs(browse, tmp_path):
    (tmp_path / "bad.html").write_text("<!doctype html><body></body>")
    assert any(
        "no such" in line for line in browse(tmp_path / "bad.html", "throw 'no such'").console
    )


def test_the_report_opens_without_a_word_on_the_console_and_sorts_by_its_address(browse, tmp_path):
    path = write_report(tmp_path, ROWS)
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/\S+", "", path.read_text())
    opened = browse(path, address="#sort=3")
    assert opened.console == []
    expected = [[*cells] for cells in table.cells(sorted(ROWS, key=lambda r: r.score))]
    shown = [[cell.removesuffix("ship") for cell in row] for row in body_rows(opened.dom)]
    assert shown == expected


def test_a_click_sorts_numbers_by_size_and_a_second_click_turns_the_order(browse, tmp_path):
    path = write_report(tmp_path, ROWS)
    click = "document.querySelectorAll('#rows thead button')[2].click();"
    show = "document.title = [...table.tBodies[0].rows].map((r) => r.cells[2].textContent).join();"
    more = f"document.title = ''; {click} {show} const up = document.title; {click} {show}"
    opened = browse(path, f"{more} document.title = up + ' ' + document.title;")
    assert opened.console == []
    assert "<title>1,2,4,4,1000 1000,4,4,2,1</title>" in opened.dom


def test_the_report_has_every_row_of_the_records_with_the_tables_cells(tmp_path):
    page = write_report(tmp_path, ROWS).read_text()
    shown = [[cell.removesuffix("ship") for cell in row] for row in body_rows(page)]
    assert shown == [list(cells) for cells in table.cells(ROWS)]
    assert [r for r in ROWS if f'data-tag="{r.tag}"' not in page] == []
    assert page.count('<div class="strip"') == len(ROWS) + 2  # and the nearest training images
    assert "consistency <b>" not in page


def test_a_report_names_what_its_numbers_were_made_of(tmp_path):
    page = write_report(tmp_path, ROWS).read_text()
    first = ROWS[0]
    words = [first.metric, first.extractor["sha256"], "98.00%", "a device", "fp32", "torch 2.6"]
    words += [html.escape(r.sha256) for r in ROWS]
    assert [word for word in words if word not in page] == []
    known = {r.sha256: r for r in ROWS}
    chain = [re.sub(r"<.*?>", "", provenance.parents(r, known)) for r in ROWS]
    assert chain[0] == chain[1] == "none"
    assert chain[2] == "teacher teacher-"
    assert chain[3] == "progressive progress ← teacher teacher-"
    orphan = record("orphan", parent="f" * 64)
    assert "not measured" in provenance.parents(orphan, known)


def test_the_student_to_ship_is_the_cheapest_within_the_nearest_limit_that_any_keeps():
    def student(nfe: int, ratio: float) -> Record:
        return record("student", nfe, 4.0 * ratio, parent=TEACHER.sha256)

    one, two, four, eight = student(1, 5.0), student(2, 1.9), student(4, 1.1), student(8, 0.9)
    assert report.choice([TEACHER, one, two, four, eight]) is four
    assert report.choice([TEACHER, one, two]) is two
    assert report.choice([TEACHER, one, student(2, 3.0)]).nfe == 2
    assert report.choice([TEACHER, SOLVER]) is None
    text = report.verdict([TEACHER, one, two, four, eight])
    assert "Ship <b>student at 4 calls</b>: the cheapest student within 1.2×" in text
    assert "If 2× will do: <b>student at 2 calls</b>" in text
    assert "none is within 1.2×" in report.verdict([TEACHER, one, two])
    assert "though no student is within 2×" in report.verdict([TEACHER, one])
    assert "not among these rows" in report.verdict([four])


def test_a_student_with_a_warning_does_not_ship_while_another_is_sound(tmp_path):
    collapsed = record(
        "narrow", 1, 4.0, parent=TEACHER.sha256,
        others={"coverage": [0.1, 0.1]}, held_out={"coverage": 0.9},
    )  # fmt: skip
    assert report.choice([*ROWS, collapsed]) is ROWS[2]
    assert report.choice([TEACHER, collapsed]) is collapsed
    page = write_report(tmp_path, [*ROWS, collapsed]).read_text()
    assert "Further figures" in page
    assert "narrow (collapsed)" in page
    assert "Further figures" not in write_report(tmp_path, ROWS).read_text()


def test_the_pareto_front_holds_just_the_points_that_none_dominates():
    random = np.random.default_rng(0)
    points = [tuple(map(float, p)) for p in random.integers(1, 60, (400, 2))]
    points = [p for p in points if p[0] * p[1] > 150]
    undominated = {
        p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
    }
    found = chart.front(points)
    assert len(found) > 3
    assert {*found} == undominated
    assert found == sorted(found)


def test_equal_distances_on_a_log_axis_are_equal_ratios():
    axis = chart.Axis.over([2.0, 50.0], 0, 100)
    assert axis(20) - axis(10) == pytest.approx(axis(8) - axis(4), abs=0.02)
    assert axis(2) > 0
    assert axis(50) < 100
    assert len(chart.Axis.over([7.0], 0, 100).ticks) > 0


@pytest.mark.parametrize("score", [0.0, -1e-9])
def test_a_report_can_be_drawn_of_a_score_that_has_no_logarithm(tmp_path, score):
    broken = record("broken", 2, parent=TEACHER.sha256, quality=[score, score])
    page = write_report(tmp_path, [*ROWS, broken]).read_text()
    assert not re.search(r'd="[^"]*(nan|inf)', page)


def test_only_the_last_setting_and_the_latest_of_a_run_are_compared():
    old = replace(ROWS[2], sha256="e" * 64)
    other = replace(TEACHER, num_images=200)
    assert report.comparable([old, other, *ROWS]) == ROWS


def test_a_report_does_without_samples_and_without_the_training_images(tmp_path):
    rows = [replace(r, metric="fid") for r in ROWS]
    page = write_report(tmp_path, rows, size=4).read_text()
    assert "The same noise" in page
    assert "Nearest training images" not in page
    (tmp_path / "samples.safetensors").unlink()
    assert "The same noise" not in report.write(tmp_path).read_text()


def test_a_report_of_nothing_is_a_users_mistake(command, tmp_path):
    outcome = command(report.main, tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "results.jsonl" in outcome.err


# --- judgement by people


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
    return {key: content[key] for key in ("format", "sealed")} | {
        "session": session,
        "answers": answers,
    }


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
    assert human.wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = human.wilson(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilsons_interval_of_no_trials_is_everything():
    assert human.wilson(0, 0) == (0.0, 1.0)


def test_each_is_on_the_left_as_often_and_every_image_is_shown_once():
    for seed in range(20):
        order, a_left = human.arrange(50, seed)
        assert sorted(order) == list(range(50))
        assert sum(a_left) == 25
    starts = sum(human.arrange(50, seed)[1][0] for seed in range(200))
    assert 70 < starts < 130  # five standard deviations of a fair coin


def test_a_seed_makes_the_same_page_again_and_another_seed_another(two_sets):
    pages = [human.page(Make(*two_sets, pairs=12, seed=seed)) for seed in (0, 0, 1)]
    assert pages[0] == pages[1]
    assert pages[0] != pages[2]


def test_the_page_names_neither_the_two_nor_their_sides(two_sets):
    page = human.page(Make(*two_sets, pairs=12))
    assert [word for word in ("murky", "bright", "a_left", "true", "false") if word in page] == []


def test_what_is_sealed_comes_back_and_a_changed_letter_is_noticed():
    secret = {"a": "x", "a_left": [True, False]}
    sealed = human.seal(secret)
    assert human.unseal(sealed) == secret
    for i in range(len(sealed) - 4):
        other = "A" if sealed[i] != "A" else "B"
        with pytest.raises(ValueError):
            human.unseal(sealed[:i] + other + sealed[i + 1 :])


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
  for (let i = 0; i < total; i++) {
    await drawn($("left"));
    await drawn($("right"));
    const left = brightness($("left")) > brightness($("right"));
    if (i === 3) { press("ArrowDown"); seen.push($("count").textContent); press("Backspace"); }
    press(i === 5 ? "ArrowDown" : left ? "ArrowLeft" : "ArrowRight");
  }
  press("ArrowLeft");
  const kept = JSON.parse(localStorage.getItem(place));
  const out = document.createElement("pre");
  out.id = "check";
  out.textContent = JSON.stringify({ results: results(), kept, seen, done: !$("done").hidden });
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
    assert len(check["results"]["milliseconds"]) == 12
    (tmp_path / "results.json").write_text(json.dumps(check["results"]))
    found = human.tally(tmp_path / "results.json")
    assert (found.first, found.second) == (bright, dark)
    assert (found.wins, found.losses, found.neither) == (11, 0, 1)


def test_a_page_that_is_opened_again_goes_on_where_the_judge_left_it(two_sets, browse, tmp_path):
    path = tmp_path / "human.html"
    path.write_text(human.page(Make(*two_sets, pairs=12)))
    keys = "['ArrowLeft', 'ArrowRight', 'ArrowDown'].forEach((key) => press(key));"
    press = "const press = (key) => dispatchEvent(new KeyboardEvent('keydown', { key }));"
    show = "document.title = $('count').textContent + ' ' + session.answers;"
    browse(path, press + keys)
    opened = browse(path, show)
    assert opened.console == []
    assert "<title>4 of 12 left,right,neither</title>" in opened.dom


def test_files_are_reported_one_by_one_and_together(two_sets, tmp_path, command):
    page = human.page(Make(*two_sets, pairs=12))
    a_left = human.unseal(content_of(page)["sealed"])["a_left"]
    for_a = ["left" if left else "right" for left in a_left]
    for_b = ["right" if left else "left" for left in a_left]
    judged = {"one": for_a[:9] + for_b[9:], "two": [*for_b[:3], "neither"]}
    for name, answers in judged.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(results_of(page, answers, name)))
    outcome = command(human.main, "read", tmp_path / "one.json", tmp_path / "two.json")
    assert outcome.code == 0
    low, high = human.wilson(9, 15)
    for words in ("75.0%", "0.0%", "60.0%", "9 of 15", f"{low:.1%} to {high:.1%}"):
        assert words in outcome.out


@pytest.mark.parametrize("real_first", [True, False])
def test_against_real_images_the_rate_is_that_of_generated_ones_taken_for_real(
    two_sets, tmp_path, real_first
):
    pair = ("real:digits", two_sets[0]) if real_first else (two_sets[0], "real:digits")
    page = human.page(Make(*pair, pairs=12))
    assert content_of(page)["question"] == human.QUESTIONS[True]
    sides = human.unseal(content_of(page)["sealed"])["a_left"]
    real_left = sides if real_first else [not left for left in sides]
    fooled = ["right" if left else "left" for left in real_left]
    (tmp_path / "r.json").write_text(json.dumps(results_of(page, fooled[:7])))
    found = human.tally(tmp_path / "r.json")
    assert (found.first, found.second) == (two_sets[0], "real:digits")
    assert (found.wins, found.losses) == (7, 0)


def test_a_checkpoint_shows_the_images_that_generate_makes(student):
    options = Make(f"{student}@4", "real:digits", pairs=3, seed=5)
    made = human.images_of(options.a, options, None)
    assert torch.equal(made, human.images_of(str(student), options, None))
    assert made.shape == (3, 1, 8, 8)


def spoilt(page: str) -> dict[str, str]:
    whole = results_of(page, ["left"])
    return {
        "no JSON": "{",
        "a list": "[]",
        "another format": json.dumps(whole | {"format": "x"}),
        "another seal": json.dumps(whole | {"sealed": whole["sealed"][:-8] + "AAAAAAAA"}),
        "an unknown answer": json.dumps(whole | {"answers": ["up"]}),
        "too many answers": json.dumps(whole | {"answers": ["left"] * 13}),
        "no answers": json.dumps({k: v for k, v in whole.items() if k != "answers"}),
    }


def test_a_spoilt_results_file_is_one_line_and_exit_code_2(two_sets, tmp_path, command):
    page = human.page(Make(*two_sets, pairs=12))
    for name, text in spoilt(page).items():
        (tmp_path / "bad.json").write_text(text)
        outcome = command(human.main, "read", tmp_path / "bad.json")
        assert (name, outcome.code, outcome.err.count("\n")) == (name, 2, 1)
        assert "bad.json" in outcome.err
    assert command(human.main, "read", tmp_path / "missing.json").code == 2


def test_one_session_is_not_counted_twice(two_sets, tmp_path):
    page = human.page(Make(*two_sets, pairs=12))
    files = (tmp_path / "a.json", tmp_path / "b.json")
    for path in files:
        path.write_text(json.dumps(results_of(page, ["left"])))
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
