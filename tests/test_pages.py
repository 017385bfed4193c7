"""The report, opened in a real browser, and the figures that it shows."""

import html
import json
import re
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Opened, browser
from made_up import record, sure
from PIL import Image

from diffusion import data, named_data
from diffusion.console import UserError
from diffusion.files import save_tensors
from diffusion.image_file import Form
from eval import report
from eval.measure.real import fingerprint
from eval.report import Options
from eval.results import jsonl
from eval.results.records import Record
from eval.show import pictures, provenance, table, verdict
from eval.show.lines import comparison, lines


@pytest.fixture
def browse(tmp_path) -> Callable[..., Opened]:
    return browser(tmp_path)


TEACHER = record("teacher", 1000, 4.0, 8.0)
SOLVER = record("teacher", 4, 6.0, 0.04, own_plan=False, sampler="heun", sha256=TEACHER.sha256)
ROWS = [
    TEACHER,
    SOLVER,
    record("progressive", 4, 4.4, 0.04, parent=TEACHER.sha256),
    record("progressive", 1, 30.0, 0.01, parent=record("progressive", 4).sha256),
    record("consistency <b>&amp;", 2, 7.0, 0.02, parent=TEACHER.sha256),
]


def write_report(folder: Path, rows: list[Record], size: int = 8) -> Path:
    jsonl.write(folder / "results.jsonl", rows)
    random = torch.Generator().manual_seed(0)
    images = {r.tag: torch.randint(256, (16, 1, size, size), generator=random).byte() for r in rows}
    save_tensors(folder / "samples.safetensors", images, {})
    return report.write(Options((folder,)))


def cells_of(dom: str, name: str = "quality", part: str = "tbody") -> list[list[str]]:
    """The text of each cell of a sortable table."""
    pattern = f'<table id="{name}".*?<{part}>(.*?)</{part}>'
    body = re.search(pattern, dom, re.DOTALL)[1].split("<tr")[1:]
    cells = [re.findall(r"<t[hd][ >].*?</t[hd]>", line, re.DOTALL) for line in body]
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in line] for line in cells]


def without_pill(rows: list[list[str]]) -> list[list[str]]:
    return [[cell.removesuffix("take") for cell in row] for row in rows]


def test_the_console_is_seen_where_a_page_errs(browse, tmp_path):
    (tmp_path / "bad.html").write_text("<!doctype html><body></body>")
    assert any(
        "no such" in line for line in browse(tmp_path / "bad.html", "throw 'no such'").console
    )


def test_the_report_opens_without_a_word_on_the_console(browse, tmp_path):
    path = write_report(tmp_path, ROWS)
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/\S+", "", path.read_text())
    opened = browse(path)
    assert opened.console == []
    quality, speed = table.tables(comparison(ROWS))[:2]
    assert without_pill(cells_of(opened.dom)) == [[*row] for row in quality.cells]
    assert without_pill(cells_of(opened.dom, "speed")) == [[*row] for row in speed.cells]


def test_a_click_sorts_numbers_by_size_and_a_second_click_turns_the_order(browse, tmp_path):
    path = write_report(tmp_path, ROWS)
    rows = "[...document.querySelector('#quality').tBodies[0].rows]"
    click = "document.querySelectorAll('#quality thead button')[2].click();"
    show = f"document.title = {rows}.map((r) => r.cells[2].textContent).join();"
    more = f"document.title = ''; {click} {show} const up = document.title; {click} {show}"
    opened = browse(path, f"{more} document.title = up + ' ' + document.title;")
    assert opened.console == []
    assert "<title>1,2,4,4,1000 1000,4,4,2,1</title>" in opened.dom


SORT = """
const sorted = {};
for (const table of document.querySelectorAll(".sortable")) {
  for (const [column, button] of [...table.tHead.querySelectorAll("button")].entries()) {
    for (const order of ["rising", "falling"]) {
      button.click();
      sorted[`${table.id} ${column} ${order}`] = [...table.tBodies[0].rows].map((row) =>
        [...row.cells].map((cell) => cell.dataset.value));
    }
  }
}
const out = document.createElement("pre");
out.id = "check";
out.textContent = JSON.stringify(sorted);
document.body.append(out);
"""


