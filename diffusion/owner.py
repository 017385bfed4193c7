"""One owner at a time: of a folder that a command writes in, of a cache's file while it is made."""

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch import Tensor

from diffusion.console import UserError, say
from diffusion.files import LOCK, NO_LOCKS, Damaged, Unwritable, held, load_tensors, save_tensors


@contextmanager
def owned(folder: Path) -> Generator[None]:
    """Meanwhile no other command writes in the folder. UserError names the one that does.

    The processes of one launch share their first one's lock.
    """
    new = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    lock, problem = None, ""
    if PartialState().is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _take(folder / LOCK)
        except Timeout:
            problem = (
                f"{folder} is in use by {_holder(folder / LOCK)}: wait for it, or give "
                "another --out"
            )
        except OSError as error:
            problem = f"{folder} cannot be written in ({error.strerror}): give another --out"
    (problem,) = broadcast_object_list([problem])
    if problem:
        raise UserError(problem)
    real = folder.resolve()
    if lock:
        held.add(real)
    try:
        yield
    finally:
        held.discard(real)
        _give_back(lock)
        if PartialState().is_main_process:
            with suppress(OSError):  # not empty: more than the lock was made there
                for path in new:
                    path.rmdir()


def cached(
    path: Path, make: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file of the cache; made, and kept there, if it has none.

    One process makes them, and others wait. A damaged file is made anew. A cache that cannot be
    written is said before the work, and what is made is not kept.
    """
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        return _whole(path)
    with alone(path) as writable:
        with suppress(FileNotFoundError, NotADirectoryError):
            return _whole(path)  # another has made it
        tensors, metadata = make()
        if writable:
            try:
                save_tensors(path, tensors, metadata)
            except Unwritable as error:
                _say_unwritable(path, str(error))
        return tensors, metadata


@contextmanager
def alone(path: Path) -> Generator[bool]:
    """Meanwhile no other process makes this file of the cache: others wait. False, and a line that
    says so, where it cannot be written."""
    lock_path, lock = path.with_name(f".{path.name}.lock"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = _take(lock_path)
        except Timeout:
            say(f"waiting for {_holder(lock_path)}, which makes {path}")
            lock = _take(lock_path, timeout=-1)
    except OSError as error:
        _say_unwritable(path, error.strerror or str(error))
        yield False
        return
    try:
        yield True
    finally:
        _give_back(lock)


def _whole(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As load_tensors; a damaged file is deleted, as if there were none."""
    try:
        return load_tensors(path)
    except Damaged as error:
        say(f"{error}: it is made anew")
        with suppress(OSError):
            path.unlink()
        raise FileNotFoundError(path) from error


def _say_unwritable(path: Path, reason: str) -> None:
    say(
        f"the cache {path.parent} cannot be written ({reason}): what is made is not kept, and is "
        "made anew each time; FEWSTEP_CACHE names another place"
    )


def _take(path: Path, timeout: float = 0) -> FileLock | None:
    """The lock of that file, none on a file system without locks. Timeout where another has it.

    The system frees a dead process's lock.
    """
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        path.unlink(missing_ok=True)
        _say_without_locks()
        return None
    command = shlex.join(sys.orig_argv)[:200]
    with suppress(OSError):  # a full disk
        path.write_text(json.dumps([os.getpid(), socket.gethostname(), command]))
    return lock


def _give_back(lock: FileLock | None) -> None:
    if lock:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@cache
def _say_without_locks() -> None:
    say("this file system has no locks: let no two commands write in one folder at a time")


def _holder(path: Path) -> str:
    """Who holds the lock, as it wrote itself."""
    try:
        pid, host, command = json.loads(path.read_text())
        words = f"process {pid} on {host} ({command})"
    except (OSError, ValueError, TypeError):
        return "another command"
    return "".join(c if c.isprintable() else "?" for c in words)
