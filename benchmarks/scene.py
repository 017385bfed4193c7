"""What benchmarks.faults disturbs: every command in its own home, and what each should leave."""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks import disturb
from benchmarks.disturb import Disturbance, Ended, end, start
from diffusion.console import UserError, say
from diffusion.files import CHECKSUM, metadata
from diffusion.typed import parse
from distill import consistency, guidance, midtraining, progressive
from eval import compare, human, methods, report
from students import generate, soup
from teachers import ddpm

FIT = "--batch-size 8 --warmup 0 --log-every 1 --save-every 0 --precision fp32"
ROUND = f"{FIT} --iterations 2 --teacher runs/teacher"
TABLE = "eval.compare runs/teacher runs/cd --out runs/compare --solvers ddim --no-long --no-times"
TABLE += " --num-images 100 --features random --precision fp32 --likelihood 0 --seeds 0 1"
COMMANDS = {  # in an order in which each has its inputs: its name -> its words
    "teacher": f"teachers.ddpm --out runs/teacher {FIT} --iterations 3 --width 8 --blocks 1 "
    "--num-classes 10 --multipliers 1 --attention",
    "raw": f"distill.progressive {ROUND} --start-steps 4 --rounds 2 1 --next-teacher raw",
    "guided": f"distill.guidance {ROUND} --out runs/guided",
    "prepared": f"distill.midtraining {ROUND} --out runs/prepared --solver-steps 2",
    **{m: f"distill.consistency --mode {m} {ROUND} --out runs/{m}" for m in consistency.MODES},
    "cd1": f"distill.consistency {ROUND} --out runs/cd1 --seed 1",
    "soup": "students.soup runs/cd runs/cd1 --out runs/soup",
    "grid": "students.generate runs/cd --num 4 --out grid.png --precision fp32",
    "npz": "students.generate runs/cd --num 4 --out made.npz --precision fp32",
    "pictures": "students.generate runs/cd --num 3 --out made --precision fp32",
    "pictures again": "students.generate runs/cd --num 2 --seed 1 --out made --precision fp32",
    "table": f"{TABLE} --steps 1",
    "longer table": f"{TABLE} --steps 1,2",
    "report": "eval.report runs/compare",
    "methods": "eval.methods runs/compare/results.jsonl",
    "human": "eval.human make runs/cd made.npz --out human.html --pairs 2",
}
MAINS = {
    module.__name__: module.main
    for module in (
        *(ddpm, progressive, guidance, midtraining, consistency, soup, generate),
        *(compare, report, methods, human),
    )
}
TIMES = {"seconds", "images_per_second", "conditions", CHECKSUM, "earlier_seconds"}
LOCK = ".lock"
NUMBERS = {".safetensors", ".jsonl", ".npz"}


@dataclass(frozen=True)
class Fault:
    """One fault: what is done, in words, and a call that does it in a home and says what is bad."""

    command: str
    words: str
    happen: Callable[["Scene", str, Path], str]


@dataclass
class Scene:
    """The homes of all commands, before and after they ran undisturbed."""

    folder: Path
    events: dict[str, list[str]] = field(default_factory=dict)
    expected: dict[str, dict[str, object]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def before(self, name: str) -> Path:
        return self.folder / "before" / name

    def after(self, name: str) -> Path:
        """Where the command has just ended: what the next one finds."""
        return self.folder / "after" / name

    def build(self) -> None:
        home = self.folder / "first"
        home.mkdir(parents=True)
        for name in COMMANDS:
            shutil.copytree(home, self.before(name))
            log, begun = self.folder / "events", time.monotonic()
            ended = call(name, home, partial(_list_events, log))
            self.seconds[name] = time.monotonic() - begun
            if ended.code:
                raise UserError(f"{COMMANDS[name]}, undisturbed: {ended.words}")
            self.events[name] = log.read_text().splitlines()
            log.unlink()
            self.expected[name] = figures(home)
            shutil.copytree(home, self.after(name))
            say(f"{name}: {len(self.events[name])} events, {self.seconds[name]:.1f} s")


def _list_events(log: Path, home: Path) -> None:
    def note(number: int, kind: str, path: str) -> None:
        with open(log, "a") as file:
            file.write(f"{kind} {path}\n")

    disturb.watch(home, note)


def begin(name: str, home: Path, disturbance: Disturbance | None = None, more: str = "") -> tuple:
    module, *words = f"{COMMANDS[name]} {more}".split()
    return start(MAINS[module], words, home, disturbance)


def call(name: str, home: Path, disturbance: Disturbance | None = None) -> Ended:
    return end(*begin(name, home, disturbance))


def figures(home: Path) -> dict[str, object]:
    """What each file says, by its path, but for times, checksums and locks, which say nothing."""
    files = (path for path in sorted(home.rglob("*")) if path.is_file() and path.suffix != LOCK)
    return {str(path.relative_to(home)): _figures(path) for path in files}


def _figures(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
            card, said = json.loads(metadata(path).get("card", "null")), metadata(path)
            others = {k: v for k, v in said.items() if k in ("line", "settings")}
            return _timeless(card), others, {k: _digest(v) for k, v in sorted(tensors.items())}
        if path.suffix in (".json", ".jsonl"):
            rows = [_timeless(parse(line)) for line in path.read_bytes().splitlines()]
            return rows if path.name == "log.jsonl" else sorted(rows, key=json.dumps)
    except (OSError, ValueError, AttributeError, safetensors.SafetensorError):
        pass
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(tensor.numpy()).hexdigest()}"


def _timeless(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _timeless(v) for k, v in values.items() if k not in TIMES}
    return [_timeless(v) for v in values] if isinstance(values, list) else values


def differences(home: Path, expected: dict[str, object], but: Iterable[str] = ()) -> str:
    """How the files there are other than expected."""
    here = figures(home)
    names = sorted({*here, *expected} - {*but})
    other = [name for name in names if here.get(name) != expected.get(name)]
    return f"other than undisturbed: {', '.join(other)}" if other else ""


def lost(home: Path, before: Path, expected: dict[str, object]) -> str:
    """Which numbers that lay there are neither as they were nor as they were to be.

    A table, and its images, may be more than they were.
    """
    then, now = figures(before), figures(home)
    gone = []
    for name in (name for name in then if Path(name).suffix in NUMBERS):
        was, here = then[name], now.get(name)
        if isinstance(was, tuple) and isinstance(here, tuple):
            grown = not was[0] and was[2].items() <= here[2].items()
        else:
            grown = isinstance(was, list) and isinstance(here, list) and all(r in here for r in was)
        if not grown and here not in (was, expected.get(name)):
            gone.append(name)
    return f"lost: {', '.join(gone)}" if gone else ""


def goes_on(scene: Scene, name: str, home: Path, but: Iterable[str] = ()) -> str:
    """The same command again ends whole, with all files but these as undisturbed."""
    again = call(name, home)
    if again.code:
        return again.fault or f"the same command does not go on: {again.words}"
    return differences(home, scene.expected[name], but)


def interrupted(
    disturbance: Disturbance, scene: Scene, name: str, home: Path, but: Iterable[str] = ()
) -> str:
    first = call(name, home, disturbance)
    gone = lost(home, scene.before(name), scene.expected[name])
    return first.fault or gone or goes_on(scene, name, home, but)


def shuffled(items: Iterable, chance: random.Random) -> list:
    items = list(items)
    return chance.sample(items, len(items))


def cycle_shuffled(items: list, chance: random.Random) -> Iterator:
    while True:
        yield from shuffled(items, chance)