def test_every_table_sorts_by_every_column_and_what_is_missing_stays_last(browse, tmp_path):
    held_out = {"held_out": {"kid": 0.5}}
    rows = [replace(row, others={"kid": [row.score / 1e6] * 2}, **held_out) for row in ROWS]
    rows[3] = replace(rows[3], others={}, timings=[])
    path = write_report(tmp_path, rows)
    tables = {made.name: made for made in table.tables(comparison(rows))}
    assert [*tables] == ["quality", "speed", "training", "further"]
    opened = browse(path, SORT)
    assert opened.console == []
    sorted_rows = json.loads(
        html.unescape(re.search(r'<pre id="check">(.*?)</pre>', opened.dom)[1])
    )
    assert len(sorted_rows) == 2 * sum(len(made.heads) for made in tables.values())
    for name, listed in sorted_rows.items():
        table_name, column, order = name.split()
        values = [row[int(column)] for row in listed]
        some = [value for value in values if value != ""]
        assert values == some + [""] * (len(values) - len(some))
        if int(column):
            some = [float(value) for value in some]
        key = None if int(column) else str.casefold
        assert some == sorted(some, key=key, reverse=order == "falling")
        given = [[str("" if c.value is None else c.value) for c in cells]
                 for cells in tables[table_name].rows]  # fmt: skip
        assert sorted(listed) == sorted(given)
    assert cells_of(opened.dom, "further", "tfoot") == [["held-out images", "", "0.5"]]


def test_the_report_has_every_row_of_the_records_with_the_tables_cells(tmp_path):
    rows = [replace(row, others={"kid": [0.1, 0.2]}, held_out={"kid": 0.05}) for row in ROWS]
    rows[0] = replace(rows[0], likelihood={"probability-flow": 3.25})
    page = write_report(tmp_path, rows).read_text()
    expected = table.tables(comparison(rows))
    assert [each.title for each in expected] == [
        "Quality and cost", "Speed", "Training", "Likelihood", "Further figures",
    ]  # fmt: skip
    for each in expected:
        name = each.title.split()[0].lower()
        listed = without_pill(cells_of(page, name))
        listed += cells_of(page, name, "tfoot") if each.foot else []
        assert listed == [list(cells) for cells in each.cells]
        assert each.caption in html.unescape(page)
    assert [r for r in rows if f'data-tag="{r.tag}"' not in page] == []
    labels = alternatives(page)[2]
    assert [r for r in rows if f"{r.title}, {r.nfe:,} call" not in labels] == []
    assert "consistency <b>" not in page


def alternatives(page: str) -> list[str]:
    """The words for those who do not see it, of each picture in turn."""
    return [html.unescape(words) for words in re.findall(r'<img [^>]*alt="([^"]*)"', page)]


def test_every_picture_has_words_for_those_who_do_not_see_it(tmp_path):
    charts, by_time, samples, nearest = alternatives(write_report(tmp_path, ROWS).read_text())
    assert charts.startswith(f"{TEACHER.metric} against network calls")
    assert "teacher, heun" in charts
    assert "against ms per image" in by_time
    assert "progressive, 4 calls, 4.4" in samples
    assert "the training image nearest to it" in nearest


@pytest.mark.parametrize("form", ["png", "svg"])
def test_a_picture_is_the_same_file_every_time(form):
    costs = [lambda line: line.record.nfe] * 2
    one, two = (pictures.cost_chart(lines(ROWS), cost, "calls").file(form) for cost in costs)
    assert one == two


def test_a_report_names_what_its_numbers_were_made_of(tmp_path):
    page = write_report(tmp_path, ROWS).read_text()
    first = ROWS[0]
    words = [first.metric, first.extractor["sha256"], "98.00%", "a device", "fp32", "torch 2.6"]
    words += ["1,438 of digits", first.data["sha256"], "2025-01-02 03:04 UTC", "clock mhz 1234"]
    words += ["4,321 iterations", "276,544 images", "99 seconds", "×3 @1, ×3 @50"]
    words += [html.escape(r.sha256) for r in ROWS]
    assert [word for word in words if word not in page] == []
    known = {r.sha256: r for r in ROWS}
    chain = [provenance.parents(r, known) for r in ROWS]
    assert chain[0] == chain[1] == "none"
    assert chain[2] == f"teacher {TEACHER.sha256[:8]}"
    assert chain[3] == f"progressive {ROWS[2].sha256[:8]} ← teacher {TEACHER.sha256[:8]}"
    orphan = record("orphan", parent="f" * 64)
    assert "not measured" in provenance.parents(orphan, known)


