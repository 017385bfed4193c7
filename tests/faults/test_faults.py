"""A small share of `python -m benchmarks.faults`: and a harness that sees."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = "from benchmarks import faults; faults.run(faults.main)"
TORN = """
from contextlib import contextmanager
from diffusion import files
@contextmanager
def in_place(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
files.atomic_path = in_place
"""


def harness(
    out: Path, *arguments: str, before: str = ""
) -> tuple[subprocess.CompletedProcess, dict]:
    """What `python -m benchmarks.faults` says after other code, and its faults.json."""
    command = [sys.executable, "-c", before + RUN, "--out", str(out), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, json.loads((out / "faults.json").read_text())


def test_each_class_of_faults_is_survived(tmp_path):
    done, tallies = harness(tmp_path, "--each", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(tallies) == 16
    if "full disk: left out" in done.stdout:
        del tallies["full disk"]
    assert all(tally["tried"] == tally["survived"] == 2 for tally in tallies.values())


def test_files_that_are_written_in_place_are_seen_to_be_lost(tmp_path):
    done, tallies = harness(tmp_path, "--each", "8", "--classes", "killed in", before=TORN)
    assert done.returncode == 2
    (tally,) = tallies.values()
    assert tally["survived"] < tally["tried"] == 8
    assert all(Path(failure["home"]).is_dir() for failure in tally["failures"])
