"""A timing says what the call took: checked against a clock and a GPU whose truth is known."""

import json
import random
import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.measure import machine, race
from eval.measure.timing import Timing, settled
from tests.simulated import CPU, GPU, Machine, fails, simulate_clock, simulate_gpu


@pytest.fixture
def clock(monkeypatch) -> Machine:
    return simulate_clock(monkeypatch)


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    return simulate_gpu(monkeypatch)


def alone(call: Callable[[], torch.Tensor], batch_size: int, device: torch.device) -> Timing:
    *_, last = race.race({0: call}, batch_size, device)
    return last.timing


@pytest.mark.parametrize("count", [2, 3, 10, 28, 29, 50])
def test_median_quartiles_and_p90_are_numpys(count):
    draw = random.Random(0)
    seconds = tuple(draw.uniform(0.01, 0.02) for _ in range(count))
    timing = Timing(4, seconds=seconds)
    assert timing.median == pytest.approx(np.median(seconds))
    assert timing.iqr == pytest.approx(np.quantile(seconds, [0.25, 0.75]))
    assert timing.images_per_second == pytest.approx(4 / np.median(seconds))
    if timing.p90 is not None:
        assert timing.p90 == pytest.approx(np.quantile(seconds, 0.9))


def test_p90_is_claimed_from_the_count_at_which_a_sample_beyond_it_is_95_percent_sure():
    claimed = [n for n in range(1, 60) if Timing(1, seconds=(0.01,) * n).p90 is not None]
    assert claimed == [n for n in range(1, 60) if 1 - 0.9**n >= 0.95]


@pytest.mark.parametrize(("quartile", "enough"), [(0.017, True), (0.0173, False)])
def test_repeats_stop_where_the_notch_of_the_median_is_one_percent(quartile, enough):
    seconds = (1 - quartile,) * 10 + (1.0,) * 9 + (1 + quartile,) * 10
    assert (1.57 * 2 * quartile / 29**0.5 <= 0.01) is enough
    assert settled(Timing(1, seconds=seconds), budget=1e9) is enough


@pytest.mark.parametrize("spread", [0.01, 0.03])
def test_settled_medians_tell_calls_that_differ_by_2_percent_apart_19_times_in_20(spread):
    draw, wrong, count = random.Random(0), 0, 200

    def settle(mean: float) -> Timing:
        timing = Timing(1)
        while not settled(timing, budget=1e9):
            timing = Timing(1, seconds=(*timing.seconds, draw.gauss(mean, spread * mean)))
        return timing

    for _ in range(count):
        wrong += settle(1.0).median >= settle(1.02).median
    assert wrong / count < 0.05


@pytest.mark.parametrize(
    ("costs", "repeats", "runs"),
    [
        ([0.5, 0.01], 29, 31),  # steady: as few as claim a p90, after the first and the warm-up
        ([0.5, 0.01, 0.01, *[0.01, 0.02] * 30], 50, 52),  # its spread stays large
        ([0.5], 4, 6),  # 2 s of budget
        ([0.9], 3, 5),
        ([1.1], 2, 3),  # the second run is long: it is the first repeat, and one more will do
        ([30.0], 2, 3),
        ([20.0, 2.5], 2, 4),  # compiled, and then long: the second run only warmed up
        ([60.0, 0.01], 29, 31),  # compiled: the second run is short, so it only warmed up
    ],
)
def test_repeats_stop_when_the_median_is_known_or_the_budget_is_spent(clock, costs, repeats, runs):
    timing = alone(clock.call("a", *costs), 1, CPU)
    assert (len(timing.seconds), len(clock.runs)) == (repeats, runs)


def test_first_call_and_warm_up_are_apart(clock):
    call = clock.call("a", 20.0, 2.5, 0.5)
    timing = alone(call, 8, CPU)
    assert timing == Timing(8, first=20.0, seconds=pytest.approx((0.5,) * 4))


# Memory


def test_peak_is_of_the_call_alone_and_not_of_its_compilation(gpu, clock):
    gpu.held = 1000  # weights of all models
    run = clock.call("a", 0.5)

    def call() -> torch.Tensor:
        extra = 300 if clock.runs else 900  # the first call compiles
        gpu.peak = max(gpu.peak, gpu.held + extra)
        gpu.cached = max(gpu.cached, gpu.held + extra)
        return run()

    timing = alone(call, 1, GPU)
    assert (timing.allocated, timing.reserved) == (300, 1300)
    timing = alone(call, 1, CPU)
    assert (timing.allocated, timing.reserved) == (None, None)


@pytest.mark.parametrize("fatal", [1, 2, 3])
def test_tensors_of_a_failed_call_are_gone_when_the_cache_is_emptied(
    gpu, clock, monkeypatch, fatal
):
    run, lost, alive = clock.call("a", 0.5), [], []

    def call() -> torch.Tensor:
        run()
        large = torch.zeros(8)
        if len(clock.runs) == fatal:
            lost.append(weakref.ref(large))
            raise torch.OutOfMemoryError
        return large

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.extend(r() for r in lost))
    assert alone(call, 1, GPU).failed == "out of memory"
    assert alive
    assert set(alive) == {None}


# The machine


def test_environment_is_json_and_the_same_when_asked_again():
    first = machine.environment(CPU, "fp32", compiled=False)
    assert json.loads(json.dumps(first)) == first == machine.environment(CPU, "fp32", False)
    assert (first["threads"], first["torch"]) == (torch.get_num_threads(), torch.__version__)
    assert first["device"]


@pytest.mark.parametrize("changed", [("bf16", False), ("fp32", True)])
def test_environment_tells_precision_and_compilation_apart(changed):
    assert machine.environment(CPU, *changed) != machine.environment(CPU, "fp32", False)


def test_conditions_of_a_gpu_are_its_clocks_and_null_where_nvml_gives_none(gpu):
    conditions = machine.conditions(GPU)
    assert (conditions["clock_mhz"], conditions["memory_clock_mhz"]) == (1980, 2619)
    assert conditions["watts"] is conditions["celsius"] is None
    assert json.loads(json.dumps(conditions)) == conditions


@pytest.mark.parametrize("missing", ["module", "device"])
def test_clocks_are_null_where_nvml_does_not_give_them(gpu, monkeypatch, missing):
    if missing == "module":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        gpu.uuid = "a slice of it"
    assert machine.conditions(GPU)["clock_mhz"] is None


def test_conditions_of_a_cpu_are_the_mean_clock_of_its_cores_or_null(monkeypatch):
    def system(read_text: Callable[[], str]) -> tuple[str, int | None]:
        file = SimpleNamespace(read_text=read_text)
        monkeypatch.setattr("diffusion.machine.Path", lambda path: file)
        measured = machine.environment(CPU, "fp32", False), machine.conditions(CPU)
        return measured[0]["device"], measured[1]["clock_mhz"]

    core = "model name\t: A 2000: B\ncpu MHz\t\t: {}\n"
    assert system(lambda: core.format(1000.5) + core.format(3000.5)) == ("A 2000: B", 2000)
    name, clock = system(partial(fails, FileNotFoundError()))
    assert name
    assert clock is None
