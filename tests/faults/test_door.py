"""The net at a command's end, and the streams it writes to: one line, and no work lost."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import record
from PIL import Image

from diffusion import console, machine
from diffusion.console import UserError
from eval.results import jsonl
from eval.show import pictures, table
from eval.show.lines import comparison

ROOT = Path(__file__).parents[2]


def fails(error: BaseException, work: str = "") -> None:
    if not work:
        raise error
    with console.doing(work, "all is kept"):
        raise error


ERRORS = [
    (OSError(errno.EIO, "Input/output error", "runs/x"), "Input/output error: runs/x"),
    (OSError(errno.EFBIG, "File too large"), "File too large"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), "directory: gone"),
    (OSError("made of words\nalone"), "made of words"),
    (TimeoutError(), "TimeoutError"),
    (MemoryError(), "out of memory: give a lower --batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
     "out of memory"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words"), ERRORS, ids=lambda x: str(x)[:20])
@pytest.mark.parametrize("work", ["", "training runs/x"])
def test_an_error_of_the_system_is_one_line_with_what_was_done_and_what_is_kept(
    command, error, words, work
):
    done = command(lambda: fails(error, work))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: ")
    assert words in done.err
    assert (f"{work}: all is kept" in done.err) == bool(work)


def test_a_real_allocation_that_fails_is_one_line(command):
    done = command(lambda: torch.empty(2**60))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "out of memory" in done.err


def test_with_debug_the_traceback_comes_and_the_command_does_not_see_the_flag(command):
    def main() -> None:
        assert sys.argv[1:] == ["--num", "3"]
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        command(main, "--num", 3, "--debug")
    assert "--debug" in command(main, "--num", 3).err


def test_a_fault_of_the_code_keeps_its_traceback(command):
    with pytest.raises(RuntimeError, match="size of tensor"):
        command(lambda: torch.ones(2) + torch.ones(3))


def shell(script: str, **environment: str) -> subprocess.CompletedProcess:
    """A shell script in which PYTHON works for a while, saying how far it is, and leaves a file."""
    work = (
        "from pathlib import Path\n"
        "from diffusion import console\n"
        "def main():\n"
        "    for i in console.track(range(2000), 'work \u2713', lambda i: (i, i, 'done')):\n"
        "        console.say(f'line {i}')\n"
        "    console.write('a table\\n')\n"
        "    Path('left').write_text('all')\n"
        "console.run(main)\n"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT), "WORK": work} | environment
    script = script.replace("PYTHON", f'{sys.executable} -c "$WORK"')
    return subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env=variables,
        cwd=environment["HOME"],
    )


@pytest.mark.parametrize(
    "script",
    [
        "PYTHON | head -1",
        "PYTHON 2>&1 | head -1",
        "PYTHON >&-",
        "PYTHON <&- >&- 2>&-",
        "PYTHONIOENCODING=ascii PYTHON",
        "LC_ALL=C PYTHONUTF8=0 PYTHON | cat",
    ],
)
def test_whoever_reads_the_work_is_done_and_nothing_else_is_said(tmp_path, script):
    done = shell(f"set -o pipefail; {script}", HOME=str(tmp_path))
    assert done.returncode == 0
    assert (tmp_path / "left").read_text() == "all"
    assert done.stderr == ""


def test_a_users_file_of_a_parts_name_is_not_run_by_other_parts_and_is_warned_of(tmp_path):
    for name in ("eval.py", "students.py"):
        (tmp_path / name).write_text("raise SystemExit('the user's own')")
    done = shell(f"{sys.executable} -m distill.progressive --help", HOME=str(tmp_path))
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["students.py", "eval.py"]


def test_help_that_is_cut_off_ends_quietly(tmp_path):
    done = shell(
        f"set -o pipefail; {sys.executable} -m eval.report --help | head -1", HOME=str(tmp_path)
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_cache_is_where_the_environment_says_even_without_a_home(monkeypatch, tmp_path):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    assert machine._cache() == tmp_path
    monkeypatch.delenv("FEWSTEP_CACHE")
    assert machine._cache().name == f"fewstep-{os.getuid()}"


def test_a_settings_file_for_latex_and_jupyters_backend_draw_the_same_picture(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    script = (
        "import sys; sys.path.append(r'%s')\n"
        "from made_up import record\n"
        "from eval.show import pictures\n"
        "from eval.show.lines import comparison\n"
        "lines = comparison([record(), record('s', 1)], True).lines\n"
        "pictures.cost_chart(lines, lambda x: x.record.nfe, 'calls').file('png')\n"
    ) % (ROOT / "tests")
    environment = {
        "MPLCONFIGDIR": str(tmp_path),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([sys.executable, "-c", script], env=os.environ | environment, check=True)


ODD = [
    r"$\bad$", r"\$\bad$ $", "a\x1b[31mred", "<script>x</script>", "a|b\nc", "[bold]x[/bold]",
    "_a_ *b* `c`", "a\u202eb", "\x07", "\\",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_an_odd_name_of_a_card_is_only_text_in_every_table_and_picture(name, capsys):
    rows = [record(name, 8), record(f"s{name}", 2, parent="0" * 64)]
    assert [each.method for each in read_back(rows)] == [name, f"s{name}"]
    compared = comparison(rows, True)
    picture = pictures.cost_chart(compared.lines, lambda line: line.record.nfe, "calls")
    assert picture.file("png").startswith(b"\x89PNG")
    assert picture.file("svg")
    for form in ("rich", "markdown", "latex"):
        table.show(form, compared)
    shown = capsys.readouterr().out
    assert not {*"\x1b\x07\u202e"} & {*shown}
    lines = table.markdown(compared).splitlines()
    assert all(line.count(" | ") == lines[2].count(" | ") for line in lines[2:6])
    assert "<" not in table.markdown(compared).replace(r"\<", "")


def read_back(rows: list) -> list:
    text = jsonl.lines(rows)
    path = Path(os.environ["FEWSTEP_CACHE"]) / "rows.jsonl"
    path.write_text(text)
    return jsonl.read(path)


def test_a_folder_whose_name_no_card_can_hold_is_refused_before_the_work(tmp_path):
    from diffusion import data

    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    with pytest.raises(UserError, match="rename the folder"):
        data.load(str(folder))


def test_a_message_with_control_codes_reaches_the_terminal_as_text(command):
    done = command(lambda: fails(UserError("bad \x1b[2J name \udc80\n")))
    assert done.err == "error: bad \\x1b[2J name \\udc80\\n\n"
