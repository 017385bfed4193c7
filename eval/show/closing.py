"""The last lines of a comparison: which row to take, and the command to see what was made."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from diffusion.samplers import SOLVERS
from eval.show.columns import short
from eval.show.lines import Line
from eval.show.verdict import LIMITS, choice, ratio

NO_STUDENT = (
    "no student is among these rows: make one with distill.progressive or distill.consistency, and "
    "compare again"
)


def take(lines: list[Line]) -> str:
    """The row to take, what it costs, and the command that makes images with it."""
    line = choice(lines)
    if line is None:
        return NO_STUDENT
    words = [f"take {line.name} at {line.calls}"]
    if line.free:
        words.append("which needs no training")
    if line.ratio is not None:
        words.append(f"{ratio(line)} times its teacher's distance")
    if line.speed_up is not None:
        words.append(f"{short(line.speed_up)} times as fast")
    if line.ratio is not None and line.ratio > LIMITS[-1]:
        words.append(f"though no row is within {LIMITS[-1]:g} times: train longer")
    lack = "" if any(x.record.student for x in lines) else f"\n{NO_STUDENT}"
    return f"{', '.join(words)}: {generate(line)}{lack}"


def generate(line: Line) -> str:
    """The command that makes a grid of images as the row's were made."""
    path, record = Path(line.record.run), line.record
    run = path.parent if path.name == "model.safetensors" else path
    plan = ["--steps", str(record.steps)]
    if line.free:
        calls = SOLVERS[record.sampler].calls(record.steps)
        plan = ["--sampler", record.sampler, "--steps", str(calls)]
        plan += ["--shift", record.note.split()[1]] if record.note else []
    elif record.note == "searched":  # angles that the checkpoint does not know
        plan = ["--angles", *(f"{angle:.6g}" for angle in reversed(record.angles[1:]))]
    if record.guidance is not None:
        plan += ["--guidance", f"{record.guidance:g}"]
    words = ["students.generate", str(run), *plan, "--num", "64", "--out", "grid.png"]
    return f"{python()} -m {quoted(*words)}"


def opener(page: Path) -> str:
    """The command that opens a page in this system's browser."""
    if sys.platform == "win32":
        return f'start "" {quoted(str(page))}'
    command = "open" if sys.platform == "darwin" else "xdg-open"
    if shutil.which(command):
        return f"{command} {quoted(str(page))}"
    return f"{python()} -m webbrowser {quoted(page.resolve().as_uri())}"


def python() -> str:
    """This Python as a shell in this folder starts it."""
    here = Path(sys.executable)
    if shutil.which("python") == str(here):
        return "python"
    inside = here.is_relative_to(Path.cwd())
    return quoted(str(here.relative_to(Path.cwd()) if inside else here))


def quoted(*words: str) -> str:
    """The words as one line of this system's shell."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
