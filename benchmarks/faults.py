"""Faults of every command, by the hundred: `python -m benchmarks.faults --minutes 30`.

Each fault has a folder of its own. A command runs in it and is disturbed; then the same command is
given again. A fault is survived if nothing that lay there is lost, if the first call ended as
promised (by a signal, with one line and exit code 2, or whole), and if all files are in the end
those of a command that nothing disturbed, to the bit, but for times.
"""

import os

os.environ["FEWSTEP_CACHE"] = "cache"  # before what reads it: each home has its own
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import errno
import hashlib
import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  slow to import, so before the forks
import safetensors.torch
import scipy.stats  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import tyro

from benchmarks import disturb
from benchmarks.changes import FREE, VALUES, changed, places
from benchmarks.disturb import Disturbance, Ended, end, start
from diffusion.console import UserError, run, say
from diffusion.files import CHECKSUM, LOCK, metadata, save_tensors, sealed, write_atomic
from diffusion.folders import MARK
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
    f"{module.__name__}": module.main
    for module in (
        *(ddpm, progressive, guidance, midtraining, consistency, soup, generate),
        *(compare, report, methods, human),
    )
}
TIMES = {"seconds", "images_per_second", "conditions", CHECKSUM, "earlier_seconds"}
NUMBERS = {".safetensors", ".jsonl", ".npz"}
SHOWN = {".png", ".md", ".html", ".csv", ".tex"}  # nobody's input


@dataclass
class Tally:
    """What became of a class's faults."""

    tried: int = 0
    survived: int = 0
    failures: list[dict] = field(default_factory=list)


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
    """By path, what each file says, but for times and checksums."""
    files = (path for path in sorted(home.rglob("*")) if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(home)): _figures(path) for path in files}


