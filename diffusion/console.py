"""What a user sees: progress, plain lines, and one line for a mistake."""

import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from diffusion import PARTS, ROOT

T = TypeVar("T")
Limits = Mapping[str, tuple[str, Callable[[Any], bool]]]  # an option -> its limit in words, a test
DEBUG = "--debug"  # with it, what escapes as an error of the system shows its traceback
ALLOCATION = re.compile(  # how torch, CUDA, oneDNN, threads and imports say that memory is short
    "out.?of.?memory|not enough memory|allocate memory|_ALLOC_FAILED|create a primitive"
    "|start new thread|failed to map segment",
    re.IGNORECASE,
)


class Output(Console):
    """Text that goes to a stream which may be closed, or be a terminal of few characters."""

    def on_broken_pipe(self) -> None:
        """Nobody reads on, as after `| head`: the work goes on unseen, and is not lost."""
        unheard(self.file)


def unheard(stream: IO[str]) -> None:
    """What is written to the stream from now on goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def printable(text: str) -> str:
    """The text with what is no character of a line written out: control codes, half characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(text: str) -> str:
    """A text from outside for a cell of rich: no control code, no markup."""
    return escape(printable(text))


for name in ("stdout", "stderr"):
    if getattr(sys, name) is None:  # closed by the caller
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  as long as the process
    with suppress(AttributeError):  # a test's own stream
        getattr(sys, name).reconfigure(errors="backslashreplace")  # such as an ASCII terminal's
out = Output(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
err = Output(stderr=True, highlight=False, soft_wrap=True)
_output, _quiet = out, False


class UserError(Exception):
    """A user's mistake. The message names what was expected, what came, and the mend."""


MOST = 10**9  # of anything that is counted, where nothing says less


def count(least: int, most: int = MOST) -> tuple[str, Callable[[Any], bool]]:
    """The limit of a number, or of several, from least to most; None, for one left out, is fine."""

    def holds(value: Any) -> bool:
        values = value if isinstance(value, tuple) else (value,)
        return all(each is None or least <= each <= most for each in values)

    return f"at least {least} and at most {most}", holds


def at_least(least: int, options: object, *names: str, most: int = MOST) -> None:
    """UserError for an option of these names, a number or several, that is below or above."""
    check_limits(options, dict.fromkeys(names, count(least, most)))


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


def warn_of_namesakes() -> None:
    """Say which files here `python -m` would run in place of the suite's own parts."""
    for part in () if sys.flags.safe_path else PARTS:
        for file in (Path(f"{part}.py"), Path(part, "__init__.py")):
            if file.exists() and file.resolve() != ROOT / file:
                err.print(
                    f"warning: {file} in this folder is run in place of fewstep's by `python -m "
                    f"{part}.…`: start commands in another folder, or as `python -P -m …`",
                    markup=False,
                )


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
        _output.print(printable(line), markup=False)


def present(table: Table) -> None:
    """Show a table, whose cells are plain already."""
    if not _quiet:
        _output.print(table)


def write(text: str) -> None:
    """A file's content to stdout, as it is."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        unheard(sys.stdout)


@contextmanager
def doing(work: str, standing: str | Callable[[], str] = "nothing was written") -> Generator[None]:
    """An error that ends this is told by what was being done, and by where the work then stands."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        words = standing if isinstance(standing, str) else standing()
        error.add_note(f"{work}: {words}")
        raise


def run(main: Callable[[], None]) -> None:
    """Call main. A user's mistake, or an error of the system, is one line and exit code 2."""
    debug = DEBUG in sys.argv[1:]
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word != DEBUG)]
    try:
        check_arguments(sys.argv[1:])
        warn_of_namesakes()
        main()
    except UserError as error:
        _fail(str(error), 2)
    except Interrupted as stop:
        _fail(str(stop), 128 + stop.signal)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        unheard(sys.stdout)
        sys.exit(0)
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        words = system_error(error)
        if debug or not words:
            raise
        _fail(f"{words} ({DEBUG} shows where)", 2)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # such as `--help | head`
            unheard(sys.stdout)


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; the CPU's allocator and CUDA's libraries have no type for it."""
    words = f"{type(error).__name__}: {error}"  # OutOfMemoryError may say no more
    return isinstance(error, MemoryError) or bool(ALLOCATION.search(words))


def system_error(error: Exception) -> str:
    """What the system refused, and by `doing` what was being done; "" for a fault of the code."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        words = f"{reason}: {error.filename}" if error.filename else reason
    elif out_of_memory(error):
        words = "out of memory: give a lower --batch-size or number"
    else:
        return ""
    return "; ".join([words.splitlines()[0], *getattr(error, "__notes__", [])])


def _fail(message: str, code: int) -> None:
    text = printable(message)
    err.print(f"error: {text}" if code == 2 else text, markup=False)
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
        task = bar.add_task(printable(title), words="", total=None)
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
