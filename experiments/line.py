"""A whole comparison by one command, from data to report: `python -m experiments.line digits`.

A line is a teacher, its students by several methods, and their comparison. Each part is a command
that a user could type. What is done is skipped, and what was stopped goes on.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from diffusion.console import Interrupted, UserError, at_least, run, say
from diffusion.files import read_json, write_json
from diffusion.folders import check_claim, check_home, claim
from experiments.lines import LINES, Line

LOG_LOCK = threading.Lock()
RUNNING: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Options:
    """Run a whole comparison: a teacher, students of it by several methods, the tables and the
    page.

    experiments/lines.py has the comparisons by name. The same command resumes where it was
    stopped. commands.json beside the table lists every command and the minutes that it took.
    """

    line: tyro.conf.Positional[str]
    """Which comparison: digits, fashion-mnist-cpu, fashion-mnist-half, fashion-mnist-gpu or
    fashion-mnist-night."""
    out: Path | None = None
    """The folder for all of it. If left out: runs/LINE."""
    seeds: int = 0
    """How often each student is trained, by another seed each time. 0: as often as the line
    says."""
    jobs: int = 1
    """How many students train side by side, each on its share of the CPU's cores."""
    students: tuple[str, ...] = ()
    """The students to train, by name. If left out: all of the line's."""
    teacher: Path | None = None
    """A finished teacher's run to take. If left out: the line's teacher is trained."""


def python(command: str, *more: str) -> list[str]:
    return [sys.executable, "-m", *shlex.split(command), *more]


def out_of(command: list[str]) -> Path:
    """The folder that a student's command writes."""
    return Path(command[command.index("--out") + 1])


def students(line: Line, folder: Path, teacher: Path) -> list[list[list[str]]]:
    """One chain of commands for each seed and student; each starts from the one before it."""
    chains = []
    for seed in range(line.seeds):
        for name, commands in line.students.items():
            outs = [folder / "before" / f"{name}-{seed}-{i}" for i in range(len(commands) - 1)]
            outs.append(folder / f"{name}-{seed}")
            chain = []
            for i, (command, out) in enumerate(zip(commands, outs, strict=True)):
                more = ["--teacher", str(teacher), "--seed", str(seed), "--out", str(out)]
                start = ["--start", str(outs[i - 1])] if i else []
                chain.append(python(command, *more, *start))
            chains.append(chain)
    return chains


def call(command: list[str], log: Path, threads: int | None = None) -> None:
    """Run it, and add its minutes to those of its earlier starts. UserError where it fails."""
    typed = shlex.join(["python", *command[1:]])
    say(typed)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    begun, process = time.monotonic(), subprocess.Popen(command, env=environment)
    RUNNING.add(process)
    try:
        code = process.wait()
    except (KeyboardInterrupt, Interrupted):
        process.wait()  # the same signal reached it, and it saves
        raise
    finally:
        RUNNING.discard(process)
        with LOG_LOCK:
            minutes = read_json(log) if log.exists() else {}
            minutes[typed] = round(minutes.get(typed, 0) + (time.monotonic() - begun) / 60, 2)
            write_json(log, minutes, indent=1)
    if code:
        raise UserError(f"exit code {code} of: {typed}: the same experiments.line command resumes")


def call_each(chain: list[list[str]], log: Path, threads: int | None) -> None:
    for command in chain:
        call(command, log, threads)


def chosen_line(options: Options) -> Line:
    """The line that the options name, with their seeds and students. UserError for wrong ones."""
    if options.line not in LINES:
        raise UserError(f"no line {options.line!r}: expected one of {', '.join(LINES)}")
    at_least(1, options, "jobs")
    at_least(0, options, "seeds")
    line = LINES[options.line]
    if unknown := {*options.students} - line.students.keys():
        raise UserError(
            f"--students must be of {', '.join(line.students)}, got {', '.join(sorted(unknown))}"
        )
    names = options.students or line.students
    chosen = {name: line.students[name] for name in names}
    return replace(line, seeds=options.seeds or line.seeds, students=chosen)


def run_line(options: Options) -> None:
    """Train what is not trained yet, then compare and report.

    After the first student that fails no other begins; of the comparison, the methods' page and
    the report each is made, whichever fails. UserError names the first failure.
    """
    line = chosen_line(options)
    folder = options.out or Path("runs") / options.line
    compare, teacher = folder / "compare", options.teacher or folder / "teacher"
    log = compare / "commands.json"
    chains = students(line, folder, teacher)
    check_claim(compare, "comparison")
    outs = [out_of(command) for chain in chains for command in chain]
    for out in (folder, *outs, *([] if options.teacher else [teacher])):
        check_home(out)  # a run, or the runs of a chain
    claim(compare, "comparison")
    if not options.teacher:
        call(python(line.teacher, "--out", str(teacher)), log)
    threads = max(1, torch.get_num_threads() // options.jobs) if options.jobs > 1 else None
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(call_each, chain, log, threads) for chain in chains]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    runs = [str(teacher), *(str(out_of(chain[-1])) for chain in chains)]
    failures = []
    for command in (
        python(line.compare, *runs, "--out", str(compare)),
        python("eval.methods", str(compare / "results.jsonl")),
        python("eval.report", str(compare)),
    ):
        try:
            call(command, log)
        except UserError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def stop(number: int, _: object) -> None:
    """Pass a signal on that a terminal would have sent to all."""
    for process in [*RUNNING]:
        process.send_signal(number)
    raise Interrupted("stopped; the same command resumes", number)


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    signal.signal(signal.SIGTERM, stop)
    run_line(tyro.cli(Options, prog="python -m experiments.line", config=config))


if __name__ == "__main__":
    run(main)
