"""Two processes train what one trains, each with half of every batch, whether they hold networks
whole or in shares."""

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
from tests import two_networks

ROOT = Path(__file__).parents[1]
FIT = "--iterations 12 --batch-size 16 --warmup 4 --precision fp32 --log-every 1"
NET = "--width 8 --multipliers 1 --blocks 1 --attention --dropout 0"
HALVING = "--start-steps 4 --end-steps 2 --last-rounds 1"
CONSISTENCY = "distill.consistency --teacher one/teacher"
# A run, and what trains it; students of one process and of two have the same teacher.
RUNS = {
    "teacher": f"teachers.ddpm {NET} {FIT}",
    "importance": f"teachers.ddpm {NET} --levels importance {FIT}",
    "uneven": f"teachers.ddpm {NET} {FIT} --batch-size 15",
    "accumulated": f"teachers.ddpm {NET} {FIT} --batch-size 15 --accumulate 3",
    "classes": f"teachers.ddpm {NET} --num-classes 10 {FIT}",
    "progressive/0002": f"distill.progressive --teacher one/teacher {HALVING} {FIT}",
    "consistency": f"{CONSISTENCY} --num-angles 4 {FIT}",
    "frechet": f"{CONSISTENCY} --num-angles 4 --frechet 1 {FIT}",
    "ct": f"{CONSISTENCY} --mode ct {FIT}",
    "ict": f"{CONSISTENCY} --mode ict {FIT}",
    "ect": f"{CONSISTENCY} --mode ect {FIT}",
    "continuous": f"{CONSISTENCY} --mode scm {FIT}",
    "midtraining": f"distill.midtraining --teacher one/teacher {FIT}",
    "guided": f"distill.guidance --teacher one/classes {FIT}",
    "two_networks": f"tests.two_networks {FIT}",
}
# Each process takes the first of its own noise: other trajectories than one process would take.
OWN_NOISE = {"midtraining"}
# A launch whose two processes hold a half of every network each trains these again, in shares/.
SHARED = ("importance", "accumulated", "progressive/0002", "frechet", "continuous", "two_networks")
TRAINED = [("two", run) for run in RUNS] + [("shares", run) for run in SHARED]
LAUNCH_TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", "0"]  # any that is free
LAUNCH_SHARED = [*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
# All in one launch: most of a launch's time is its imports. Two networks are also stopped and gone
# on with; what one process began two end, and this process ends what two began. Each training also
# says which share of its networks, averages and moments lies in its process.
SCRIPT = f"""
import os, runpy, sys
from contextlib import suppress
from pathlib import Path
from diffusion.sharded import portion
from diffusion.state import Moments
from diffusion.training import Average, Team
home = sys.argv[1]

def finish(team, finish=Team.finish):
    players = [*team.nets.values()]
    averages = [each.module for each in team.followers.values() if isinstance(each, Average)]
    held = [p for net in (*players, *averages) for p in net.parameters()]
    for part in map(Moments, team.optimizers.values()):
        held += [moment for moment in part.state_dict().values() if moment.ndim]
    mine, total = (sum(each.numel() for each in some) for some in ([*map(portion, held)], held))
    with Path(home, "held" + os.environ.get("RANK", "0")).open("a") as file:
        print(mine / total, file=file)
    finish(team)
    assert all(portion(p) is p for net in (*players, *averages) for p in net.parameters())

Team.finish = finish
Path(home).mkdir(exist_ok=True)
for run, command in {RUNS!r}.items():
    if home == "shares" and run not in {SHARED!r}:
        continue
    module, *arguments = command.split()
    sys.argv[1:] = [*arguments, "--out", home + "/" + run.split("/")[0]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
compare = "--features random --num-images 100 --no-long --no-times --likelihood 0 --steps 2"
sys.argv[1:] = ["one/teacher", "one/consistency", *compare.split(), "--out", home + "/compare"]
if home == "shares":  # no comparison, but a network that cannot be shared out
    sys.argv[1:] = "--net module:scalar:Scalar --out shares/refused {FIT}".split()
    with suppress(SystemExit):
        runpy.run_module("teachers.ddpm", run_name="__main__", alter_sys=True)
else:
    runpy.run_module("eval.compare", run_name="__main__", alter_sys=True)
from accelerate import PartialState
from diffusion import runs
from diffusion.training import fit
from tests import two_networks

def stopped(*arguments, **named):
    for done, line in enumerate(fit(*arguments, **named), 1):
        yield line
        if done == 7:
            raise KeyboardInterrupt

turns = [(stopped, home + "/resumed"), (fit, home + "/resumed")]
if home == "one":
    turns += [(stopped, "one/begun/two"), (stopped, "one/begun/shares")]
else:
    turns += [(fit, "one/begun/" + home), (stopped, home + "/begun")]
for runs.fit, out in turns:
    sys.argv[1:] = [*{FIT!r}.split(), "--save-every", "0", "--out", out]
    with suppress(KeyboardInterrupt):
        two_networks.main()
# written whole: of two processes the parts of a line may alternate
sys.stdout.write("processes: %d\\n" % PartialState().num_processes)
"""


SCALAR = """
import torch

class Scalar(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, condition=None):
        return self.gain * x
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with all runs by one process in one/, by two in two/, and by two in shares/, which
    hold a half of every network each."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "scalar.py").write_text(SCALAR)
    launches = ([sys.executable], "one", 1), (LAUNCH_TWO, "two", 2), (LAUNCH_SHARED, "shares", 2)
    for launcher, home, count in launches:
        process = subprocess.run(
            [*launcher, "script.py", home],
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.count(f"processes: {count}\n") == count
        (folder / home / "errors").write_text(process.stderr)
    return folder


def log(run: Path, name: str) -> list:
    """That field of each line of its log."""
    return [json.loads(line)[name] for line in (run / "log.jsonl").read_text().splitlines()]


def agree(run: Path, other: Path) -> None:
    """Logs and weights are the same but for rounding."""
    for name in ("iteration", "loss", "gradient_norm", "learning_rate"):
        assert len(log(run, name)) == 12
        assert log(run, name) == pytest.approx(log(other, name), rel=1e-4)
    mine, others = (checkpoint.load(each)[0] for each in (run, other))
    torch.testing.assert_close(mine, others, rtol=0, atol=1e-4)  # weights have moved by 1e-2


@pytest.mark.parametrize(("home", "run"), [pair for pair in TRAINED if pair[1] not in OWN_NOISE])
def test_two_processes_train_what_one_trains(runs, home, run):
    agree(runs / home / run, runs / "one" / run)


@pytest.mark.parametrize(("home", "ranks"), [("one", "0"), ("two", "01"), ("shares", "01")])
def test_each_process_holds_all_of_every_network_or_where_it_is_asked_for_a_half(runs, home, ranks):
    for rank in ranks:
        held = [float(line) for line in (runs / home / f"held{rank}").read_text().splitlines()]
        assert len(held) >= len(SHARED)
        assert held == pytest.approx([0.5 if home == "shares" else 1.0] * len(held), abs=0.02)


def test_a_network_that_cannot_be_shared_out_is_refused_in_one_line(runs):
    errors = (runs / "shares" / "errors").read_text().splitlines()
    said = [line for line in errors if line.startswith("error: ")]
    assert len(said) == 2  # one of each process
    for line in said:
        assert "the network Scalar cannot be shared out" in line
        assert "Change gain to a 1D tensor" in line
        assert "leave --use_fsdp out" in line


@pytest.mark.parametrize("run", sorted(OWN_NOISE))
def test_two_processes_train_with_the_noise_of_each(runs, run):
    losses = [log(runs / home / run, "loss") for home in ("one", "two")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.5)


@pytest.mark.parametrize("home", ["one", "two", "shares"])
def test_parts_of_a_batch_one_after_another_train_what_the_whole_trains(runs, home):
    agree(runs / home / "accumulated", runs / "one" / "uneven")


@pytest.mark.parametrize("home", ["one", "two", "shares"])
def test_two_networks_stopped_and_resumed_end_with_the_same_bits_in_one_process_or_two(runs, home):
    whole, resumed = (checkpoint.load(runs / home / run)[2] for run in ("two_networks", "resumed"))
    assert log(runs / home / "resumed", "iteration") == list(range(1, 13))
    assert whole == resumed


@pytest.mark.parametrize("home", ["two", "shares"])
def test_what_one_process_began_two_end_and_one_what_two_began(runs, monkeypatch, home):
    begun = runs / home / "begun"
    assert (begun / "state" / "state.safetensors").exists()
    assert log(begun, "iteration")[-1] < 12
    monkeypatch.setattr(sys, "argv", ["", *FIT.split(), "--save-every", "0", "--out", str(begun)])
    two_networks.main()
    for run in (runs / "one" / "begun" / home, begun):
        agree(run, runs / "one" / "two_networks")


def test_two_processes_measure_what_one_measures(runs):
    texts = [(runs / home / "compare" / "results.jsonl").read_text() for home in ("one", "two")]
    (head, *one), (other, *two) = ([*map(json.loads, text.splitlines())] for text in texts)
    assert len(one) == len(two) > 3
    assert head["floor"] == pytest.approx(other["floor"], rel=1e-6)
    for mine, theirs in zip(one, two, strict=True):
        assert (mine["run"], mine["sampler"]) == (theirs["run"], theirs["sampler"])
        assert mine["quality"] == pytest.approx(theirs["quality"], rel=1e-6)


@pytest.mark.parametrize(("home", "run"), TRAINED)
def test_only_the_first_of_two_processes_writes(runs, home, run):
    one, two = (sorted(p.name for p in (runs / each / run).iterdir()) for each in ("one", home))
    assert one == two == [MARK, "log.jsonl", "model.safetensors", "samples.png"]


LONG = f"""
import os, runpy, sys
open("pid" + os.environ["RANK"], "w").write(str(os.getpid()))
sys.argv[1:] = "{NET} {FIT} --iterations 1000000 --log-every 20 --out run".split()
runpy.run_module("teachers.ddpm", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("launch", [LAUNCH_TWO, LAUNCH_SHARED], ids=["whole", "in shares"])
def test_two_processes_asked_to_stop_at_different_moments_stop_at_the_same_iteration(
    tmp_path, launch
):
    (tmp_path / "long.py").write_text(LONG)
    workers = []
    process = subprocess.Popen(
        [*launch, "long.py"], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (tmp_path / "run" / "log.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        workers = [int((tmp_path / f"pid{rank}").read_text()) for rank in (1, 0)]
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            time.sleep(0.1)
        said = process.communicate(timeout=60)[1]
    finally:
        for pid in (*workers, process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    stops = re.findall(r"stopped at iteration (\d+)", said)
    assert len(stops) == 2
    assert stops[0] == stops[1]
    state, _ = load_tensors(tmp_path / "run" / "state" / "state.safetensors")
    assert int(state["optimizer.student.0.step"]) == int(stops[0])
