"""A GPU, tried and timed in one command: `python -m benchmarks.gpu [--minutes 8]`.

Its stages (benchmarks.gpu_stages) check every CUDA path against the CPU's result, within bounds,
and time each part of the speed on and off, the peer's loop beside ours, and 50,000 images to a Fréchet
distance. Each stage runs in a process of its own, for its share of the minutes. gpu.json is written
after every figure, gpu.md after every stage; a stage that is done there is skipped.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Literal

import torch
import tyro

from benchmarks import gpu_stages
from benchmarks.gpu_stages import STAGES, Job
from diffusion.checkpoint import require_folder, write_atomic
from diffusion.console import Interrupted, UserError, at_least, run, say
from diffusion.machine import this_device
from eval.measure import machine

LEAST = 10.0  # seconds that a stage in a process of its own cannot do without


@dataclass(frozen=True)
class Options:
    """Check every CUDA path against the CPU, and time what each part of the speed is worth."""

    minutes: float = 8.0
    """Minutes for all stages together. The page says what they left out for lack of time, and the
    same command goes on with it."""
    out: Path | None = None
    """The folder for gpu.json and gpu.md. If left out: results/gpu, or with --cpu runs/gpu-cpu."""
    stages: tuple[str, ...] = ()
    """The stages to run, of numbers, network, training, frechet, distances, sampling-switches,
    images, peer, training-switches and line. If left out: all of them."""
    shape: Literal["digits", "fashion-mnist", "cifar10"] = "fashion-mnist"
    """The data whose preset the network has. The images themselves are made up, of the same
    shape."""
    batch_size: int = 256
    """Images of a training step and of a sampler's call, each."""
    inception: Path | None = None
    """The file of clean-fid's weights. If left out: a network of its shape that was never
    trained."""
    cpu: bool = False
    """Run the same stages on the CPU, tiny: it tries this command itself and times nothing of
    use."""


def start(options: Options, path: Path) -> dict:
    """What gpu.json holds already, or a new one. UserError where it is of another machine."""
    kind = "tiny" if options.cpu else options.shape
    settings = {"shape": kind, "batch_size": options.batch_size}
    settings |= machine.environment(this_device(), "fp32" if options.cpu else "bf16", True)
    if this_device().type == "cuda":
        made = torch.cuda.get_device_properties(this_device())
        settings |= {
            "gib": round(made.total_memory / 2**30),
            "capability": [made.major, made.minor],
        }
    if not path.exists():
        return {"settings": settings, "conditions": machine.conditions(this_device()), "stages": {}}
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before["settings"].get(name) != value:
            raise UserError(
                f"{path} holds results with another {name} ({before['settings'].get(name)}, now "
                f"{value}): give another --out, or delete it"
            )
    return before


def perform(job: Job, alone: bool) -> str:
    """Run the stage, alone in a process of its own; why it failed, or "" where it did not.

    In a process of its own a fault of CUDA's, which spoils the process, is that stage's alone, and
    a stage that goes on after its time is ended.
    """
    if not alone:
        try:
            gpu_stages.main(job)
        except Interrupted:
            raise
        except Exception as error:  # whatever fails is a result, and the others go on
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return ""
    with TemporaryFile("w+") as errors, TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.gpu_stages", json.dumps(asdict(job))]
        surroundings = os.environ | {"FEWSTEP_CACHE": cache}  # features of made-up images
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=surroundings,
            start_new_session=True,
        )
        try:
            code = process.wait(job.seconds)
        except subprocess.TimeoutExpired:
            return ""  # its sheet says that it was cut short
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its compilers, too
                process.wait()
        errors.seek(0)
        lines = [text.strip() for text in errors if text.strip()] or [f"exit code {code}"]
        return lines[-1] if code else ""


def failures(whole: dict) -> list[str]:
    """Checks beyond their bounds, and stages that came to no end of their own."""
    failed = []
    for name, stage in whole["stages"].items():
        if stage["state"].startswith("failed"):
            failed.append(f"{name}: {stage['state']}")
        for check in stage["tables"].get("checks", []):
            if not check["ok"]:
                figures = f"{check['measured']:.2g} is beyond {check['bound']:g}"
                failed.append(f"{name}: {check['what']}: {figures}")
    return failed


