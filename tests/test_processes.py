"""Two processes train what one trains, each with half of every batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion import checkpoint

ROOT = Path(__file__).parents[1]
FIT = "--iterations 12 --batch-size 16 --warmup 4 --precision fp32 --log-every 1"
NET = "--width 8 --multipliers 1 --blocks 1 --attention --dropout 0"
HALVING = "--start-steps 4 --end-steps 2 --last-rounds 1"
# A run, and what trains it; students of one process and of two have the same teacher.
RUNS = {
    "teacher": f"teachers.ddpm {NET} {FIT}",
    "progressive/0002": f"distill.progressive --teacher one/teacher {HALVING} {FIT}",
    "consistency": f"distill.consistency --teacher one/teacher --num-angles 4 {FIT}",
}
# All in one launch: most of a launch's time is its imports.
SCRIPT = f"""
import runpy, sys
home = sys.argv[1]
for run, command in {RUNS!r}.items():
    module, *arguments = command.split()
    sys.argv[1:] = [*arguments, "--out", home + "/" + run.split("/")[0]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
from accelerate import PartialState
print("processes:", PartialState().num_processes)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with all runs by one process in one/, by two processes in two/."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    alone = [sys.executable]
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for launcher, home, count in ((alone, "one", 1), (both, "two", 2)):
        process = subprocess.run(
            [*launcher, "script.py", home],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.count(f"processes: {count}\n") == count
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_what_one_trains(runs, run):
    logs = []
    for home in ("one", "two"):
        text = (runs / home / run / "log.jsonl").read_text()
        logs.append([json.loads(line) for line in text.splitlines()])
    for name in ("iteration", "loss", "gradient_norm", "learning_rate"):
        alone, both = ([line[name] for line in log] for log in logs)
        assert len(alone) == 12
        assert both == pytest.approx(alone, rel=1e-4)
    alone, both = (checkpoint.load(runs / home / run)[0] for home in ("one", "two"))
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-4)  # weights have moved by 1e-2


@pytest.mark.parametrize("run", RUNS)
def test_only_the_first_of_two_processes_writes(runs, run):
    one, two = (sorted(p.name for p in (runs / home / run).iterdir()) for home in ("one", "two"))
    assert one == two == ["log.jsonl", "model.safetensors", "samples.png"]
