"""What a user sees: progress, plain lines, and one line for a mistake."""

import errno
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False, soft_wrap=True)
T = TypeVar("T")
Limits = Mapping[str, tuple[str, Callable[[Any], bool]]]  # an option -> its limit in words, a test
_output, _quiet = out, False


class UserError(Exception):
    """A user's mistake. The message names what was expected, what came, and the mend."""


def at_least(least: int, options: object, *names: str) -> None:
    """UserError for an option of these names, a number or several, that is below it."""

    def holds(value: Any) -> bool:
        return min(value if isinstance(value, tuple) else (value,), default=least) >= least

    check_limits(options, dict.fromkeys(names, (f"at least {least}", holds)))


def check_limits(options: object, limits: Limits) -> None:
    """UserError for an option outside its limit."""
    for name, (words, holds) in limits.items():
        value = getattr(options, name)
        if not holds(value):
            several = value if isinstance(value, tuple) else (value,)
            got = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in several)
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be {words}, got {got or 'none'}")


def check_arguments(arguments: Sequence[str]) -> None:
    """UserError for an empty one: as a path it would be the current folder."""
    for before, argument in pairwise(["", *arguments]):
        empty = argument == "" or (argument.startswith("--") and argument.endswith("="))
        if empty:
            flag = argument.rstrip("=") or (before if before.startswith("--") else "an argument")
            raise UserError(f"{flag} is empty: expected a value; is a variable of the shell unset?")


class Interrupted(Exception):
    """A signal asked for a stop, and all that was done is on disk."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def silence() -> None:
    """Print nothing from now on but errors: for all processes but the first."""
    global _quiet
    _quiet = True


@contextmanager
def diverted(where: bool = True) -> Generator[None]:
    """Progress and plain lines go to stderr meanwhile: stdout is a file's content."""
    global _output
    before, _output = _output, err if where else _output
    try:
        yield
    finally:
        _output = before


def say(line: str) -> None:
    if not _quiet:
        _output.print(line, markup=False)


def run(main: Callable[[], None]) -> None:
    """Call main. A user's mistake, or a full or locked disk, is one line and exit code 2."""
    environmental = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
    environmental |= {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}
    try:
        check_arguments(sys.argv[1:])
        main()
    except UserError as error:
        _fail(str(error), 2)
    except Interrupted as stop:
        _fail(str(stop), 128 + stop.signal)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if error.errno not in environmental:
            raise
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror}{where}", 2)


def _fail(message: str, code: int) -> None:
    err.print(f"error: {message}" if code == 2 else message, markup=False)
    sys.exit(code)


Describe = Callable[[T], tuple[int, int, str]]  # item -> (done, total, what to say of it)


def track(items: Iterable[T], title: str, describe: Describe[T]) -> Iterator[T]:
    """Pass items on and show how far they are: a bar in a terminal, else a line now and then."""
    if _quiet:
        yield from items
    elif _output.is_terminal:
        yield from _bar(items, title, describe)
    else:
        yield from _lines(items, title, describe)


def _bar(items: Iterable[T], title: str, describe: Describe[T]) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}", markup=False),  # a run's [name] is no markup
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[words]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_output) as bar:
        task = bar.add_task(title, words="", total=None)
        for item in items:
            done, total, words = describe(item)
            bar.update(task, completed=done, total=total, words=words)
            yield item


def _lines(
    items: Iterable[T], title: str, describe: Describe[T], every: float = 10.0
) -> Iterator[T]:
    start = said = time.monotonic()
    first, begun = None, start
    for item in items:
        done, total, words = describe(item)
        now = time.monotonic()
        if first is None:
            first, begun = done, now  # a resumed run begins late: pace is from here on
        if now - said > every or done == total:
            left = ""
            if first < done < total:
                left = f", {(now - begun) / (done - first) * (total - done):.0f} s left"
            say(f"{title}  {done}/{total}  {words}, {now - start:.0f} s{left}")
            said = now
        yield item