def text(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/")


def table(rows: list[dict]) -> str:
    heads = list(dict.fromkeys(name for row in rows for name in row))
    lines = [heads, ["---"] * len(heads)]
    lines += [[text(row.get(head)) for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TITLES = {
    "checks": "Checks: what must agree with the CPU's result, or with itself",
    "switches": "Switches: images/s with a part of the speed on, and with that part alone off",
    "images per second": "Images/s with all of these on",
    "peer": "The peer: images/s of diffusers and accelerate beside ours",
    "images": "Many images through the harness, to a Fréchet distance",
    "seconds": "Seconds",
    "left out": "Left out, and why",
}


def page(whole: dict) -> str:
    """All in Markdown."""
    stages, failed = whole["stages"], failures(whole)
    verdict = [f"- {words}" for words in failed] or [
        "Every check that was made lies within its bound."
    ]
    pieces = [
        "# A GPU, tried and timed",
        f"Made by `{whole['command']}`, {whole['conditions']['date']}.",
    ]
    pieces += ["\n".join(verdict), "## The machine"]
    machine_rows = [*whole["settings"].items(), *whole["conditions"].items()]
    pieces.append(table([{"": name, "value": value} for name, value in machine_rows]))
    for name, title in TITLES.items():
        rows = [
            {"stage": stage, **row}
            for stage, sheet in stages.items()
            for row in sheet["tables"].get(name, [])
        ]
        if rows:
            pieces += [f"## {title}", table(rows)]
    blank = {"seconds": None, "state": "left out for lack of time, or not asked for"}
    minutes = []
    for name in STAGES:
        stage = stages.get(name, blank)
        spent = stage["seconds"] and stage["seconds"] / 60
        minutes.append({"stage": name, "minutes": spent, "state": stage["state"]})
    return "\n\n".join([*pieces, "## Minutes of each stage", table(minutes)]) + "\n"


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.gpu")
    at_least(1, options, "batch_size")
    if not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes must be above 0, got {options.minutes:g}")
    if unknown := [name for name in options.stages if name not in STAGES]:
        raise UserError(f"--stages are of {', '.join(STAGES)}, got {unknown[0]}")
    if options.cpu == torch.cuda.is_available():
        raise UserError(
            "--cpu is for machines without a GPU: leave it out, or hide it by CUDA_VISIBLE_DEVICES="
            if options.cpu
            else "torch finds no GPU here: --cpu runs the same stages, tiny, on the CPU"
        )
    out = options.out or Path("runs/gpu-cpu" if options.cpu else "results/gpu")
    require_folder(out)
    path, deadline = out / "gpu.json", time.monotonic() + 60 * options.minutes
    whole = start(options, path)
    whole["command"] = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    write_atomic(path, json.dumps(whole, indent=1))
    left = {
        name: share for name, (_, share) in STAGES.items() if name in (options.stages or STAGES)
    }
    for name in list(left):
        share = left.pop(name)
        seconds = (deadline - time.monotonic()) * share / (share + sum(left.values()))
        if whole["stages"].get(name, {}).get("state") == "done":
            say(f"{name}: done before; delete it from {path} to do it again")
        elif seconds < (0 if options.cpu else LEAST):
            say(f"{name}: left out for lack of time")
        else:
            inception = str(options.inception) if options.inception else None
            size = 16 if options.cpu else options.batch_size
            job = Job(name, str(path), seconds, options.shape, size, options.cpu, inception)
            begun = time.monotonic()
            reason = perform(job, alone=not options.cpu)
            whole = json.loads(path.read_text())
            if reason or name not in whole["stages"]:
                blank = {"seconds": time.monotonic() - begun, "tables": {}}
                state = f"failed: {reason}" if reason else "cut short before its first figure"
                whole["stages"][name] = whole["stages"].get(name, blank) | {"state": state}
                write_atomic(path, json.dumps(whole, indent=1))
            sheet = whole["stages"][name]
            say(f"{name}: {sheet['state']}, {sheet['seconds']:.0f} s")
        write_atomic(out / "gpu.md", page(whole))
    for words in (failed := failures(whole)):
        say(f"not within its bound: {words}")
    say(f"{path}, {out / 'gpu.md'}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
