"""Many images in whole shards: what is killed goes on, and any number of processes shares them.

A shard is so many images of successive numbers. It is written whole or not at all, beside what the
folder held before, and takes its place when all shards are whole. So the state of a stopped call is
the shards that are there; which process makes which shard decides nothing.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from diffusion.console import UserError, say
from diffusion.files import (
    Damaged,
    Unwritable,
    append,
    atomic_path,
    read_json,
    write_atomic,
    write_json,
)
from diffusion.folders import MARK, check_claim, claim, read_mark, strangers, write_mark
from diffusion.owner import owned
from diffusion.pictures import png
from students.provenance import Texts


@dataclass(frozen=True)
class Batch:
    """Images made together, and what is known of each."""

    first: int
    """The number of its first image."""
    images: Tensor
    """(B, C, H, W) uint8 on the CPU."""
    facts: dict[str, np.ndarray]
    """What is known of each image, such as its label: by name, one value for each (B,)."""
    texts: Texts
    """What is said of all of them; empty where files are to say nothing."""

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.images))

    def texts_of(self, row: int) -> Texts:
        """What a file says of one image."""
        if not self.texts:
            return {}
        facts = {"number": self.first + row} | {k: v[row].item() for k, v in self.facts.items()}
        return self.texts | {name.capitalize(): str(value) for name, value in facts.items()}


def npz(batches: Iterable[Batch]) -> bytes:
    """An .npz: `images` N x H x W x C uint8, `number` and each fact by its name (N,), and what is
    said of all as the JSON text `provenance`."""
    parts = list(batches)
    images = torch.cat([part.images for part in parts]).permute(0, 2, 3, 1).contiguous()
    arrays = {"images": images.numpy()}
    arrays["number"] = np.concatenate([np.array(part.numbers) for part in parts])
    for name in parts[0].facts:
        arrays[name] = np.concatenate([part.facts[name] for part in parts])
    texts = parts[0].texts
    if texts:
        arrays["provenance"] = np.array(json.dumps(texts))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = texts.get("Software", "").encode()
    return buffer.getvalue()


def write_tar(path: Path, batches: Iterable[Batch]) -> None:
    """A shard of a WebDataset: for each image NNNNNN.png, .cls where it has a class, .txt where it
    has a prompt, and .json."""
    with atomic_path(path) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
        for batch in batches:
            for i, number in enumerate(batch.numbers):
                texts = batch.texts_of(i)
                files = {"png": png(batch.images[i], texts)}
                if "label" in batch.facts:
                    files["cls"] = str(batch.facts["label"][i]).encode()
                if "text" in batch.facts:
                    files["txt"] = str(batch.facts["text"][i]).encode()
                if texts:
                    files["json"] = json.dumps(texts).encode()
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def write_pictures(path: Path, batches: Iterable[Batch]) -> None:
    """A folder of PNGs, NNNNNN.png each, and where they have prompts a metadata.jsonl of them; it
    appears when all are on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}{UNDER_WAY}")
    part.mkdir()
    try:
        for batch in batches:
            for i, number in enumerate(batch.numbers):
                with open(part / PICTURE.format(number), "wb") as file:
                    file.write(png(batch.images[i], batch.texts_of(i)))
                    file.flush()
                    os.fsync(file.fileno())
            if "text" in batch.facts and batch.texts:
                append(part / CAPTIONS, _captions(batch))
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _captions(batch: Batch) -> str:
    """Lines as Hugging Face's image folders have them, and data.load reads them."""
    texts = batch.facts["text"].tolist()
    named = zip(map(PICTURE.format, batch.numbers), texts, strict=True)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in named]
    return "".join(f"{line}\n" for line in lines)


CAPTIONS = "metadata.jsonl"  # of a folder of PNGs that were made of prompts
PART = ".part"  # within the folder: the shards of a call under way
UNDER_WAY = ".under-way"
JOB = "job.json"  # within PART: what they are shards of, and whether they are taking their places
PICTURE = "{:06d}.png"
# By --format: the field of a folder's mark that counts its files, their names, what writes a shard.
FORMATS: dict[str, tuple[str, str, Callable[[Path, Iterable[Batch]], None]]] = {
    "png": ("pictures", PICTURE, write_pictures),
    "npz": ("npz", "images-{:06d}.npz", lambda path, batches: write_atomic(path, npz(batches))),
    "webdataset": ("webdataset", "images-{:06d}.tar", write_tar),
}