def test_a_report_without_times_shows_none(tmp_path):
    untimed = [replace(row, timings=[]) for row in ROWS]
    asked = (write_report(tmp_path, ROWS), report.write(Options((tmp_path,), times=False)))
    pages = [asked[1].read_text(), write_report(tmp_path, untimed).read_text()]
    for page in pages:
        assert page.count('class="chart"') == 1
        words = ("speed-up", 'id="speed"', "ms per image", "synchronised")
        assert [word for word in words if word in page.split("</style>")[1]] == []
        assert "250× fewer calls" in page
    assert cells_of(pages[0]) == cells_of(pages[1])


def points_of(picture: pictures.Picture) -> dict[str, list[tuple[float, float]]]:
    """The (cost, score) pairs of a chart's points, by title."""
    drawn = picture.figure.axes[0].containers
    return {each.get_label(): [tuple(p) for p in each.lines[0].get_xydata()] for each in drawn}


def test_rows_without_times_are_in_the_chart_of_calls_alone():
    rows = lines([*ROWS[:3], replace(ROWS[3], timings=[])])
    charts = [
        pictures.cost_chart(rows, cost, "cost")
        for cost in (lambda line: line.record.nfe, lambda line: line.milliseconds)
    ]
    assert [sum(map(len, points_of(made).values())) for made in charts] == [4, 3]
    assert points_of(charts[0])["progressive"] == [(1, 30.0), (4, 4.4)]
    assert pictures.cost_chart(rows[3:], lambda line: line.milliseconds, "cost") is None


def ships(rows: list[Record]) -> Record | None:
    line = verdict.choice(lines(rows))
    return line and line.record


def test_the_row_to_take_is_the_cheapest_within_the_nearest_limit_that_any_keeps():
    def student(nfe: int, ratio: float) -> Record:
        return record("student", nfe, 4.0 * ratio, parent=TEACHER.sha256)

    def words(*rows: Record) -> str:
        return " ".join(verdict.sentences(lines([*rows])))

    one, two, four, eight = student(1, 5.0), student(2, 1.9), student(4, 1.1), student(8, 0.9)
    assert ships([TEACHER, one, two, four, eight]) is four
    assert ships([TEACHER, one, two]) is two
    assert ships([TEACHER, one, student(2, 3.0)]).nfe == 2
    assert ships([TEACHER]) is None
    assert ships([TEACHER, SOLVER]) is SOLVER
    text = words(TEACHER, one, two, four, eight)
    assert "Take student at 4 calls: the cheapest within 1.2×" in text
    assert "If 2× will do: student at 2 calls" in text
    assert "none is within 1.2×" in words(TEACHER, one, two)
    assert "though none is within 2×" in words(TEACHER, one)
    assert "not among these rows" in words(four)


def test_a_student_with_a_warning_does_not_ship_while_another_is_sound(tmp_path):
    collapsed = record(
        "narrow", 1, 4.0, parent=TEACHER.sha256,
        others={"coverage": [0.1, 0.1]}, held_out={"coverage": 0.9},
    )  # fmt: skip
    assert ships([*ROWS, collapsed]) is ROWS[2]
    assert ships([TEACHER, collapsed]) is collapsed
    page = write_report(tmp_path, [*ROWS, collapsed]).read_text()
    assert "Further figures" in page
    assert "narrow (collapsed)" in page
    assert "Further figures" not in write_report(tmp_path, ROWS).read_text()


def unipc(score: float, sign: float = 1.0) -> Record:
    row = record("teacher", 4, score, own_plan=False, sampler="unipc", sha256=TEACHER.sha256)
    return sure(row, 0.1, sign)


@pytest.mark.parametrize(
    ("score", "taken", "words"),
    [
        (3.0, "teacher, unipc", "The best student of no more calls, progressive at 4 calls"),
        (4.5, "teacher, unipc", "is a tie with it"),  # so its training gains nothing
        (6.0, "progressive", "The best row without training of no more calls, teacher, unipc"),
    ],
)
def test_a_student_is_taken_where_it_beats_the_solvers_of_no_more_calls(score, taken, words):
    rows = [sure(TEACHER, 0.1), unipc(score, -1), sure(ROWS[2], 0.1)]
    made = lines(rows)
    assert verdict.choice(made).title == taken
    assert words in " ".join(verdict.sentences(made))


def test_the_pages_slider_shows_the_verdict_of_its_budget_alone(browse, tmp_path):
    path = write_report(tmp_path, ROWS)
    expected = verdict.budgets(lines(ROWS))
    assert [budget.line.title for budget in expected] == [
        "progressive", "consistency <b>&amp;", "progressive"
    ]  # fmt: skip
    move = "const s = document.getElementById('budget'); s.value = 0;"
    move += "s.dispatchEvent(new Event('input'));"
    count = "document.title = [...document.querySelectorAll('.budget li')].map((x) => !x.hidden);"
    for script, shown in (("", "false,false,true"), (move, "true,false,false")):
        opened = browse(path, script + count)
        assert opened.console == []
        assert f"<title>{shown}</title>" in opened.dom


