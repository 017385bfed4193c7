"""A GPU, tried and timed in one command: `python -m benchmarks.gpu [--minutes 8]`.

Its stages (benchmarks.gpu_stages) check every CUDA path against the CPU's result, within bounds,
and time each part of the speed on and off, the peer's loop beside ours, and 50,000 images to a
Fréchet distance. Each stage runs in a process of its own, for its share of the minutes. gpu.json is
written after every figure, gpu.md after every stage; a stage that is done there is skipped.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro

from benchmarks import gpu_stages
from benchmarks.gpu_stages import STAGES
from diffusion.console import UserError, at_least, run, say
from diffusion.files import require_folder, write_atomic
from diffusion.machine import this_device
from eval.measure import machine

LEAST = 10.0  # seconds that a stage in a process of its own cannot do without
TITLES = {
    "checks": "Checks: what must agree with the CPU's result, or with itself",
    "times": "Images/s, and how many times as many as the first of the same title: the median, and "
    "its 95 % interval or, of fewer than 6 rounds, the least and the greatest",
    "images": "Many images through the harness, to a Fréchet distance",
    "left out": "Left out, and why",
}


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
    """The file of clean-fid's weights. If left out: a small network that was never trained."""
    cpu: bool = False
    """Run the same stages on the CPU, tiny: it tries this command itself and times nothing of
    use."""


def check(options: Options) -> None:
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


def start(options: Options, path: Path) -> dict:
    """The content of gpu.json, or a new one's. UserError where it is of another machine."""
    device = this_device()
    settings: dict[str, Any] = {
        "shape": "tiny" if options.cpu else options.shape,
        "batch_size": 16 if options.cpu else options.batch_size,
        "inception": str(options.inception) if options.inception else None,
        **machine.environment(device, "fp32" if options.cpu else "bf16", True),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        settings["gib"] = round(properties.total_memory / 2**30)
        settings["capability"] = [properties.major, properties.minor]
    if not path.exists():
        return {"settings": settings, "conditions": machine.conditions(device), "stages": {}}
    whole = json.loads(path.read_text())
    for name, value in settings.items():
        if whole["settings"].get(name) != value:
            raise UserError(
                f"{path} holds results with another {name} ({whole['settings'].get(name)}, now "
                f"{value}): give another --out, or delete it"
            )
    return whole


def perform(stage: str, path: Path, seconds: float) -> int:
    """Run the stage in a process of its own, for so many seconds at most; the exit code.

    So a fault of CUDA's, which spoils the process, is that stage's alone.
    """
    with TemporaryDirectory() as cache:  # for features of made-up images
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_stages", stage, str(path)],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"FEWSTEP_CACHE": cache},
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return 0  # its sheet says that it was cut short
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its compilers, too
                process.wait()


def run_stage(name: str, path: Path, seconds: float, alone: bool) -> dict:
    """All results, with this stage's as far as it came. alone: in a process of its own."""
    code = perform(name, path, seconds) if alone else gpu_stages.main(name, path)
    whole = json.loads(path.read_text())
    begun = {"state": "cut short before its first figure", "seconds": 0.0, "tables": {}}
    stage = whole["stages"].setdefault(name, begun)
    if code:
        stage["state"] = f"failed: exit code {code}"
    write_atomic(path, json.dumps(whole, indent=1))
    say(f"{name}: {stage['state']}, {stage['seconds']:.0f} s")
    return whole


def failures(whole: dict) -> list[str]:
    """Checks beyond their bounds, and stages that failed."""
    failed = []
    for name, stage in whole["stages"].items():
        if stage["state"].startswith("failed"):
            failed.append(f"{name}: {stage['state']}")
        for row in stage["tables"].get("checks", []):
            if not row["ok"]:
                figures = f"{row['measured']:.2g} is beyond {row['bound']:g}"
                failed.append(f"{name}: {row['what']}: {figures}")
    return failed


def cell(value: object) -> str:
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
    lines += [[cell(row.get(head)) for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(whole: dict) -> str:
    """All results, in Markdown."""
    verdict = [f"- {words}" for words in failures(whole)]
    settings = {**whole["settings"], **whole["conditions"]}
    tables = {"The machine": [{"": name, "value": value} for name, value in settings.items()]}
    for name, title in TITLES.items():
        tables[title] = [
            {"stage": stage, **row}
            for stage, sheet in whole["stages"].items()
            for row in sheet["tables"].get(name, [])
        ]
    absent = {"seconds": None, "state": "left out for lack of time, or not asked for"}
    tables["Seconds of each stage"] = [
        {"stage": name} | {head: whole["stages"].get(name, absent)[head] for head in absent}
        for name in STAGES
    ]
    pieces = [
        "# A GPU, tried and timed",
        f"Made by `{whole['command']}`, {whole['conditions']['date']}.",
        "\n".join(verdict or ["Every check that was made lies within its bound."]),
        *(f"## {title}\n\n{table(rows)}" for title, rows in tables.items() if rows),
    ]
    return "\n\n".join(pieces) + "\n"


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.gpu")
    check(options)
    out = options.out or Path("runs/gpu-cpu" if options.cpu else "results/gpu")
    require_folder(out)
    path, deadline = out / "gpu.json", time.monotonic() + 60 * options.minutes
    whole = start(options, path)
    whole["command"] = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    write_atomic(path, json.dumps(whole, indent=1))
    names = [name for name in STAGES if name in (options.stages or STAGES)]
    for i, name in enumerate(names):
        share, *others = (STAGES[each][0] for each in names[i:])
        seconds = (deadline - time.monotonic()) * share / (share + sum(others))
        if whole["stages"].get(name, {}).get("state") == "done":
            say(f"{name}: done before; delete it from {path} to do it again")
        elif seconds < (0 if options.cpu else LEAST):
            say(f"{name}: left out for lack of time")
        else:
            whole = run_stage(name, path, seconds, alone=not options.cpu)
        write_atomic(out / "gpu.md", page(whole))
    failed = failures(whole)
    for words in failed:
        say(f"not within its bound: {words}")
    say(f"{path}, {out / 'gpu.md'}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
