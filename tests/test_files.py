"""Files: whole or the one before, verified when read, one owner at a time."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion import files, owner, runs
from diffusion.checkpoint import load
from diffusion.config import LIMITS
from diffusion.console import UserError
from diffusion.files import LOCK, load_tensors, read_json, save_tensors, write_atomic, write_json
from diffusion.owner import cached, owned

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True]), "c": torch.zeros(0, 4)}
DEAD = 2**22 + 1  # beyond the largest process number


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flips(path: Path):
    """The file with a bit flipped in each byte in turn."""
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        yield position
    path.write_bytes(whole)


def attempt(call) -> tuple[object, str]:
    """What the call returns, or the user's mistake that it raises."""
    try:
        return call(), ""
    except UserError as error:
        return None, str(error)


def test_a_bit_flipped_anywhere_in_tensors_is_noticed_or_changes_nothing(tmp_path):
    path, noticed = tmp_path / "file.safetensors", 0
    save_tensors(path, TENSORS, {"line": "text"})
    for _ in flips(path):
        read, problem = attempt(lambda: load_tensors(path))
        noticed += str(path) in problem
        if read:  # the flip is in the name of the checksum itself
            tensors, metadata = read
            assert metadata["line"] == "text"
            assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
        else:
            assert str(path) in problem
    assert noticed > 100


def test_a_bit_flipped_anywhere_in_an_object_is_noticed_or_changes_nothing(tmp_path):
    path, values = tmp_path / "file.json", {"seed": 3, "rate": 1e-3, "names": ["a", "é"], "x": None}
    write_json(path, values)
    for _ in flips(path):
        read, problem = attempt(lambda: read_json(path))
        assert str(path) in problem or {name: read[name] for name in values} == values
    assert read_json(path) == values


def test_files_of_before_there_were_checksums_are_read(tmp_path):
    import safetensors.torch

    path = tmp_path / "old"
    path.write_text('{"seed": 3}')
    assert read_json(path) == {"seed": 3}
    path.write_bytes(safetensors.torch.save(TENSORS, {"line": "text"}))
    assert load_tensors(path)[1] == {"line": "text"}


def test_tensors_sealed_by_the_earlier_digest_are_read_and_verified(tmp_path):
    import safetensors.torch

    path, said = tmp_path / "earlier", {"line": "text"}
    seal = files._tensors_checksum(TENSORS, said, "crc32")
    path.write_bytes(safetensors.torch.save(TENSORS, said | {"crc32": seal}))
    assert load_tensors(path)[1] == said
    path.write_bytes(safetensors.torch.save(TENSORS | {"b": ~TENSORS["b"]}, said | {"crc32": seal}))
    with pytest.raises(UserError, match="is damaged"):
        load_tensors(path)


def test_a_writer_killed_within_safetensors_leaves_nothing_that_the_next_does_not_sweep(tmp_path):
    path = tmp_path / "state.safetensors"

    def killed() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save_tensors(path, {"x": torch.zeros(10_000)}, {})

    pid = os.fork()
    if pid == 0:
        killed()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGXFSZ
    assert len(names(tmp_path)) == 1
    save_tensors(path, TENSORS, {})
    assert names(tmp_path) == [path.name]


def test_a_saved_file_has_the_rights_of_the_users_other_files(tmp_path):
    save_tensors(tmp_path / "one", TENSORS, {})
    (tmp_path / "two").write_text("")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "two").stat().st_mode


def test_a_file_that_one_may_not_read_is_not_said_to_be_missing(tmp_path):
    files.save_tensors(tmp_path / "f", {"w": torch.ones(2)}, {})
    (tmp_path / "f").chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        with pytest.raises(PermissionError):
            files.load_tensors(tmp_path / "f")
    finally:
        os.seteuid(user)


def test_a_link_is_written_through_and_stays(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    write_atomic(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "text"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, kind):
    path = {"device": Path("/dev/null")}.get(kind, tmp_path / "name")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    before = path.stat().st_mode
    with pytest.raises(UserError, match="no regular file"):
        write_atomic(path, "text")
    assert path.stat().st_mode == before


@pytest.mark.parametrize("number", [errno.EIO, errno.EFBIG, errno.ENOSPC])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_is_one_line_and_the_file_stays(tmp_path, monkeypatch, call, number):
    path = tmp_path / "file.safetensors"
    save_tensors(path, TENSORS, {"is": "old"})

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=f"file.safetensors could not be .*{os.strerror(number)}"):
        save_tensors(path, TENSORS, {"is": "new"})
    monkeypatch.undo()
    assert load_tensors(path)[1] == {"is": "old"}
    assert names(tmp_path) == [path.name]


