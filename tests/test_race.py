"""Calls that are timed in turn: none is favoured, none that fails stops the others."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from eval.measure import race
from eval.measure.race import Lap
from eval.measure.timing import Timing
from tests.simulated import CPU, IMAGE, Machine, fails, simulate_clock, simulate_gpu


@pytest.fixture
def clock(monkeypatch) -> Machine:
    return simulate_clock(monkeypatch)


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    return simulate_gpu(monkeypatch)


def timings(laps) -> dict:
    return {lap.key: lap.timing for lap in laps}


def by_size(laps) -> dict[int, Timing]:
    """The timings of a sweep of one call, by batch size."""
    return {lap.timing.batch_size: lap.timing for lap in laps}


def test_drifting_machine_favours_nobody_in_a_race_but_does_in_single_file(clock):
    def ratio(*races: list[str]) -> float:
        clock.now = 0.0
        timed = {}
        for names in races:
            calls = {name: clock.call(name, 0.01) for name in names}
            timed |= timings(race.race(calls, 1, CPU))
        assert timed["b"].seconds[-1] > 1.5 * timed["a"].seconds[0]  # it does drift
        return timed["b"].median / timed["a"].median

    clock.drift = 1.0
    assert ratio(["a", "b"]) == pytest.approx(1, abs=0.002)
    assert ratio(["a"], ["b"]) > 1.3


def test_each_unsettled_call_runs_once_a_round_and_the_order_turns_round(clock):
    calls = {"a": clock.call("a", 0.7), "b": clock.call("b", 0.9), "c": clock.call("c", 0.01)}
    timed = timings(race.race(calls, 1, CPU, budget=2.0))
    assert "".join(clock.runs).startswith("aabbcc" + "cba" + "abc" + "cba" + "ccc")
    assert [len(timed[name].seconds) for name in "abc"] == [3, 3, 29]


def test_progress_never_falls_and_is_whole_once_at_the_end(clock):
    calls = {name: clock.call(name, cost) for name, cost in [("a", 0.01), ("b", 0.3), ("c", 4.0)]}
    laps = [Lap.progress(lap) for lap in race.race(calls, 1, CPU)]
    done, totals, _ = zip(*laps, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {6}
    assert [number for number, each in enumerate(done) if each == 6] == [len(laps) - 1]


def test_race_of_nobody_is_over():
    assert timings(race.race({}, 1, CPU)) == {}


# Out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: not enough memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_call_that_runs_out_of_memory_is_marked_and_the_others_go_on(clock, error):
    calls = {"a": clock.call("a", 0.5), "b": partial(fails, error), "c": clock.call("c", 0.5)}
    timed = timings(race.race(calls, 4, CPU))
    assert timed["b"] == Timing(4, failed="out of memory")
    assert len(timed["a"].seconds) == len(timed["c"].seconds) == 4


def test_real_allocator_of_the_cpu_runs_out_of_memory():
    calls = {"huge": lambda: torch.empty(2**50), "small": lambda: torch.empty(2)}
    timed = timings(race.race(calls, 1, CPU, budget=0.0))
    assert timed["huge"].failed == "out of memory"
    assert len(timed["small"].seconds) >= 3


def test_call_that_runs_out_of_memory_only_later_keeps_no_repeats(clock):
    run = clock.call("a", 0.5)

    def call() -> torch.Tensor:
        return fails(MemoryError()) if len(clock.runs) == 4 else run()

    assert timings(race.race({"a": call}, 1, CPU))["a"] == Timing(1, failed="out of memory")


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("no memory")])
def test_any_other_error_is_raised(error):
    with pytest.raises(type(error), match=str(error)):
        timings(race.race({"a": partial(fails, error)}, 1, CPU))


# Ever larger batches


def costing(clock: Machine, a: float, b: float, fits: int = 2**30) -> Callable[[int], torch.Tensor]:
    """A call that takes a + b n seconds for n images, and holds so many."""

    def call(n: int) -> torch.Tensor:
        if n > fits:
            raise torch.OutOfMemoryError
        clock.now += a + b * n
        return IMAGE

    return call


@pytest.mark.parametrize(("a", "b"), [(0.01, 0.01), (0.1, 0.01), (0.1, 0.001)])
def test_sweep_finds_the_best_throughput_and_stops_where_it_no_longer_grows(clock, a, b):
    timed = by_size(race.sweep({0: costing(clock, a, b)}, CPU, limit=1e9))
    rate = {2**k: 2**k / (a + b * 2**k) for k in range(20)}
    assert {n: t.images_per_second for n, t in timed.items()} == pytest.approx(
        {n: rate[n] for n in timed}
    )
    *_, third, _, last = timed
    assert rate[last] < 1.05 * rate[third]  # two doublings were not worth 5 %
    assert rate[third] >= 1.05 * rate[third // 4]  # but those before were
    assert max(t.images_per_second for t in timed.values()) > 0.95 / b  # of all that is to be had


@pytest.mark.parametrize(
    ("rates", "sizes"),
    [
        ([10, 10, 10, 10], 3),
        ([10, 10.3, 10.6, 10.6, 10.6], 4),  # 5 % in two doublings are enough
        ([10, 12, 10, 13, 13, 13, 13], 6),  # one bad size is no end
        ([10, 9, 8, 20], 3),
    ],
)
def test_sweep_ends_after_two_sizes_that_did_not_beat_the_best_by_5_percent(clock, rates, sizes):
    def call(n: int) -> torch.Tensor:
        clock.now += n / rates[n.bit_length() - 1]
        return IMAGE

    assert len(by_size(race.sweep({0: call}, CPU, limit=1e9))) == sizes


def test_sweep_marks_the_batch_that_does_not_fit_and_the_others_go_on(clock):
    calls = {"small": costing(clock, 1.0, 0.01, fits=4), "large": costing(clock, 1.0, 0.01)}
    laps = list(race.sweep(calls, CPU, limit=1e9))
    small = by_size(lap for lap in laps if lap.key == "small")
    large = by_size(lap for lap in laps if lap.key == "large")
    assert [n for n, t in small.items() if t.seconds] == [1, 2, 4]
    assert small[8] == Timing(8, failed="out of memory")
    assert max(large) > 1024
    assert all(t.seconds for t in large.values())


def test_sweep_stops_before_a_batch_that_may_take_longer_than_the_limit(clock):
    timed = by_size(race.sweep({0: costing(clock, 0.0, 1.0)}, CPU, limit=1.5))
    assert timed.keys() == {1, 2}
    assert timed[2] == Timing(2, failed="over 1.5 s")
    assert clock.now < 10


def test_sweep_measures_nothing_that_is_known(clock):
    rate, sizes = 0.1, []

    def call(n: int) -> torch.Tensor:
        sizes.append(n)
        return costing(clock, rate, 0.0)(n) if n < 64 else fails(MemoryError())

    known = {n: Timing(n, first=1.0, seconds=(rate,) * 3) for n in (1, 4, 48)}
    timed = by_size(race.sweep({0: call}, CPU, known={0: known}))
    assert set(sizes) == {2, 8, 16, 32, 64}
    assert timed.keys() == set(sizes)
    assert timed[64].failed


def test_sweep_races_the_rows_at_each_size_so_that_drift_favours_nobody(clock):
    clock.drift = 0.02

    def call(n: int) -> torch.Tensor:
        return clock.call("", 0.01 + 0.001 * n)()

    timed = {
        (lap.key, lap.timing.batch_size): lap.timing
        for lap in race.sweep({"a": call, "b": call}, CPU)
    }
    sizes = {n for _, n in timed}
    assert len(sizes) > 5
    for n in sizes:
        ratio = timed["b", n].median / timed["a", n].median
        assert ratio == pytest.approx(1, abs=0.01)