def _figures(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load(path.read_bytes())
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


def at_events(make: Callable[[int, random.Random], Disturbance]) -> Callable:
    """The class of faults that disturb each command at each of its events."""

    def faults(scene: Scene, chance: random.Random) -> Iterator[Fault]:
        pairs = [(name, n) for name in COMMANDS for n in range(len(scene.events[name]))]
        for name, n in shuffled(pairs, chance):
            happen = partial(interrupted, make(n + 1, chance))
            yield Fault(name, f"before event {n + 1}, {scene.events[name][n]}", happen)

    return faults


def shuffled(items: Iterable, chance: random.Random) -> list:
    items = list(items)
    return chance.sample(items, len(items))


def folders_deleted(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    for name in shuffled([*COMMANDS], chance):
        events = scene.events[name]
        n = chance.randrange(len(events))
        folder = os.path.dirname(events[n].split(" ", 1)[1]).removesuffix("/.part")
        inputs = folder in ("", "runs", "cache") or scene.before(name).joinpath(folder).exists()
        if not inputs:
            log = f"{folder}/log.jsonl"  # its first lines are gone
            happen = partial(interrupted, disturb.delete(n + 1, folder), but=[log])
            yield Fault(name, f"{folder} is deleted before {events[n]}", happen)


def full_disks(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    """A real disk of its own, of so many KiB free, on which there is room again later."""
    if not may_mount(scene.folder):
        say("full disk: left out, for this system lets you mount no disk of your own")
        return
    sizes = [(name, size) for name in COMMANDS for size in (*range(8, 64, 4), *range(64, 400, 32))]
    for name, size in shuffled(sizes, chance):
        yield Fault(name, f"{size} KiB are free", partial(on_small_disk, size))


def may_mount(folder: Path) -> bool:
    if not (pid := os.fork()):
        try:
            with disturb.small_disk(folder):
                os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def on_small_disk(size: int, scene: Scene, name: str, home: Path) -> str:
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            with disturb.small_disk(home) as resize:
                shutil.copytree(scene.before(name), home, dirs_exist_ok=True)
                disk = os.statvfs(home)
                resize((disk.f_blocks - disk.f_bfree) * disk.f_frsize // 1024 + size)
                first = call(name, home)
                resize(1 << 20)
                gone = lost(home, scene.before(name), scene.expected[name])
                words = first.fault or gone or goes_on(scene, name, home)
        except BaseException as error:
            words = repr(error)
        os.write(writer, words.encode()[-4000:])
        os._exit(0)
    os.close(writer)
    return end(pid, reader).words


def flipped_bytes(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    """Damage in a file that a finished or a killed command left, or that it reads."""
    for name in cycle_shuffled([*COMMANDS], chance):
        stop = chance.choice([None, chance.randrange(len(scene.events[name]))])
        yield Fault(name, f"after {'the end' if stop is None else f'a kill at {stop + 1}'}",
                    partial(damaged, stop, chance.random()))  # fmt: skip


def cycle_shuffled(items: list, chance: random.Random) -> Iterator:
    while True:
        yield from shuffled(items, chance)


def damaged(stop: int | None, seed: float, scene: Scene, name: str, home: Path) -> str:
    chance = random.Random(seed)
    call(name, home, None if stop is None else disturb.kill(stop + 1))
    whole = [path for path in sorted(home.rglob("*")) if path.is_file() and path.stat().st_size]
    whole = [path for path in whole if path.name != LOCK]
    if not whole:
        return goes_on(scene, name, home)
    path = chance.choice(whole)
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    content[place] ^= 1 << chance.randrange(8)
    kind = chance.choice(["bit", "bit", "bit", "cut", "zeros"])
    if kind == "cut":
        content = content[:place]
    elif kind == "zeros":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    path.write_bytes(content)
    where = path.relative_to(home)
    words = f"({kind} at byte {place} of {where})"
    ended = call(name, home)
    if ended.fault:
        return f"{ended.fault} {words}"
    if ended.code == 2:
        if path.name not in ended.words:
            return f"the line names no file that is damaged: {ended.words} {words}"
        kept = scene.before(name) / where
        path.unlink(missing_ok=True)
        if path.name == "raw.safetensors":  # the run says that it is to be trained again
            shutil.rmtree(path.parent)
        if kept.exists():
            shutil.copy(kept, path)
        but = () if path.name != "samples.safetensors" else _pictures(scene, name)
        again = call(name, home)
        problem = again.words if again.code else differences(home, scene.expected[name], but)
        return problem and f"{problem} {words}"
    said, shown = path.name in ended.words, path.suffix in SHOWN or path.name == MARK
    untouched = not said and path.exists() and path.read_bytes() == bytes(content)
    numbers = path.suffix in (".safetensors", ".jsonl") and path.name != "log.jsonl"
    unread = untouched and numbers and not _reads(scene, name, str(where))
    legacy = untouched and figures(path.parent).get(path.name) == scene.expected[name].get(
        str(where)
    )
    free = said or legacy or unread or (untouched and (shown or not numbers))
    problem = differences(home, scene.expected[name], (str(where),) if free else ())
    return problem and f"{problem} {words}"


def _reads(scene: Scene, name: str, where: str) -> bool:
    """Whether the command has to do with the file: it made it, or its words name its folder."""
    made = where not in figures(scene.before(name))
    return made or any(f"{where}/".startswith(f"{word}/") for word in COMMANDS[name].split())


def _pictures(scene: Scene, name: str) -> list[str]:
    return [each for each in scene.expected[name] if Path(each).suffix in (*SHOWN, ".safetensors")]


def two_at_once(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    for name in cycle_shuffled([*COMMANDS], chance):
        delay = chance.choice([0.0, chance.random() * scene.seconds[name]])
        killed = chance.choice([None, chance.randrange(len(scene.events[name]))])
        words = f"the second {delay:.2f} s later, the first killed at {killed}"
        yield Fault(name, words, partial(together, delay, killed, ""))


def two_of_other_settings(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    trainings = [
        name for name in COMMANDS if FIT in COMMANDS[name] and "--seed" not in COMMANDS[name]
    ]
    for name in cycle_shuffled(trainings, chance):
        delay = chance.choice([0.0, chance.random() * scene.seconds[name]])
        killed = chance.choice([None, chance.randrange(len(scene.events[name]))])
        words = f"--seed 7 {delay:.2f} s later, the first killed at {killed}"
        yield Fault(name, words, partial(together, delay, killed, "--seed 7"))


def together(
    delay: float, killed: int | None, more: str, scene: Scene, name: str, home: Path
) -> str:
    first = begin(name, home, None if killed is None else disturb.kill(killed + 1))
    time.sleep(delay)
    second = begin(name, home, None, more)
    ends = [end(*first), end(*second)]
    for ended in ends:
        refusal = "in use by" in ended.words or (more and "other settings" in ended.words)
        if ended.fault or (ended.code == 2 and not refusal):
            return ended.fault or f"refused for another reason: {ended.words}"
    if not more or ends[1].code:
        return goes_on(scene, name, home)
    other = scene.folder / "other" / name.replace(" ", "-")
    if not other.exists():  # what those settings give, undisturbed
        shutil.copytree(scene.before(name), other)
        if (alone := end(*begin(name, other, None, more))).code:
            return alone.words
    return differences(home, figures(other))


def short_of_memory(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    for name in cycle_shuffled([*COMMANDS], chance):
        size = int(2 ** chance.uniform(18, 28))
        yield Fault(name, f"{size} bytes of memory",
                    partial(interrupted, disturb.little_memory(size)))  # fmt: skip


def changed_cards(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    model = scene.after("cd") / "runs/cd/model.safetensors"
    card = json.loads(metadata(model)["card"])
    for place, value in shuffled(((p, v) for p in places(card) for v in VALUES), chance):
        yield Fault("npz", f"card: {'.'.join(map(str, place))} is {value!r:.40}",
                    partial(with_card, card, place, value))  # fmt: skip


def with_card(card: dict, place: tuple, value: object, scene: Scene, name: str, home: Path) -> str:
    path = home / "runs/cd/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    digest = hashlib.sha256(
        f"{weights_sha256(tensors)} {(text := json.dumps(changed(card, place, value)))}".encode()
    ).hexdigest()
    save_tensors(path, tensors, {"card": text, "sha256": digest})
    ended = call(name, home)
    where = ".".join(map(str, place))
    free = where in FREE or where.startswith("plans") or value is None or "training" in where
    if ended.fault or ended.code or free or value not in VALUES[:-1]:
        return ended.fault
    return differences(home, scene.expected[name], [str(path.relative_to(home))])


def changed_records(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    text = (scene.after("longer table") / "runs/compare/results.jsonl").read_text()
    lines = [{k: v for k, v in json.loads(t).items() if k != CHECKSUM} for t in text.splitlines()]
    every = ((i, p, v) for i, line in enumerate(lines) for p in places(line) for v in VALUES)
    for i, place, value in shuffled(every, chance):
        words = f"results.jsonl, line {i + 1}: {'.'.join(map(str, place))} is {value!r:.40}"
        new = [*lines[:i], changed(lines[i], place, value), *lines[i + 1 :]]
        content = "".join(json.dumps(line) + "\n" for line in new)
        name = chance.choice(["report", "methods", "longer table"])
        yield Fault(name, words, partial(with_text, "runs/compare/results.jsonl", content))


def changed_states(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    """The settings and the log's line in a state, the mark, or a line of the log."""
    state = kept_state(scene)
    tensors, said = safetensors.torch.load_file(state), metadata(state)
    files = {name: json.loads(said[name]) for name in ("settings", "line")}
    every = ((n, p, v) for n, node in files.items() for p in places(node) for v in VALUES)
    for name, place, value in shuffled(every, chance):
        node = {k: v for k, v in changed(files[name], place, value).items() if k != CHECKSUM}
        new = {k: v for k, v in said.items() if k != CHECKSUM}
        new[name] = json.dumps(sealed(node) if name == "settings" else node)
        words = f"state's {name}: {'.'.join(map(str, place))} is {value!r:.40}"
        yield Fault("teacher", words, partial(with_state, tensors, new))


def kept_state(scene: Scene) -> Path:
    """A state as a killed training leaves it."""
    home = scene.folder / "stopped"
    if not home.exists():
        shutil.copytree(scene.before("teacher"), home)
        events = scene.events["teacher"]
        last = max(i for i, event in enumerate(events) if event.endswith("log.jsonl"))
        call("teacher", home, disturb.kill(last + 1))
    return home / "runs/teacher/state/state.safetensors"


def with_state(tensors: dict, said: dict, scene: Scene, name: str, home: Path) -> str:
    shutil.copytree(scene.folder / "stopped", home, dirs_exist_ok=True)
    save_tensors(home / "runs/teacher/state/state.safetensors", tensors, said)
    return call(name, home).fault


def with_text(where: str, content: str, scene: Scene, name: str, home: Path) -> str:
    (home / where).write_text(content)
    return call(name, home).fault


def weights_sha256(tensors: dict[str, torch.Tensor]) -> str:
    from diffusion import checkpoint

    return checkpoint.weights_sha256(tensors)


CLASSES: dict[str, Callable[[Scene, random.Random], Iterator[Fault]]] = {
    "killed before a write": at_events(lambda n, _: disturb.kill(n)),
    "killed in a write": at_events(lambda n, chance: disturb.cut(n, chance.randrange(9000), True)),
    "asked to stop": at_events(
        lambda n, chance: disturb.kill(n, chance.choice([signal.SIGTERM, signal.SIGINT]))
    ),
    "no space": at_events(lambda n, _: disturb.refuse(n, errno.ENOSPC)),
    "broken disk": at_events(lambda n, _: disturb.refuse(n, errno.EIO)),
    "read-only disk": at_events(lambda n, _: disturb.refuse(n, errno.EROFS)),
    "file too large": at_events(
        lambda n, chance: disturb.cut(n, chance.randrange(9000), deadly=False)
    ),
    "full disk": full_disks,
    "folder deleted": folders_deleted,
    "damaged file": flipped_bytes,
    "two at once": two_at_once,
    "two of other settings": two_of_other_settings,
    "out of memory": short_of_memory,
    "changed card": changed_cards,
    "changed record": changed_records,
    "changed state": changed_states,
}


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
