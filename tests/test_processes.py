"""Two processes train what one trains, with half of each batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion import checkpoint
from distill import consistency, progressive
from teachers import ddpm

ROOT = Path(__file__).parents[1]
FIT = "--iterations 12 --batch-size 16 --warmup 4 --precision fp32 --log-every 1"
NET = "--width 8 --multipliers 1 --blocks 1 --attention --dropout 0"
COMMANDS = {
    "teachers.ddpm": (ddpm.main, f"{NET} {FIT}"),
    "distill.progressive": (
        progressive.main,
        f"--teacher RUNS/teacher --start-steps 4 --end-steps 2 --last-rounds 1 {FIT}",
    ),
    "distill.consistency": (
        consistency.main,
        f"--teacher RUNS/teacher --num-angles 4 --target-ema 0.9 {FIT}",
    ),
}
SCRIPT = """
import runpy, sys
for line in open(sys.argv[1]).read().splitlines():
    module, *sys.argv[1:] = line.split()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def arguments(module: str, runs: str) -> list[str]:
    """Students start from the teacher that one process trained, in both cases."""
    name = module.split(".")[1]
    return [*COMMANDS[module][1].replace("RUNS", "one").split(), "--out", f"{runs}/{name}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two_processes(folder) -> None:
    """One launch for all three commands: each would start the same three processes anew."""
