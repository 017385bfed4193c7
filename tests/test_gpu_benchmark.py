"""benchmarks.gpu tries every stage, resumes, and names each result beyond its bound."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_stages
from benchmarks.gpu_stages import BOUNDS, STAGES
from eval.measure import features, machine
from eval.measure.real import Real

TINY = {"shape": "tiny", "batch_size": 8, "inception": None}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A folder, on a machine without a compiler: to compile takes minutes."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    return tmp_path / "gpu"


def stages(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())["stages"]


def rows(folder: Path, title: str) -> dict[str, dict]:
    made = (row for stage in stages(folder).values() for row in stage["tables"].get(title, []))
    return {row["what"]: row for row in made}


def test_every_stage_has_a_result_within_its_bounds_and_is_skipped_when_asked_again(bare, command):
    outcome = command(gpu.main, "--cpu", "--out", bare)
    assert outcome.code == 0, outcome
    before = stages(bare)
    assert {name: stage["state"] for name, stage in before.items()} == dict.fromkeys(STAGES, "done")
    made = rows(bare, "checks")
    assert all(row["ok"] and row["measured"] <= row["bound"] for row in made.values())
    assert made["network, bf16"]["measured"] > 0  # it is another network than the CPU's
    kinds = {kind for kind in BOUNDS if any(f"{what}, ".startswith(f"{kind}, ") for what in made)}
    left_out = {kind for kind in BOUNDS if "compiled" in kind or kind.startswith("images kept")}
    assert kinds == BOUNDS.keys() - left_out
    assert "no-such-compiler" in rows(bare, "left out")["compiled training"]["why"]
    page = (bare / "gpu.md").read_text()
    assert "within its bound" in page
    assert all(what in page for what in (*STAGES, *made))

    again = command(gpu.main, "--cpu", "--out", bare)
    assert (again.code, again.out.count("done before")) == (0, len(STAGES))
    assert stages(bare) == before


def test_a_violated_bound_is_a_failure_now_and_when_asked_again(bare, command, monkeypatch):
    right = gpu_stages.Noise
    wrong = lambda *settings: iter([next(right(*settings)) * torch.rand(1)])  # noqa: E731
    monkeypatch.setattr(gpu_stages, "Noise", wrong)
    arguments = (gpu.main, "--cpu", "--out", bare, "--stages", "numbers")
    for _ in range(2):
        outcome = command(*arguments)
        assert outcome.code == 1
        assert "numbers: noise" in outcome.out
        assert "**no**" in (bare / "gpu.md").read_text()
    assert stages(bare).keys() == {"numbers"}


def test_a_stage_that_fails_or_has_no_time_is_said_and_the_others_go_on(bare, command, monkeypatch):
    def broken(scene):
        yield "times", {"what": "before it broke", "rate": 1.0}
        raise ValueError("a broken kernel")

    monkeypatch.setitem(gpu_stages.STAGES, "network", (1, broken))
    outcome = command(gpu.main, "--cpu", "--out", bare, "--stages", "network", "distances")
    assert outcome.code == 1
    assert stages(bare)["distances"]["state"] == "done"
    failed = stages(bare)["network"]
    assert failed["state"] == "failed: ValueError: a broken kernel"
    assert failed["tables"]["times"]
    assert "a broken kernel" in (bare / "gpu.md").read_text()

    monkeypatch.setattr(gpu, "LEAST", 1e9)
    monkeypatch.setattr(gpu, "perform", None)  # not called
    outcome = command(gpu.main, "--cpu", "--out", bare, "--minutes", 1e-9, "--stages", "numbers")
    assert "numbers: left out for lack of time" in outcome.out
    assert "| numbers | - | left out" in (bare / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("seconds", "state"), [(300.0, "done"), (0.2, "cut short before its first figure")]
)
def test_a_stage_in_a_process_of_its_own_ends_with_its_time(bare, seconds, state):
    path = bare / "gpu.json"
    gpu.write_atomic(path, json.dumps({"settings": TINY, "stages": {}}))
    whole = gpu.run_stage("peer", path, seconds, alone=True)
    assert whole["stages"]["peer"]["state"] == state
    assert stages(bare) == whole["stages"]


def test_a_stage_whose_process_fails_is_a_failure(bare):
    path = bare / "gpu.json"
    gpu.write_atomic(path, json.dumps({"settings": TINY, "stages": {}}))
    whole = gpu.run_stage("none", path, 300.0, alone=True)
    assert gpu.failures(whole) == ["none: failed: KeyError: 'none'"]
    path.write_text("cut")  # which the stage cannot read
    assert gpu.perform("none", path, 300.0) == 1


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, command):
    outcome = command(gpu.main, "--out", tmp_path / "gpu")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "no GPU" in outcome.err
    assert "--cpu" in outcome.err
    assert not (tmp_path / "gpu").exists()


def test_results_of_another_machine_are_not_mixed_with_these(bare, command):
    assert command(gpu.main, "--cpu", "--out", bare, "--minutes", 1e-9).code == 0
    whole = json.loads((bare / "gpu.json").read_text())
    whole["settings"]["device"] = "another"
    (bare / "gpu.json").write_text(json.dumps(whole))
    outcome = command(gpu.main, "--cpu", "--out", bare)
    assert outcome.code == 2
    assert "another device (another" in outcome.err


# What reading the CUDA paths has mended


def test_features_are_of_full_float32_wherever_they_are_computed(digits, monkeypatch):
    """TF32 would move a GPU's distances in the third digit."""
    cudnn, right = torch.backends.cudnn, features.random_network
    monkeypatch.setattr(cudnn, "allow_tf32", True)

    def spied(*settings) -> features.Extractor:
        return features.replace(right(*settings), extract=lambda images: cudnn.allow_tf32)

    monkeypatch.setattr(features, "random_network", spied)
    random = features.extractor("random", Real.sample(digits), torch.device("cpu"))
    assert [random.extract(digits.train.images[:2]) for _ in range(2)] == [False, False]
    assert cudnn.allow_tf32


@pytest.mark.parametrize("before", [True, False])
def test_full_float32_ends_with_what_was_before(monkeypatch, before):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", before)
    with suppress(KeyError), machine.full_float32():
        assert not cudnn.allow_tf32
        raise KeyError
    assert cudnn.allow_tf32 is before


@pytest.mark.parametrize("named", [None, "no-such-compiler"])
def test_compiling_on_a_gpu_wants_the_c_compiler_that_triton_wants(monkeypatch, named):
    from diffusion import machine as asked

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(asked, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    if named:
        monkeypatch.setenv("CC", named)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert (named or "gcc or clang") in asked.compiler()
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert asked.compiler() is None