def test_a_file_above_the_limit_of_sizes_is_one_line(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not be written"):
            save_tensors(tmp_path / "file", {"x": torch.zeros(1000)}, {})
        with pytest.raises(UserError, match="could not be written"):
            files.append(tmp_path / "log", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "file" not in names(tmp_path)


def test_what_dead_writers_left_is_swept_and_a_living_ones_stays(tmp_path):
    living = os.getppid()
    for pid in (DEAD, os.getpid(), living):
        (tmp_path / f".a[1].{pid}.part").write_text("half")
    write_atomic(tmp_path / "a[1]", "text")
    assert names(tmp_path) == [f".a[1].{living}.part", "a[1]"]


HOLD = """
import sys
from pathlib import Path
from diffusion.owner import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another(folder: Path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_folder_in_use_is_refused_with_who_uses_it_until_that_is_dead(tmp_path, command):
    def take() -> None:
        with owned(tmp_path / "run"):
            pass

    with another(tmp_path / "run") as process:
        outcome = command(take)
        assert outcome.code == 2
        assert f"in use by process {process.pid} on " in outcome.err
        assert "-c" in outcome.err
        assert outcome.err.count("\n") == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert names(tmp_path / "run") == [LOCK]
        assert command(take).code == 0
    assert names(tmp_path / "run") == []


def test_a_folder_in_which_nothing_was_made_is_not_left(tmp_path):
    with owned(tmp_path / "new" / "run"):
        assert names(tmp_path / "new" / "run") == [LOCK]
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    owner._say_without_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    for name in ("one", "two"):
        with owned(tmp_path / name):
            write_atomic(tmp_path / name / "file", "text")
    assert capsys.readouterr().out.count("no locks") == 1
    assert names(tmp_path / "one") == ["file"]


def test_a_folder_that_is_deleted_as_a_file_s_place_is_made_is_not_made_again(
    tmp_path, monkeypatch
):
    folder, target = tmp_path / "run", files.target

    def deleted_after(path: Path) -> Path:
        found = target(path)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    with owned(folder):
        monkeypatch.setattr(files, "target", deleted_after)
        with pytest.raises(UserError, match="could not be written"):
            files.write_atomic(folder / "state" / "file", "")
    assert not folder.exists()


@pytest.mark.parametrize("loss", ["deleted", "moved", "replaced"])
def test_a_folder_that_is_gone_is_not_made_again(tmp_path, loss):
    def use() -> None:
        with owned(tmp_path / "run"):
            write_atomic(tmp_path / "run" / "file", "text")
            (tmp_path / "run").rename(tmp_path / "moved")
            if loss == "deleted":
                shutil.rmtree(tmp_path / "moved")
            elif loss == "replaced":
                (tmp_path / "run").mkdir()
            write_atomic(tmp_path / "run" / "state" / "file", "text")

    with pytest.raises(UserError, match="deleted or moved"):
        use()
    assert not (tmp_path / "run" / "state").exists()


def made(times: list[int]):
    times.append(1)
    return TENSORS, {"accuracy": "1"}


def test_a_damaged_cache_is_said_and_made_anew(tmp_path, capsys):
    path, times = tmp_path / "features" / "file.safetensors", []
    for _ in range(2):
        assert cached(path, lambda: made(times))[1] == {"accuracy": "1"}
    assert len(times) == 1
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert torch.equal(cached(path, lambda: made(times))[0]["a"], TENSORS["a"])
    said = capsys.readouterr().out
    assert len(times) == 2
    assert said.count("\n") == 1
    assert f"{path} is damaged" in said
    assert names(path.parent) == [path.name]
    assert load_tensors(path)[1] == {"accuracy": "1"}


def test_a_cache_that_cannot_be_written_is_said_before_the_work(tmp_path, capsys):
    (tmp_path / "cache").write_text("no folder")

    def make():
        assert "FEWSTEP_CACHE" in capsys.readouterr().out
        return made([])

    assert cached(tmp_path / "cache" / "file", make)[1] == {"accuracy": "1"}


def test_a_bit_flipped_in_a_state_is_refused_with_the_mend_or_changes_nothing(
    tmp_path, train_tiny, quick, stop_at_save
):
    config = replace(quick, save_every=0.0)
    whole = load(train_tiny(tmp_path / "whole", config))[2]
    stop_at_save(lambda: train_tiny(tmp_path / "run", config), 2)
    state = tmp_path / "run" / "state" / "state.safetensors"
    content = state.read_bytes()
    header = int.from_bytes(content[:8], "little")
    places = [0, 9, *range(20, header, header // 12), *range(header + 9, len(content), 40_000)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1
        state.parent.mkdir(exist_ok=True)
        state.write_bytes(flipped)
        run, problem = attempt(lambda: train_tiny(tmp_path / "run", config))
        if run:
            assert load(run)[2] == whole
            (run / "model.safetensors").unlink()
        else:
            assert "delete it, and the training begins anew" in problem, place
            assert state.read_bytes() == bytes(flipped)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("settings", {"images": "text"}, 'its settings: images: .*got "text"'),
        ("settings", {"iterations": -1}, "its settings: iterations: .*got -1"),
        ("line", {"loss": None}, "its line: loss: .*got null"),
        ("line", {"iteration": "2"}, 'its line: iteration: .*got "2"'),
    ],
)
def test_a_state_whose_settings_or_line_are_of_another_type_is_refused_with_the_mend(
    tmp_path, train_tiny, quick, stop_at_save, name, changes, words
):
    run = tmp_path / "run"
    stop_at_save(lambda: train_tiny(run, replace(quick, save_every=0.0)))
    state = run / "state" / "state.safetensors"
    tensors, said = load_tensors(state)
    values = {k: v for k, v in json.loads(said[name]).items() if k != files.CHECKSUM}
    said[name] = json.dumps(values | changes)
    save_tensors(state, tensors, said)
    with pytest.raises(UserError, match=f"{words}.*: delete it, and the training begins anew"):
        train_tiny(run, replace(quick, save_every=0.0))


def test_a_start_of_other_settings_neither_replaces_nor_resumes_a_state(
    tmp_path, train_tiny, quick, monkeypatch, stop_at_save
):
    run, config = tmp_path / "run", replace(quick, save_every=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit", lambda *_, **__: iter(()))  # killed before its first save
        with pytest.raises(ValueError, match="not enough values"):
            train_tiny(run, replace(config, seed=1))
    stop_at_save(lambda: train_tiny(run, config), 2)
    content = (run / "state" / "state.safetensors").read_bytes()
    with pytest.raises(UserError, match="seed was 0, now 1"):
        train_tiny(run, replace(config, seed=1))
    assert (run / "state" / "state.safetensors").read_bytes() == content
    whole = load(train_tiny(tmp_path / "whole", config))[2]
    assert load(train_tiny(run, config))[2] == whole


def test_weights_that_are_not_finite_after_the_last_step_are_not_kept(
    tmp_path, train_tiny, quick, monkeypatch
):
    monkeypatch.setitem(LIMITS, "learning_rate", ("any", lambda rate: True))
    config = replace(quick, iterations=1, warmup=0, learning_rate=1e39)
    with pytest.raises(UserError, match="not finite at iteration 1; nothing was saved"):
        train_tiny(tmp_path / "run", config)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_two_trainings_of_one_folder_leave_one_whole_run(tmp_path):
    fit = "--width 8 --multipliers 1 --blocks 1 --attention --batch-size 8 --warmup 2 --dropout 0"
    fit += " --iterations 60 --precision fp32 --log-every 5 --save-every 0"
    start = [sys.executable, "-m", "teachers.ddpm", *fit.split(), "--out", "run"]
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*start, "--seed", str(seed)], **options) for seed in (0, 1)]
    said = [process.communicate(timeout=120)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 2]
    (problem,) = filter(None, said)
    assert problem.count("\n") == 1
    assert "in use by" in problem or "other settings" in problem
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(5, 61, 5))
    winner = [process.returncode for process in both].index(0)
    assert load(tmp_path / "run")[1].training["settings"]["seed"] == winner


def test_a_killed_launchers_processes_end_by_themselves(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from diffusion.machine import end_with_launcher\n"
        "end_with_launcher()\n"
        "Path('pid' + os.environ['LOCAL_RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    launcher = "import subprocess, sys, os\n"
    launcher += "subprocess.run([sys.executable, 'work.py'], env=os.environ | {'LOCAL_RANK': '0'})"
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=tmp_path, env=ENVIRONMENT)
    pid, deadline = tmp_path / "pid0", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while files._alive(pid.read_text()):
        status = Path(f"/proc/{pid.read_text()}/stat").read_text()
        if status.rsplit(") ", 1)[1].startswith("Z"):  # ended, with nobody to ask
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