@dataclass(frozen=True)
class Job:
    """What decides the shards' content: a stopped call goes on where the job is the same."""

    num: int
    size: int
    """Images of a shard; the last may have fewer."""
    format: str
    about: dict
    """Whatever else an image's bits depend on, as JSON."""

    @property
    def identity(self) -> str:
        text = json.dumps([self.num, self.size, self.format, self.about], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def shards(self) -> list[range]:
        """The images' numbers, shard by shard."""
        return [
            range(start, min(start + self.size, self.num))
            for start in range(0, self.num, self.size)
        ]

    @property
    def count(self) -> int:
        """How many files it ends as."""
        return self.num if self.format == "png" else len(self.shards)


def files_before(folder: Path) -> list[Path]:
    """The files that an earlier call made. UserError where the folder holds anything else."""
    check_claim(folder, "pictures")
    mark = read_mark(folder)
    made = [
        name.format(i) for field, name, _ in FORMATS.values() for i in range(mark.get(field, 0))
    ]
    if mark.get("captions"):
        made.append(CAPTIONS)
    if others := strangers(folder, {*made, PART}):
        raise UserError(
            f"{folder} holds {others[0]}, which students.generate did not make: expected a new or "
            "empty folder, or one of its pictures alone; give another --out"
        )
    return [folder / name for name in made if (folder / name).exists()]


def write_shards(
    folder: Path, job: Job, make: Callable[[list[range]], Iterator[Batch]], patience: float = 0.2
) -> None:
    """The job's images in the folder, in the place of those that an earlier call made.

    make: the batches of images of these numbers, of which none reaches into two shards. Each of
    several processes makes every so manyth of the shards that are missing. Where it fails before
    any shard is whole, everything is as it was; else the whole shards are kept, and the same call
    goes on from them.
    patience: seconds between the first process's looks for the others' shards.
    """
    processes, before, marked = PartialState(), files_before(folder), (folder / MARK).exists()
    part, (_, name, write) = folder / PART, FORMATS[job.format]
    name = "{:06d}" if job.format == "png" else name  # a folder of pictures
    paths = [part / name.format(i) for i in range(len(job.shards))]
    with owned(folder):
        missing: list[int] = []
        if processes.is_main_process:
            claim(folder, "pictures")
            missing = _begin(part, job, paths)
        with _kept(folder, paths, marked):
            (missing,) = broadcast_object_list([missing])
            mine = missing[processes.process_index :: processes.num_processes]
            batches = make([job.shards[i] for i in mine])
            for i in mine:
                write(paths[i], _until(batches, job.shards[i].stop))
            if processes.is_main_process:
                while missing and not all(path.exists() for path in paths):
                    time.sleep(patience)  # the launcher ends a failed launch
                _finish(folder, job, paths, before)


def _until(batches: Iterator[Batch], stop: int) -> Iterator[Batch]:
    """The batches up to the one whose last number comes before stop."""
    for batch in batches:
        yield batch
        if batch.numbers.stop == stop:
            return


def _begin(part: Path, job: Job, paths: list[Path]) -> list[int]:
    """The shards that are missing, once what others jobs and killed writers left is deleted."""
    if _of_job(part).get("identity") != job.identity:
        shutil.rmtree(part, ignore_errors=True)
    part.mkdir(exist_ok=True)
    if _of_job(part).get("moving"):
        return []
    write_json(part / JOB, {"identity": job.identity})
    for left in part.glob(f"*{UNDER_WAY}"):
        shutil.rmtree(left)
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    if whole := len(paths) - len(missing):
        say(f"{part.parent}: {whole} of {len(paths)} shards are whole already: going on")
    return missing


def _of_job(part: Path) -> dict:
    try:
        return read_json(part / JOB)
    except (OSError, Damaged):
        return {}


def _finish(folder: Path, job: Job, paths: list[Path], before: list[Path]) -> None:
    """All shards are whole: they take the place of what was there before."""
    part, field, mark = folder / PART, FORMATS[job.format][0], read_mark(folder)
    if not _of_job(part).get("moving"):
        if before:
            say(f"{folder}: the {len(before)} files of an earlier call are replaced")
        counts = {each: mark.get(each, 0) for each, _, _ in FORMATS.values()}
        # from here on all that is there is known as ours
        counts |= {field: max(job.count, counts[field]), "captions": 1}
        write_mark(folder, "pictures", counts)
        for path in before:
            path.unlink()
        # and from here on what is there is of this job: a call that goes on must not delete it
        write_json(part / JOB, {"identity": job.identity, "moving": True})
    files = [path / CAPTIONS for path in paths if (path / CAPTIONS).exists()]
    if files:
        write_atomic(folder / CAPTIONS, "".join(file.read_text() for file in files))
    for path in filter(Path.exists, paths):
        for file in path.iterdir() if path.is_dir() else [path]:
            if file.name != CAPTIONS:
                os.replace(file, folder / file.name)
    write_mark(folder, "pictures", {field: job.count, "captions": len(files)})
    (part / JOB).unlink()  # first: what is left of the others is then nobody's
    shutil.rmtree(part)


@contextmanager
def _kept(folder: Path, paths: list[Path], marked: bool) -> Generator[None]:
    """An error keeps the shards that are whole, but those of images that cannot be made; where
    none is, it leaves the folder as it was."""
    try:
        yield
    except BaseException as error:
        if PartialState().is_main_process and folder.exists():
            cannot = isinstance(error, UserError) and not isinstance(error, Unwritable)
            moving = _of_job(folder / PART).get("moving")
            if cannot or (not moving and not any(path.exists() for path in paths)):
                shutil.rmtree(folder / PART, ignore_errors=True)
                if not marked:
                    (folder / MARK).unlink(missing_ok=True)
            else:
                say(f"{folder}: the shards that are whole are kept; the same command goes on")
        raise


def shared(job: Job, make: Callable[[list[range]], Iterator[Batch]]) -> list[Batch]:
    """All batches of a job, in order, in every process, each of which makes its share."""
    processes = PartialState()
    mine = job.shards[processes.process_index :: processes.num_processes]
    batches = gather_object([*make(mine)])
    return sorted(batches, key=lambda batch: batch.first)
