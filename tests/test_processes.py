"""Two processes train what one trains, each with half of every batch."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from diffusion import checkpoint
from diffusion.files import load_tensors
from diffusion.folders import MARK

ROOT = Path(__file__).parents[1]
FIT = "--iterations 12 --batch-size 16 --warmup 4 --precision fp32 --log-every 1"
NET = "--width 8 --multipliers 1 --blocks 1 --attention --dropout 0"
HALVING = "--start-steps 4 --end-steps 2 --last-rounds 1"
# A run, and what trains it; students of one process and of two have the same teacher.
RUNS = {
    "teacher": f"teachers.ddpm {NET} {FIT}",
    "progressive/0002": f"distill.progressive --teacher one/teacher {HALVING} {FIT}",
    "consistency": f"distill.consistency --teacher one/teacher --num-angles 4 {FIT}",
    "frechet": f"distill.consistency --teacher one/teacher --num-angles 4 --frechet 1 {FIT}",
    "continuous": f"distill.consistency --mode scm --teacher one/teacher {FIT}",
    "two_networks": f"tests.two_networks {FIT}",
}
LAUNCH_TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
# All in one launch: most of a launch's time is its imports.
SCRIPT = f"""
import runpy, sys
home = sys.argv[1]
for run, command in {RUNS!r}.items():
    module, *arguments = command.split()
    sys.argv[1:] = [*arguments, "--out", home + "/" + run.split("/")[0]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
from contextlib import suppress
from accelerate import PartialState
from diffusion import runs
from diffusion.training import fit
from tests import two_networks

def stopped(*arguments, **named):
    for done, line in enumerate(fit(*arguments, **named), 1):
        yield line
        if done == 7:
            raise KeyboardInterrupt

for runs.fit in (stopped, fit):
    sys.argv[1:] = [*{FIT!r}.split(), "--save-every", "0", "--out", home + "/resumed"]
    with suppress(KeyboardInterrupt):
        two_networks.main()
# written whole: of two processes the parts of a line may alternate
sys.stdout.write("processes: %d\\n" % PartialState().num_processes)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with all runs by one process in one/, by two processes in two/."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    for launcher, home, count in (([sys.executable], "one", 1), (LAUNCH_TWO, "two", 2)):
        process = subprocess.run(
            [*launcher, "script.py", home],
            cwd=folder,
            env=ENVIRONMENT,
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


@pytest.mark.parametrize("home", ["one", "two"])
def test_two_networks_stopped_and_resumed_end_with_the_same_bits_in_one_process_or_two(runs, home):
    whole, resumed = (checkpoint.load(runs / home / run)[2] for run in ("two_networks", "resumed"))
    lines = (runs / home / "resumed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 13))
    assert whole == resumed


@pytest.mark.parametrize("run", RUNS)
def test_only_the_first_of_two_processes_writes(runs, run):
    one, two = (sorted(p.name for p in (runs / home / run).iterdir()) for home in ("one", "two"))
    assert one == two == [MARK, "log.jsonl", "model.safetensors", "samples.png"]


LONG = f"""
import os, runpy, sys
open("pid" + os.environ["RANK"], "w").write(str(os.getpid()))
sys.argv[1:] = "{NET} {FIT} --iterations 1000000 --log-every 50 --out run".split()
runpy.run_module("teachers.ddpm", run_name="__main__", alter_sys=True)
"""


def test_two_processes_asked_to_stop_at_different_moments_stop_at_the_same_iteration(tmp_path):
    (tmp_path / "long.py").write_text(LONG)
    workers = []
    process = subprocess.Popen(
        [*LAUNCH_TWO, "long.py"], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (tmp_path / "run" / "log.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        workers = [int((tmp_path / f"pid{rank}").read_text()) for rank in (1, 0)]
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            time.sleep(0.1)
        said = process.communicate(timeout=20)[1]
    finally:
        for pid in (*workers, process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    stops = re.findall(r"stopped at iteration (\d+)", said)
    assert len(stops) == 2
    assert stops[0] == stops[1]
    state, _ = load_tensors(tmp_path / "run" / "state" / "state.safetensors")
    assert int(state["optimizer.student.0.step"]) == int(stops[0])
