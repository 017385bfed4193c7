"""Faults of every command, by the hundred: `python -m benchmarks.faults --minutes 30`.

Each fault has a folder of its own. A command runs in it and is disturbed; then the same command is
given again. A fault is survived if nothing that lay there is lost, if the first call ended as
promised (by a signal, with one line and exit code 2, or whole), and if all files are in the end
those of a command that nothing disturbed, to the bit, but for times.
"""

import os

os.environ["FEWSTEP_CACHE"] = "cache"  # before what reads it: each home has its own
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import json
import random
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  slow to import, so before the forks
import scipy.stats  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import tyro

from benchmarks.fault_classes import CLASSES
from benchmarks.scene import COMMANDS, Scene, shuffled
from diffusion.console import UserError, run, say
from diffusion.files import write_atomic


@dataclass
class Tally:
    """What became of a class's faults."""

    tried: int = 0
    survived: int = 0
    failures: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """Disturb every command in every way, in turn, and count what is survived."""

    minutes: float = 30
    """How long, at most."""
    each: int = 10**6
    """Faults of each class, at most."""
    classes: tuple[str, ...] = ()
    """Words of the classes' names, such as killed. If left out: all classes."""
    out: Path = Path("runs/faults")
    """The folder for faults.json and for the homes of failures, to look at."""
    seed: int = 0
    """Seed of the faults' choice."""


def measure(options: Options, scene: Scene) -> dict[str, Tally]:
    """A fault of each class in turn, until the time is up or there are no more."""
    chance = random.Random(options.seed)
    names = [n for n in CLASSES if not options.classes or any(w in n for w in options.classes)]
    left = {name: CLASSES[name](scene, random.Random(f"{options.seed} {name}")) for name in names}
    tallies = {name: Tally() for name in names}
    until = time.monotonic() + 60 * options.minutes
    for number in count():
        for name in shuffled([*left], chance):
            fault = next(left[name], None)
            if fault is None or tallies[name].tried >= options.each or time.monotonic() > until:
                del left[name]
                continue
            home = scene.folder / "home"
            shutil.copytree(scene.before(fault.command), home)
            problem = fault.happen(scene, fault.command, home)
            tally = tallies[name]
            tally.tried += 1
            tally.survived += not problem
            if problem:
                place = options.out / "failed" / f"{name.replace(' ', '-')}-{number}"
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(home, place)
                words = {"command": COMMANDS[fault.command], "fault": fault.words}
                tally.failures.append({**words, "problem": problem, "home": str(place)})
                say(f"{name}: {fault.command} {fault.words}: {problem} ({place})")
            shutil.rmtree(home)
        if not left:
            break
    return tallies


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.faults")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        scene = Scene(Path(folder).resolve())
        scene.build()
        tallies = measure(options, scene)
    for name, tally in tallies.items():
        say(f"{name:24} tried {tally.tried:5}  survived {tally.survived:5}")
    tried, survived = (sum(getattr(t, n) for t in tallies.values()) for n in ("tried", "survived"))
    say(f"{'all':24} tried {tried:5}  survived {survived:5}: {options.out / 'faults.json'}")
    content = {name: asdict(tally) for name, tally in tallies.items()}
    write_atomic(options.out / "faults.json", json.dumps(content, indent=1) + "\n")
    if survived < tried:
        raise UserError(f"{tried - survived} faults were not survived: see {options.out}")


if __name__ == "__main__":
    run(main)
