"""Disturbances of a command's writes: killed at one, refused at one, cut short in one.

A command runs in a forked child of a process that has loaded torch already. Python's audit events
tell of every file that is opened to be written, renamed or removed; an error raised there is the
operation's own. Limits of sizes, of memory and of a disk are the system's.
"""

import ctypes
import errno
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from diffusion import console, files

Act = Callable[[int, str, str], None]  # (number, kind, path) of an event
Disturbance = Callable[[Path], None]  # takes a home, in the child, before its command begins

KINDS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEEDS_SPACE = {"open", "os.mkdir", "fsync"}
ENDS = {0, 2, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGXFSZ}
SECONDS = 300  # after which a command hangs


class Ended(NamedTuple):
    """How a command ended: its exit code, negative for the signal that killed it, and its words."""

    code: int
    words: str

    @property
    def fault(self) -> str:
        """What no disturbance excuses: "" for an end as promised."""
        if self.code == -signal.SIGALRM:
            return f"hangs for {SECONDS} s"
        if "Traceback" in self.words or self.code not in ENDS:
            return f"ends with code {self.code}: {self.words[-1500:]}"
        if self.code == 2 and self.words.count("\nerror: ") + self.words.startswith("error: ") != 1:
            return f"ends in other than one line: {self.words[-1500:]}"
        return ""


def start(
    main: Callable[[], None], arguments: Iterable[str], home: Path, disturb: Disturbance | None
) -> tuple[int, int]:
    """Run a command in a child, in the folder `home`. Its process and the pipe of its words."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return pid, reader
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    code = 1
    try:
        os.chdir(home)
        files._parts.cache_clear()  # a command of its own has not looked at any folder yet
        for stream in (1, 2):
            os.dup2(writer, stream)
        sys.argv = ["command", *arguments]
        if disturb:
            disturb(home.resolve())
        console.run(main)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def end(pid: int, reader: int) -> Ended:
    with open(reader, "rb") as pipe:
        words = pipe.read().decode(errors="replace")
    return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), words)


def watch(home: Path, act: Act) -> None:
    """Call `act` before each event that changes a file in the home. For good, so in a child."""
    count, busy = 0, False

    def event(kind: str, path: Any) -> None:
        nonlocal count, busy
        if busy or not isinstance(path, str | bytes | os.PathLike):
            return
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith(f"{home}/"):
            return
        count, busy = count + 1, True
        try:
            act(count, kind, os.path.relpath(place, home))
        finally:
            busy = False

    def hear(name: str, arguments: tuple) -> None:
        if name in KINDS or (name == "open" and arguments[2] & WRITING):
            event(name, arguments[0])

    sync = os.fsync

    def fsync(file: int) -> None:
        event("fsync", os.readlink(f"/proc/self/fd/{file}"))
        sync(file)

    setattr(os, "fsync", fsync)  # noqa: B010
    sys.addaudithook(hear)


def at(number: int, do: Callable[[], None]) -> Disturbance:
    """The disturbance that does this before one event."""
    return lambda home: watch(home, lambda n, kind, path: do() if n == number else None)


def kill(number: int, sign: int = signal.SIGKILL) -> Disturbance:
    """Sends a signal: SIGKILL, or one that asks for a stop."""
    return at(number, lambda: os.kill(os.getpid(), sign))


def cut(number: int, size: int, deadly: bool) -> Disturbance:
    """No file may grow above `size` bytes from then on: a write is short, then fails or kills."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return at(number, limit)


def refuse(number: int, code: int) -> Disturbance:
    """The disk refuses one event, or all that need space, or all, from then on."""
    later = {errno.ENOSPC: NEEDS_SPACE, errno.EROFS: {*KINDS, *NEEDS_SPACE}}.get(code, set())

    def act(n: int, kind: str, path: str) -> None:
        if n == number or (n > number and kind in later):
            raise OSError(code, os.strerror(code), path)

    return lambda home: watch(home, act)


def delete(number: int, folder: str) -> Disturbance:
    """Someone deletes the folder that the command writes in."""
    return lambda home: watch(
        home, lambda n, *_: shutil.rmtree(home / folder, True) if n == number else None
    )


def little_memory(size: int) -> Disturbance:
    """The process may map so many bytes more than it has mapped."""

    def limit(home: Path) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + size
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    return limit


@contextmanager
def small_disk(home: Path) -> Any:
    """A disk of its own for a folder. Gives a function that sets its size, in KiB.

    OSError where the system lets nobody but an administrator mount one.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(home))

    namespace, user, private, remount = 0x20000, 0x10000000, 1 << 18 | 1 << 14, 32
    call("unshare", namespace | (user if os.getuid() else 0))
    call("mount", b"none", b"/", None, private, None)
    call("mount", b"none", bytes(home), b"tmpfs", 0, b"size=1g")
    try:
        yield lambda size: call(
            "mount", b"none", bytes(home), b"tmpfs", remount, b"size=%dk" % size
        )
    finally:
        with suppress(OSError):
            call("umount2", bytes(home), 2)
