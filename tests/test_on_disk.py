"""A folder larger than memory: the same rows, bits and fingerprint, in a tenth of its memory."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from diffusion import data, decoding
from diffusion.batches import Batches
from diffusion.console import UserError
from diffusion.data import Dataset
from diffusion.files import Damaged
from diffusion.image_file import Form
from diffusion.images import InMemory, some
from diffusion.machine import free_memory
from diffusion.on_disk import OnDisk

ROOT = Path(__file__).parents[1]


def write(folder: Path, count: int, size: int = 16) -> Path:
    """Photos of noise, in two folders; the third is broken, the fifth as the fourth."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=random)
    pixels[4] = pixels[3]
    for i, each in enumerate(pixels.numpy()):
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(place / f"{i:05d}.ppm")
    (folder / "a" / "00002.ppm").write_text("broken")
    return folder


@pytest.fixture
def both(tmp_path, monkeypatch) -> tuple[Dataset, Dataset, Path]:
    """The same folder with memory and without, and its cache on disk."""
    photos = write(tmp_path / "photos", 120)
    form = Form(8)
    memory = data.load(str(photos), form=form, classes=True)
    monkeypatch.setenv("FEWSTEP_MEMORY", "50kB")  # its pixels take 23 kB
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    disk = data.load(str(photos), form=form, classes=True)
    assert isinstance(memory.train, InMemory)
    assert isinstance(disk.train, OnDisk)
    return memory, disk, tmp_path / "cache" / "images"


def test_a_folder_on_disk_is_the_same_dataset_as_in_memory(both):
    memory, disk, _ = both
    assert (disk.spec, disk.codec, disk.kinds) == (memory.spec, memory.codec, memory.kinds)
    for mine, other in ((disk.train, memory.train), (disk.test, memory.test)):
        assert len(mine) == len(other)
        assert mine.shape == other.shape
        indices = torch.randperm(len(mine))
        rows, expected = mine.take(indices), other.take(indices)
        assert torch.equal(rows.images, expected.images)
        assert torch.equal(rows.condition["label"], expected.condition["label"])
        assert mine.fingerprint() == other.fingerprint()


def test_its_batches_are_those_from_memory(both, quick):
    memory, disk, _ = both
    mine, other = (
        Batches(dataset, replace(quick, flip=True), Accelerator(cpu=True), dataset.kinds)
        for dataset in (disk, memory)
    )
    for i in (0, 1, 5):
        assert torch.equal(mine.draw(i).x0, other.draw(i).x0)
    mine.close()


def test_it_is_decoded_once_and_read_from_the_cache_with_memory_or_without(both, monkeypatch):
    memory, _, _ = both

    def decode(*arguments) -> None:
        raise AssertionError("it was decoded before")

    monkeypatch.setattr(decoding.image_file, "read", decode)
    again = data.load(memory.spec.name, form=Form(8), classes=True)
    assert isinstance(again.train, OnDisk)
    monkeypatch.delenv("FEWSTEP_MEMORY")
    third = data.load(memory.spec.name, form=Form(8), classes=True)
    assert isinstance(third.train, InMemory)
    assert again.spec == third.spec == memory.spec
    assert torch.equal(third.train.images, memory.train.images)


def test_a_fingerprint_is_kept_and_is_anothers_where_what_is_known_differs(both, monkeypatch):
    _, disk, _ = both
    before = disk.train.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(OnDisk, "take", lambda *_: pytest.fail("its bytes were read again"))
        assert disk.train.fingerprint() == before
    other = {"label": 1 - disk.train.condition["label"]}
    assert replace(disk.train, condition=other).fingerprint() != before
    assert disk.test.fingerprint() != before


def test_a_row_that_changed_on_the_disk_is_refused_when_it_is_read(both):
    _, disk, cache = both
    (path,) = cache.glob("*.rows")
    content = bytearray(path.read_bytes())
    content[5 * 192 + 7] ^= 1  # of image 5
    path.write_bytes(content)
    assert len(disk.train.take(torch.arange(5)).images) == 5
    with pytest.raises(Damaged, match=f"{path} is damaged: delete it"):
        disk.train.take(torch.tensor([0, 5]))


def test_what_replaces_its_file_meanwhile_changes_nothing(both):
    memory, disk, cache = both
    (path,) = cache.glob("*.rows")
    (cache / "other").write_bytes(bytes(path.stat().st_size))
    os.replace(cache / "other", path)
    assert torch.equal(disk.train.take(torch.arange(9)).images, memory.train.images[:9])


def test_a_sample_of_it_is_no_larger_than_a_quarter_of_the_memory(both):
    memory, disk, _ = both
    images = some(disk.train).images
    assert 40 < len(images) <= 50_000 / 4 / 192
    assert images.nbytes <= free_memory() / 4
    assert len(some(memory.train).images) == len(memory.train)


def test_without_room_on_the_disk_the_mend_is_named(tmp_path, monkeypatch):
    photos = write(tmp_path / "photos", 20)
    monkeypatch.setenv("FEWSTEP_MEMORY", "1kB")
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="folder with more in the environment's FEWSTEP_CACHE"):
        data.load(str(photos), form=Form(8))


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8e9), ("500mb", 5e8), ("1.5k", 1500), ("2000", 2000), ("1 TB", 1e12)]
)
def test_the_memory_that_may_be_used_is_what_the_environment_says(monkeypatch, text, size):
    whole = free_memory()
    monkeypatch.setenv("FEWSTEP_MEMORY", text)
    assert free_memory() == pytest.approx(min(size, whole), rel=0.1)


@pytest.mark.parametrize("text", ["much", "", "-3GB", "0", "nan", "GB"])
def test_a_size_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("FEWSTEP_MEMORY", text)
    with pytest.raises(UserError, match="FEWSTEP_MEMORY must be a number of bytes such as 500MB"):
        free_memory()


TRAIN = """
import resource, sys
from teachers import ddpm
net = "--size=64 --width=8 --multipliers=1 --blocks=1 --patch=8 --attention --precision=fp32"
for name in ("few", "many"):
    run = f"--data={name} --out={name}-run --iterations=20 --batch-size=8"
    sys.argv[1:] = [*net.split(), *run.split()]
    ddpm.main()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_training_on_ten_times_the_memory_allowed_takes_no_more_than_that(tmp_path):
    """Beyond what the same training takes on a few of the images."""
    write(tmp_path / "few", 30, 64)
    write(tmp_path / "many", 9800, 64)  # 120 MB
    result = subprocess.run(
        [sys.executable, "-c", TRAIN],
        cwd=tmp_path,
        env=os.environ | {"FEWSTEP_MEMORY": "12MB", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    few, many = (float(line) for line in result.stdout.splitlines() if line.isdecimal())
    assert many - few < 12e6
