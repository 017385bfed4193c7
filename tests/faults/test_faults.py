"""Faults of every command: killed at its writes, a bit flipped in what it left, two at once.

Whatever happens, the same command given again ends with the same numbers, or in one line that names
the file. FAULTS=1 tries every write and more places of every file, not a few of each.
"""

import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion import checkpoint
from diffusion import training as loops
from diffusion.console import UserError
from diffusion.files import LOCK
from diffusion.owner import owned
from distill import progressive
from eval import compare
from students import generate

ALL = bool(os.environ.get("FAULTS"))
WRITES = 1 if ALL else 4  # every so many of a command's writes is a place to be killed at
PLACES = 40 if ALL else 4  # bits to flip in each file
CACHE = Path(os.environ["FEWSTEP_CACHE"])


@pytest.fixture(scope="module")
def commands(teacher, quick, train_tiny) -> dict[str, Callable[[Path], object]]:
    """By name, a command that works in a folder: the numbers that it ends with."""
    brief = replace(quick, iterations=10, save_every=0.0)

    def train(home: Path) -> list[str]:
        return [checkpoint.load(train_tiny(home / "teacher", brief))[2]]

    def raw(home: Path) -> list[str]:
        options = progressive.Options(
            teacher=teacher,
            out=home / "progressive",
            start_steps=8,
            rounds=(4, 2),
            last_rounds=1.0,
            next_teacher="raw",
            fit=brief,
        )
        return [model.sha256 for model in progressive.distill(options)]

    def table(home: Path) -> list[list[float]]:
        options = compare.Options(
            runs=(teacher,),
            out=home / "compare",
            steps="1,2",
            solvers=("ddim",),
            num_images=100,
            features="random",
            precision="fp32",
            likelihood=0,
            times=False,
            long=False,
            seeds=(0, 1),
        )
        return [record.quality for record in compare.compare(options)]

    def pictures(home: Path) -> list[bytes]:
        options = generate.Options(teacher, out=home / "pictures", num=3)
        model = generate.load(teacher)
        generate.write_folder(options.out, model, options)
        return [path.read_bytes() for path in sorted((home / "pictures").glob("*.png"))]

    return {"train": train, "progressive raw": raw, "compare": table, "generate": pictures}


NAMES = ("train", "progressive raw", "compare", "generate")


def in_child(call: Callable[[], object], seconds: int = 120) -> int:
    """Call it in a forked process: its exit status, negative for the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            call()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_writes(act: Callable[[int], None]) -> None:
    """Call `act` before each rename and each sync of a file, with its number."""
    count = 0

    def watched(real: Callable) -> Callable:
        def event(*arguments):
            nonlocal count
            count += 1
            act(count)
            return real(*arguments)

        return event

    os.replace, os.fsync = watched(os.replace), watched(os.fsync)


def killed_at(number: int, call: Callable[[], object]) -> int:
    def act(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        at_writes(act)
        call()

    return in_child(killed)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_killed_at_a_write_ends_as_if_it_were_not(commands, name, tmp_path):
    call = commands[name]
    expected, number = call(tmp_path / "whole"), 1
    while killed_at(number, lambda: call(tmp_path / f"{number}")) == -signal.SIGKILL:  # noqa: B023
        home = tmp_path / f"{number}"
        assert call(home) == expected, number
        assert not [*home.rglob("*.part"), *home.rglob(LOCK)], number
        number += WRITES
    assert number > WRITES


def flips(whole: bytes, random: random.Random):
    """The content with a bit flipped at a few places in turn, the first and last among them."""
    places = {0, len(whole) - 1, *(random.randrange(len(whole)) for _ in range(PLACES))}
    for place in sorted(places):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << random.randrange(8)
        yield bytes(flipped)


def outcome(call: Callable[[], object]) -> tuple[object, str]:
    try:
        return call(), ""
    except UserError as error:
        return None, str(error)


def contents(home: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


def restore(home: Path, before: dict[Path, bytes]) -> None:
    for path in [path for path in home.rglob("*") if path.is_file() and path not in before]:
        path.unlink()
    for path, content in before.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def stopped(monkeypatch, call: Callable[[], object]) -> None:
    """The command, stopped at its second save, or at its last batch of images."""
    saves, save, see = [], loops._save, compare.Judge.see

    def stop(value: object) -> object:
        saves.append(1)
        if len(saves) > 1:
            raise KeyboardInterrupt
        return value

    with monkeypatch.context() as patch:
        patch.setattr(loops, "_save", lambda *arguments: stop(save(*arguments)))
        patch.setattr(compare.Judge, "see", lambda *arguments: stop(see(*arguments)))
        patch.setattr("eval.measure.stream.SAVE_EVERY", -1.0)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.parametrize("state", ["finished", "stopped"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bit_flipped_in_any_file_changes_no_number_without_a_word(
    commands, name, state, tmp_path, monkeypatch, capsys
):
    if (name, state) == ("generate", "stopped"):
        pytest.skip("it keeps nothing of a call that was stopped")
    chance = random.Random(name + state)
    home, call = tmp_path / "home", commands[name]
    expected = call(tmp_path / "whole")
    if state == "finished":
        call(home)
    else:
        stopped(monkeypatch, lambda: call(home))
    kept = contents(home)
    cache = contents(CACHE) if name == "compare" else {}
    for path, whole in (kept | cache).items():
        if not whole:
            continue
        for content in flips(whole, chance):
            restore(home, kept)
            path.write_bytes(content)
            numbers, problem = outcome(lambda: call(home))
            if problem:
                assert problem.count("\n") == 0
                assert str(home) in problem, problem
            else:
                assert numbers == expected, path
    for path, content in cache.items():
        path.write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_finds_its_folder_in_use_says_by_whom(commands, name, tmp_path):
    folders = {
        "train": "teacher",
        "progressive raw": "progressive/0004",
        "compare": "compare",
        "generate": "pictures",
    }
    with owned(tmp_path / folders[name]):
        _, problem = outcome(lambda: commands[name](tmp_path))
        assert f"in use by process {os.getpid()}" in problem
        assert [path.name for path in (tmp_path / folders[name]).iterdir()] == [LOCK]