def test_a_dearer_row_that_ties_with_a_cheaper_one_is_no_budgets_verdict():
    two = sure(record("teacher", 2, 4.5, own_plan=False, sha256=TEACHER.sha256), 0.1)
    made = verdict.budgets(lines([sure(TEACHER, 0.1), two, unipc(4.4, -1)]))
    assert [budget.line.record.nfe for budget in made] == [2]


def test_a_long_plan_on_fewer_images_is_no_part_of_the_front_nor_of_the_floor(monkeypatch):
    few = replace(TEACHER, num_images=50, quality=[0.5, 0.5], floor=[0.4, 0.4])
    points, front = [], pictures.front
    monkeypatch.setattr(pictures, "front", lambda given: front(points.extend(given) or given))
    rows = lines([few, *ROWS[1:]])
    made = pictures.cost_chart(rows, lambda line: line.record.nfe, "calls")
    assert sorted(points) == sorted((row.nfe, row.score) for row in ROWS[1:])
    assert sum(map(len, points_of(made).values())) == len(ROWS)
    assert points_of(made)["teacher (50 images)"] == [(1000, 0.5)]
    assert verdict.choice(rows).title != "teacher (50 images)"


def test_the_pareto_front_holds_just_the_points_that_none_dominates():
    random = np.random.default_rng(0)
    points = [tuple(map(float, p)) for p in random.integers(1, 60, (400, 2))]
    points = [p for p in points if p[0] * p[1] > 150]
    undominated = {
        p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
    }
    front = pictures.front(points)
    assert len(front) > 3
    assert {*front} == undominated
    assert front == sorted(front)


@pytest.mark.parametrize("score", [0.0, -1e-9])
def test_a_report_can_be_drawn_of_a_score_that_has_no_logarithm(tmp_path, score):
    broken = record("broken", 2, parent=TEACHER.sha256, quality=[score, score])
    assert "broken" in alternatives(write_report(tmp_path, [*ROWS, broken]).read_text())[0]
    made = pictures.cost_chart(lines([*ROWS, broken]), lambda line: line.record.nfe, "calls")
    ((_, drawn),) = points_of(made)["broken"]
    assert 0 < drawn < min(ROWS[0].floor)
    assert not re.search(rb'd="[^"]*(nan|inf)', made.file("svg"))


def test_only_the_last_setting_and_the_latest_of_a_run_are_shown_and_the_rest_is_counted(tmp_path):
    old = replace(ROWS[2], sha256="e" * 64)
    other = replace(TEACHER, num_images=200)
    assert report.latest([old, other, *ROWS]) == ROWS
    late = {"date": "2031-01-01T00:00:00+00:00"}
    dated = replace(ROWS[2], num_images=200, conditions=late)
    long, *others = ROWS  # a long plan may have fewer images, and is no measure of others
    assert report.latest([dated, old, *others]) == [dated]
    assert report.latest([dated, old, *ROWS]) == [long, dated]
    few = replace(TEACHER, num_images=50, conditions=late)
    assert report.latest([*ROWS, few]) == [few, *ROWS[1:]]
    page = write_report(tmp_path, [old, other, *ROWS]).read_text()
    assert "1 row of runs since made anew; 1 row with num images 200" in page


def test_files_of_several_machines_share_a_page_only_without_times(tmp_path):
    place = {"device": "another machine", "precision": "fp32"}
    theirs = [replace(row, environment=place) for row in ROWS]
    for name, rows in (("ours", ROWS), ("theirs", theirs)):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, rows)
    both = (tmp_path / "ours", tmp_path / "theirs" / "results.jsonl")
    with pytest.raises(UserError, match=r"device another machine.*--no-times"):
        report.write(Options(both, out=tmp_path / "both.html"))
    page = report.write(Options(both, times=False, out=tmp_path / "both.html")).read_text()
    assert len(cells_of(page)) == 2 * len(ROWS)
    assert alternatives(page)[1].count(" call") == 2 * len(ROWS)
    assert "progressive [another machine]" in page
    write_report(tmp_path / "ours", [*ROWS, *theirs])  # as eval.compare merges them
    merged = report.write(Options((tmp_path / "ours",), times=False)).read_text()
    assert len(cells_of(merged)) == 2 * len(ROWS)
    write_report(tmp_path / "ours", ROWS)
    theirs = [replace(row, num_images=7) for row in theirs]
    write_report(tmp_path / "theirs", theirs)
    with pytest.raises(UserError, match="num images 7"):
        report.write(Options(both, times=False, out=tmp_path / "mixed.html"))
    assert not (tmp_path / "mixed.html").exists()


