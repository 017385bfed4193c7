"""The classes of faults that benchmarks.faults tries, each a function that yields one by one."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import safetensors.torch

from benchmarks import disturb
from benchmarks.changes import FREE, VALUES, changed, places
from benchmarks.disturb import Disturbance, end
from benchmarks.scene import (
    COMMANDS,
    FIT,
    Fault,
    Scene,
    begin,
    call,
    cycle_shuffled,
    differences,
    figures,
    goes_on,
    interrupted,
    lost,
    shuffled,
)
from diffusion.checkpoint import weights_sha256
from diffusion.console import say
from diffusion.files import CHECKSUM, LOCK, metadata, save_tensors, sealed
from diffusion.folders import MARK

SHOWN = {".png", ".md", ".html", ".csv", ".tex"}  # nobody's input


def at_events(make: Callable[[int, random.Random], Disturbance]) -> Callable:
    """The class of faults that disturb each command at each of its events."""

    def faults(scene: Scene, chance: random.Random) -> Iterator[Fault]:
        pairs = [(name, n) for name in COMMANDS for n in range(len(scene.events[name]))]
        for name, n in shuffled(pairs, chance):
            happen = partial(interrupted, make(n + 1, chance))
            yield Fault(name, f"before event {n + 1}, {scene.events[name][n]}", happen)

    return faults


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
