"""The tables: every format shows the same cells, and a ratio is to the row's own teacher."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import record, sha256, sure
from rich.console import Console

from diffusion.console import UserError
from diffusion.files import CHECKSUM
from eval.report import latest
from eval.results import jsonl
from eval.results.records import FOR_P90, Record, Timing
from eval.show import table
from eval.show.lines import comparison, lines

RESULTS = Path(__file__).parents[1] / "results"
FIGURES = {"kid": [0.00125, 0.00135], "precision": [0.9, 0.92], "coverage": [0.8, 0.9]}
REAL = {"kid": 0.001, "precision": 0.95, "coverage": 0.93}
TEACHER = record(
    "teacher", 1000, 4.0, 8.0, others=FIGURES, held_out=REAL,
    likelihood={"variational-bound": 3.4567, "variational-bound-error": 0.0123, "images": 90},
)  # fmt: skip
SOLVER = record(
    "teacher", 7, 6.0, 0.04, own_plan=False, sampler="heun", steps=4, sha256=TEACHER.sha256,
    others=FIGURES, held_out=REAL,
)  # fmt: skip
FOUR = record("progressive", 4, 4.4, 0.04, parent=TEACHER.sha256, others=FIGURES, held_out=REAL)
ONE = record(
    "progressive", 1, 1234.5, 0.01, parent=FOUR.sha256, held_out=REAL,
    others=FIGURES | {"coverage": [0.1, 0.2]},
)  # fmt: skip
UNTIMED = record("a_|b&c%$#{}~^\\<x> [y]", 2, 7.0, parent=TEACHER.sha256, timings=[])
ROWS = [TEACHER, SOLVER, FOUR, ONE, UNTIMED]


def column(rows: list[Record], head: str, title: str = "Quality and cost") -> list[str]:
    (chosen,) = (each for each in table.tables(comparison(rows)) if each.title == title)
    return [cells[chosen.heads.index(head)] for cells in chosen.cells]


def heads(rows: list[Record], title: str, times: bool = True) -> tuple[str, ...]:
    of_title = (t.heads for t in table.tables(comparison(rows, times)) if t.title == title)
    return next(of_title, ())


def parsed_markdown(text: str) -> list[list[list[str]]]:
    """The heads and the rows of each table."""
    tables: list[list[list[str]]] = []
    previous = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                tables.append([])
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            tables[-1].append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
        previous = line
    return [[head, *rows] for head, _, *rows in tables]


LATEX = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^"}
LATEX |= {r"\textless{}": "<", r"\textgreater{}": ">", "{[}": "[", "--": "–"}
LATEX |= {r"$\times$": "×", r"$\pm$": "±", r"$\le$": "≤"} | {f"\\{c}": c for c in "&%$#_{}"}


def parsed_latex(text: str) -> list[list[list[str]]]:
    known = re.compile("|".join(re.escape(word) for word in sorted(LATEX, key=len, reverse=True)))
    tables = []
    for body in re.findall(r"\\toprule\n(.*?)\\bottomrule", text, re.DOTALL):
        lines = [line.removesuffix(r" \\") for line in body.splitlines() if line != r"\midrule"]
        cells = [re.split(r" (?<!\\)& ", line) for line in lines]
        tables.append([[known.sub(lambda m: LATEX[m[0]], x) for x in line] for line in cells])
    return tables


def number(text: str) -> float | None:
    """The first number of a cell."""
    match = re.match(r"-?[\d,.]+(e[-+]\d+)?", text)
    return float(match[0].replace(",", "")) if match and text != "-" else None


@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize("parse", [("markdown", parsed_markdown), ("latex", parsed_latex)])
def test_markdown_and_latex_hold_every_cell_of_the_tables(parse, times):
    name, parsed = parse
    expected = [[[*t.heads], *map(list, t.cells)] for t in table.tables(comparison(ROWS, times))]
    assert len(expected) == (5 if times else 4)
    assert parsed(table.FORMATS[name](comparison(ROWS, times))) == expected


@pytest.mark.parametrize("times", [True, False])
def test_the_csv_holds_the_same_numbers_in_full(times):
    rows = list(csv.DictReader(io.StringIO(table.FORMATS["csv"](comparison(ROWS, times)))))
    assert len(rows) == len(ROWS)
    checked = set()
    for each in table.tables(comparison(ROWS, times)):
        for line, cells in zip(each.lines, each.cells, strict=False):  # the foot is no row
            row = rows[[x.key for x in ROWS].index(line.record.key)]
            for head, cell in list(zip(each.heads, cells, strict=True))[1:]:
                expected = number(cell)
                if head == "size":
                    expected *= 1e6
                if head == "50,000 images" and expected:
                    expected *= {"s": 1, "min": 60, "h": 3600}[cell.split()[-1]]
                value = float(row[head]) if row[head] else None
                assert value == (None if expected is None else pytest.approx(expected, rel=6e-3))
                checked.add(head)
    assert len(checked) == (17 if times else 12)
    for row, made in zip(rows, ROWS, strict=True):
        assert float(row["quality"]) == made.score
        assert [row["run"], row["sha256"], row["device"]] == [made.run, made.sha256, "a device"]
        assert row["network precision"] == "fp32"
        assert not any("," in row[head] for head in row if head not in ("method", "first call, s"))
    assert [row["warnings"] for row in rows] == ["", "", "", "collapsed", ""]
    assert ("ms @1 q1" in rows[0]) == times


def test_json_lines_are_the_records(tmp_path):
    (tmp_path / "results.jsonl").write_text(table.FORMATS["jsonl"](comparison(ROWS, True)))
    assert jsonl.read(tmp_path / "results.jsonl") == ROWS


@pytest.mark.parametrize("width", [70, 120])
def test_a_terminal_shows_every_cell_whole_however_narrow_it_is(monkeypatch, width):
    screen = Console(width=width, file=io.StringIO(), soft_wrap=True, highlight=False)
    monkeypatch.setattr(table, "out", screen)
    rows = [replace(row, method=f"m{i}") for i, row in enumerate(ROWS)]
    table.show("rich", comparison(rows))
    printed = screen.file.getvalue()
    for each in table.tables(comparison(rows)):
        missing = [cell for row in each.cells for cell in row if cell not in printed]
        assert (missing == []) == (each.title != table.FURTHER)
        assert each.title == table.FURTHER or each.caption in printed
    grid = [line for line in printed.splitlines() if line.startswith(" ")]
    assert max(map(len, grid)) <= width


@pytest.mark.parametrize("name", ["markdown", "csv", "latex", "jsonl"])
def test_what_is_shown_is_just_the_text_so_that_it_can_be_a_file(name, capsys):
    table.show(name, comparison(ROWS))
    assert capsys.readouterr().out == table.FORMATS[name](comparison(ROWS, True))


@pytest.mark.parametrize("name", ["rich", "markdown", "csv", "latex"])
def test_no_table_mixes_rows_that_are_not_comparable(name):
    rows = [*ROWS, record("stranger", 3, num_images=7)]
    with pytest.raises(UserError, match="num images 7 in stranger 3"):
        table.FORMATS[name](comparison(rows, True))
    other = {"device": "another", "precision": "fp32"}
    rows = [*ROWS, record("stranger", 3, environment=other)]
    with pytest.raises(UserError, match="--no-times"):
        table.FORMATS[name](comparison(rows, True))
    assert table.FORMATS[name](comparison(rows, False))


def test_a_row_without_its_figures_is_not_shown_as_if_it_had_them():
    with pytest.raises(UserError, match=r"progressive in 4 steps .*2 seeds"):
        table.tables(comparison([TEACHER, replace(FOUR, quality=[4.0])]))


# --- ratios


def family(name: str, score: float, seconds: float) -> list[Record]:
    """A teacher and its line of students, told from another by its weights alone."""
    first = record("teacher", 100, score, 100 * seconds, sha256=sha256(name), run=f"{name}/teacher")
    short = record(
        "teacher", 50, 9 * score, seconds, sha256=sha256(name), run=f"{name}/teacher"
    )  # its other plan
    made = [first, short]
    for steps in (4, 2, 1):
        parent = made[-1].sha256
        weights = sha256(f"{name} {steps}")
        run = f"{name}/progressive/{steps}"
        made.append(
            record("progressive", steps, 2 * score, seconds, sha256=weights, parent=parent, run=run)
        )
    return made


def test_a_ratio_and_a_speed_up_are_to_the_rows_own_teacher():
    one, two = family("one", 10.0, 0.1), family("two", 40.0, 0.3)
    rows = [one[0], *two, *one[1:]]
    by_key = {line.record.key: line for line in lines(rows)}
    for each in (one, two):
        teacher = each[0]
        for row in each:
            line = by_key[row.key]
            assert line.teacher is teacher
            assert line.ratio == pytest.approx(row.score / teacher.score)
            assert line.speed_up == pytest.approx(teacher.batch.median / row.batch.median)
    assert column(rows, "× teacher") == [
        "1.00",
        "1.00",
        "9.00",
        *["2.00"] * 3,
        "9.00",
        *["2.00"] * 3,
    ]
    names = column(rows, "method")
    assert names[:3] == ["teacher [one]", "teacher [two]", "teacher [two]"]
    assert {*names[3:6]} == {"progressive [two]"}


def test_where_the_line_is_broken_the_tables_teacher_stands_in():
    one = family("one", 10.0, 0.1)
    orphan = record("orphan", 2, 30.0, parent=sha256("lost"))
    assert column([*one, orphan], "× teacher")[-1] == "3.00"
    del one[2]  # the first student: its own students' line is broken, and there is one teacher
    assert column([*one, orphan], "× teacher") == ["1.00", "9.00", "2.00", "2.00", "3.00"]


def test_a_line_that_ends_in_itself_is_no_endless_walk():
    a = record("a", 2, parent=sha256("b"), sha256=sha256("a"))
    b = record("b", 2, parent=sha256("a"), sha256=sha256("b"))
    assert [line.ratio for line in lines([a, b])] == [None, None]
    assert [line.ratio for line in lines([a, b, TEACHER])] == [1.0, 1.0, 1.0]


def test_without_a_teacher_there_is_no_ratio():
    assert column([FOUR, ONE], "× teacher") == ["-", "-"]
    assert column([FOUR, ONE], "speed-up") == ["-", "-"]
    assert "× teacher" not in table.tables(comparison([FOUR, ONE]))[0].caption


# --- times


def test_a_row_without_times_has_dashes_and_a_table_without_times_no_columns_for_them():
    for head in table.TIMES:
        assert column(ROWS, head)[-1] == "-"
        assert head not in heads(ROWS, "Quality and cost", times=False)
    assert heads(ROWS, "Speed", times=False) == ()
    untimed = [replace(row, timings=[]) for row in ROWS]
    assert heads(untimed, "Speed") == ()
    assert "ms @1" not in table.tables(comparison(untimed))[0].caption


def test_settings_tried_stand_beside_the_budget_where_anyone_said_them():
    assert "settings tried" not in heads(ROWS, "Training")
    tuned = [replace(row, tried=1234 if row.parent else None) for row in ROWS]
    shown = column(tuned, "settings tried", "Training")
    own = [row for row in ROWS if row.own_plan]
    assert shown == ["1,234" if row.parent else "-" for row in own]


def test_a_column_that_no_row_has_a_figure_for_is_left_out():
    always = ("method", "steps", "first call, s", "ms @1", "images/s", "50,000 images")
    assert heads(ROWS, "Speed") == always
    timings = [Timing(1, 0.5, (0.1,) * FOR_P90), Timing(50, None, (0.2,) * 3, 10**7, 10**8)]
    rich = replace(FOUR, timings=[*timings, Timing(64, seconds=(0.1, 0.1))])
    full = [
        *always[:4],
        "p90, ms",
        "images/s",
        "best images/s",
        "50,000 images",
        "peak MB",
    ]
    assert [*heads([*ROWS[:3], rich], "Speed")] == full
    assert column([TEACHER, rich], "best images/s", "Speed") == ["-", "640 @64"]
    assert column([rich], "50,000 images", "Speed") == ["1.3 min"]  # 50,000 / 640 s
    assert column([TEACHER, rich], "peak MB", "Speed") == ["-", "10"]


@pytest.mark.parametrize(("repeats", "has_p90"), [(FOR_P90 - 1, False), (FOR_P90, True)])
def test_a_90th_percentile_is_shown_only_where_the_repeats_allow_it(repeats, has_p90):
    seconds = tuple(0.001 * (i + 1) for i in range(repeats))
    row = replace(FOUR, timings=[Timing(1, seconds=seconds)])
    assert ("p90, ms" in heads([row], "Speed")) == has_p90
    if has_p90:
        assert column([row], "p90, ms", "Speed") == [f"{1 + 0.9 * (repeats - 1):.3g}"]


def test_times_are_medians_with_their_quartiles():
    seconds = (0.5, 0.1, 0.2, 0.4, 0.3)
    row = replace(FOUR, timings=[Timing(1, seconds=seconds), Timing(50, seconds=seconds)])
    assert column([row], "ms @1") == ["300"]
    assert column([row], "ms @1", "Speed") == ["300 (200–400)"]
    assert column([row], "images/s") == ["167"]
    assert column([row], "images/s", "Speed") == ["167 (125–250)"]


def test_a_batch_that_failed_says_why():
    failed = [Timing(1, seconds=(0.1,)), Timing(50, failed="out of memory")]
    row = replace(FOUR, timings=failed)
    assert column([row], "images/s", "Speed") == ["out of memory"]
    assert column([row], "images/s") == ["-"]


# --- what a reader must not miss


@pytest.mark.parametrize("title", ["Quality and cost", "Speed", table.FURTHER])
def test_a_collapse_is_marked_in_the_first_cell_of_every_table(title):
    methods = column(ROWS, "method", title)
    assert [name for name in methods if "(collapsed)" in name] == ["progressive (collapsed)"]
    assert "(collapsed): " in table.tables(comparison(ROWS))[0].caption
    assert "(copies)" not in table.tables(comparison(ROWS))[0].caption


def test_copies_are_marked_and_explained():
    copies = {"memorisation-copied": [0.3, 0.3], "memorisation-copied_floor": [0.01, 0.01]}
    tables = table.tables(comparison([replace(FOUR, others=copies)]))
    assert tables[0].cells[0][0] == "progressive (copies)"
    assert "(copies): " in tables[0].caption


def test_where_nothing_is_held_out_the_caption_says_what_cannot_be_judged():
    rows = [
        replace(row, others={"kid": [0.1, 0.1], "memorisation-copied": [share] * 2}, held_out={})
        for row, share in ((TEACHER, 0.01), (FOUR, 0.47))
    ]
    assert column(rows, "method") == ["teacher", "progressive (copies)"]
    for each in (rows, rows[:1]):
        caption = table.tables(comparison(each))[0].caption
        assert "no images are held out" in caption
        assert "more than 5% are three times as near to one training image" in caption
    assert column(rows, "method", table.FURTHER) == ["teacher", "progressive (copies)"]


def test_one_seed_has_no_spread_to_show():
    rows = [replace(row, seeds=[3], quality=[4.25], others={}) for row in (TEACHER, FOUR)]
    assert column(rows, "quality") == ["4.25", "4.25"]
    caption = table.tables(comparison(rows))[0].caption
    assert "seed 3" in caption
    assert "±" not in caption


def test_held_out_images_close_the_further_figures():
    assert column(ROWS, "kid", table.FURTHER) == [*["0.0013"] * 4, "-", "0.001"]
    assert column(ROWS, "method", table.FURTHER)[-1] == "held-out images"


def test_bits_per_dimension_are_those_of_the_rows_that_have_them():
    assert heads(ROWS, "Likelihood") == ("method", "steps", "bits/dim ≤")
    assert column(ROWS, "bits/dim ≤", "Likelihood") == ["3.457 ± 0.012"]
    assert heads(ROWS[1:], "Likelihood") == ()


def trainings(scores: list[float], **changes) -> list[Record]:
    """Students of one recipe by several training seeds."""
    return [
        record(
            "cd", 2, score, parent=TEACHER.sha256, sha256=sha256(f"cd {seed}"),
            run=f"runs/cd-{seed}/model.safetensors", training={"recipe": "3456cdef"}, **changes,
        )
        for seed, score in enumerate(scores)
    ]  # fmt: skip


def test_trainings_of_one_recipe_are_one_row_with_their_mean_and_their_spread():
    rows = [TEACHER, *trainings([3.0, 4.0, 8.0]), FOUR]
    assert column(rows, "method") == ["teacher", "cd", "progressive"]
    assert column(rows, "trainings") == ["1", "3", "1"]
    assert column(rows, "quality")[1] == "5"
    assert column(rows, "× teacher")[1] == "1.25"
    assert "of several trainings" in table.tables(comparison(rows))[0].caption


def test_a_row_of_several_trainings_has_the_means_of_their_further_figures_and_all_their_times():
    slow, fast = (
        replace(each, others={"kid": [kid, 3 * kid]}, timings=[Timing(1, 9.0, (seconds, seconds))])
        for each, kid, seconds in zip(trainings([3.0, 4.0]), (1.0, 2.0), (5.0, 3.0), strict=True)
    )
    (line,) = lines([slow, fast])
    assert line.record.further["kid"] == pytest.approx(3)
    assert line.record.single.seconds == (3, 3, 5, 5)
    assert [training.quality for training in line.trainings] == [slow.quality, fast.quality]


def test_where_no_row_has_several_trainings_the_table_says_nothing_of_them():
    assert "trainings" not in heads(ROWS, "Quality and cost")
    assert "trainings" not in table.tables(comparison(ROWS))[0].caption


# --- a long plan on fewer images


FEW = replace(TEACHER, num_images=50, floor=[7.0, 9.0])
UNIPC = record(
    "teacher", 32, 2.5, 0.3, own_plan=False, sampler="unipc", sha256=TEACHER.sha256, num_images=100
)
DDIM = record("teacher", 16, 3.0, 0.2, own_plan=False, sampler="ddim", sha256=TEACHER.sha256)


def test_a_long_plan_on_fewer_images_is_compared_with_nobody_and_the_best_long_row_stands_in():
    rows = [FEW, SOLVER, DDIM, UNIPC, FOUR]
    assert column(rows, "× teacher") == ["-", "2.40", "1.20", "1.00", "1.76"]
    assert column(rows, "speed-up")[-1] == "200×"  # to the long plan itself
    assert column(rows, "method")[:2] == ["teacher (50 images)", "teacher, heun"]
    caption = table.tables(comparison(rows))[0].caption
    assert "of 100 images" in caption
    assert "floor (as many real images) 2," in f"{caption},".replace(";", ",")
    assert "over teacher, unipc at 32 calls (2.5)" in caption
    assert "teacher (50 images): of so few, with a floor of 8" in caption


def test_without_a_row_of_16_steps_the_teachers_row_of_the_most_steps_is_the_yardstick():
    assert column([FEW, SOLVER, FOUR], "× teacher") == ["-", "1.00", "0.73"]
    caption = table.tables(comparison([FEW, SOLVER, FOUR]))[0].caption
    assert "over teacher, heun at 7 calls (6)" in caption


def test_the_yardstick_is_the_teachers_best_row_of_16_steps_or_more_on_as_many_images():
    rows = [TEACHER, UNIPC, FOUR]
    assert column(rows, "× teacher") == ["1.60", "1.00", "1.76"]
    assert "teacher, unipc at 32 calls (2.5)" in table.tables(comparison(rows))[0].caption


def test_each_of_two_teachers_lines_has_its_own_yardstick():
    one, two = family("one", 10.0, 0.1), family("two", 40.0, 0.3)
    caption = table.tables(comparison([*one, *two]))[0].caption
    assert "its own teacher, teacher [one] at 100 calls (10) or teacher [two]" in caption


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "fashion-mnist/half", "emoji"])
def test_the_published_tables_keep_their_figures(name):
    folder = RESULTS / name
    times = "images/s" in (text := (folder / "table.md").read_text())
    rows = latest(jsonl.read(folder / "results.jsonl"), times)
    assert parsed_markdown(table.markdown(comparison(rows, times))) == parsed_markdown(text)


def test_a_floor_of_more_images_than_there_are_says_how_they_were_drawn():
    rows = [replace(row, num_images=5000) for row in (UNIPC, FOUR)]
    caption = table.tables(comparison(rows))[0].caption
    assert "drawn with replacement from 1,438" in caption
    assert "replacement" not in table.tables(comparison(ROWS))[0].caption


# --- intervals


def test_quality_and_ratios_stand_beside_their_intervals():
    rows = [sure(UNIPC, 0.02), sure(FOUR, 0.08, -1)]
    assert column(rows, "quality") == ["2.5 (2.3–2.7)", "4.4 (4.0–4.8)"]
    assert column(rows, "× teacher") == ["1.00", "1.76 (1.5–2.1)"]
    # both are less the floor of 2, whose error is small: 0.5 is little beside its own interval
    (_, above) = column(rows, "above floor")
    assert above.startswith("4.80 (")
    (line,) = [line for line in comparison(rows).lines if line.above]
    assert line.above_interval[0] < 4.8 < line.above_interval[1]


def test_rows_that_move_together_have_the_narrower_ratio():
    (_, together), (_, against) = (
        comparison([sure(UNIPC, 0.02), sure(FOUR, 0.08, sign)]).lines for sign in (1, -1)
    )
    widths = [x.ratio_interval[1] - x.ratio_interval[0] for x in (together, against)]
    assert widths[0] < 0.5 * widths[1]


def test_a_row_that_its_interval_cannot_part_from_the_best_of_as_many_calls_is_marked_a_tie():
    far = replace(FOUR, sha256="1" * 64, run="far", quality=[8.0, 8.0])
    near = replace(FOUR, sha256="2" * 64, run="near", quality=[4.5, 4.5])
    marks = [line.mark for line in comparison([sure(x, 0.08, s) for x, s in
             ((UNIPC, 1), (FOUR, 1), (far, 1), (near, -1))]).lines]  # fmt: skip
    assert marks == ["", "≈", "", "≈"]
    apart = comparison([sure(FOUR, 0.01), sure(far, 0.01)]).lines
    assert [line.mark for line in apart] == ["*", ""]
    assert [line.mark for line in comparison([FOUR, far]).lines] == ["", ""]  # of an older format


def test_of_several_trainings_the_interval_is_over_trainings_too():
    of_one = comparison([sure(trainings([3.0])[0], 0.001)]).lines[0].interval
    (line,) = comparison([sure(each, 0.001) for each in trainings([3.0, 4.0, 8.0])]).lines
    assert of_one[1] - of_one[0] < 0.2
    low, high = line.interval
    assert low < 3 < 8 < high


def test_a_file_of_format_3_is_read_and_has_no_intervals(tmp_path):
    head, *rest = table.FORMATS["jsonl"](comparison([FOUR, TEACHER])).splitlines(keepends=True)
    values = {k: v for k, v in json.loads(head).items() if k != CHECKSUM} | {"format": 3}
    (tmp_path / "results.jsonl").write_text(json.dumps(values) + "\n" + "".join(rest))
    records = jsonl.read(tmp_path / "results.jsonl")
    assert records == [FOUR, TEACHER]
    assert [line.interval for line in comparison(records).lines] == [None, None]