def test_a_file_given_twice_is_shown_once(tmp_path):
    write_report(tmp_path, ROWS)
    page = report.write(Options((tmp_path, tmp_path / "results.jsonl"))).read_text()
    assert len(cells_of(page)) == len(ROWS)


def test_a_report_does_without_samples_and_without_the_training_images(tmp_path):
    page = write_report(tmp_path, ROWS, size=4).read_text()
    assert "The same noise" in page
    assert "Nearest training images" not in page
    (tmp_path / "samples.safetensors").unlink()
    assert "The same noise" not in report.write(Options((tmp_path,))).read_text()


def test_a_report_downloads_no_training_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "urlopen", None)  # not even asked
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(named_data, "DEBIAN", tmp_path)
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    for name in ("fashion-mnist", "cifar10"):
        line = lines([replace(ROWS[2], data=ROWS[2].data | {"name": name})])[0]
        assert report.nearest(line, image) is None
        said = capsys.readouterr().out
        assert f"nearest training images are left out: {name} is not on this disk" in said
    assert not list(tmp_path.iterdir())


def test_the_nearest_training_images_are_of_a_folder_that_moved_too(tmp_path, capsys):
    def photo(seed: int) -> Image.Image:
        levels = np.random.default_rng(seed).integers(0, 256, (8, 8, 4), dtype=np.uint8)
        return Image.fromarray(levels)  # half transparent

    (tmp_path / "photos").mkdir()
    for seed in range(4):
        photo(seed).save(tmp_path / "photos" / f"{seed}.png")
    train = data.load(str(tmp_path / "photos"), form=Form(8, 3, "black")).train.images
    real = {"name": str(tmp_path / "photos"), "split": "train", "images": 4}
    real |= {"sha256": fingerprint(train), "background": "black"}
    line = lines([replace(ROWS[2], data=real)])[0]
    assert "at least 0" in report.nearest(line, train[:1]).words
    (tmp_path / "photos").rename(tmp_path / "pictures")
    capsys.readouterr()
    assert report.nearest(line, train[:1]) is None
    assert "no longer there: name with --data" in capsys.readouterr().out
    assert "at least 0" in report.nearest(line, train[:1], str(tmp_path / "pictures")).words
    photo(9).save(tmp_path / "pictures" / "0.png")
    assert report.nearest(line, train[:1], str(tmp_path / "pictures")) is None
    assert "does not hold the images" in capsys.readouterr().out


def test_real_images_close_the_samples(tmp_path):
    write_report(tmp_path, ROWS)
    names = [*(row.tag for row in ROWS), "real"]
    images = {name: torch.zeros(2, 1, 8, 8, dtype=torch.uint8) for name in names}
    save_tensors(tmp_path / "samples.safetensors", images, {})
    assert alternatives(report.write(Options((tmp_path,))).read_text())[2].endswith("real images")


@pytest.mark.parametrize("width", [1400, 500])
def test_a_page_is_no_wider_than_the_screen(browse, tmp_path, width):
    path = write_report(tmp_path, ROWS)
    show = "const page = document.documentElement;"
    show += "document.title = page.scrollWidth - page.clientWidth;"
    opened = browse(path, show, width=width)
    assert "<title>0</title>" in opened.dom


def test_a_report_of_nothing_is_a_users_mistake(command, tmp_path):
    outcome = command(report.main, tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "results.jsonl" in outcome.err


def test_the_words_beside_a_strip_are_two_lines_whatever_stands_in_a_name():
    """A line feed in a name is written out; the one between the two lines is one."""
    odd = replace(ROWS[0], method="two\nlines $x$")
    strips = pictures.samples(lines([odd]), {odd.tag: torch.zeros(3, 1, 8, 8, dtype=torch.uint8)})
    assert strips is not None
    (axis,) = strips.figure.axes
    (words,) = (text.get_text() for text in axis.texts)
    title, cost = words.split("\n")
    assert title.startswith(r"two\nlines \$x\$")
    assert cost.startswith("1,000 call" if odd.nfe == 1000 else f"{odd.nfe} call")
