"""From images of any kind, as a place lists them, to rows of one form: each is decoded once."""

import hashlib
import json
import math
import os
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
import torch

from diffusion import image_file
from diffusion.console import UserError, say, track
from diffusion.files import Damaged, Unwritable, atomic_path, load_tensors, save_tensors, unwritable
from diffusion.image_file import Form, Picture
from diffusion.images import InMemory, parts
from diffusion.machine import free_memory, in_bytes, workers
from diffusion.on_disk import OnDisk, digest
from diffusion.owner import alone

VERSION = 2  # the way that rows are made of an image: another number makes the caches anew
SLOW = 2**24  # bytes of files, above which progress is shown
SIZES = 100_000  # different widths and heights that are counted
REASONS, NAMES = 8, 4  # that a line gives at most, and names for each
IN_MEMORY = 1 / 4  # of what is free, that images may take: training, test and work need theirs

Reasons = dict[str, list[str]]
"""Why images were left out -> their names."""


class Labels(NamedTuple):
    """The class of each image, and the classes' names."""

    numbers: list[int]
    names: list[str]


def numbered(classes: Sequence[str]) -> Labels:
    """Classes in alphabetical order; those that are numbers are those, counted from 0."""
    names = sorted(set(classes))
    if all(name.isdecimal() and int(name) < 10**6 for name in names):
        names = [str(number) for number in range(max(map(int, names)) + 1)]
        return Labels([int(each) for each in classes], names)
    number = {name: i for i, name in enumerate(names)}
    return Labels([number[each] for each in classes], names)


@dataclass(frozen=True)
class Listing:
    """The images of a place, found and not opened yet."""

    name: str
    """The name by which a card knows the place, wherever a command is started."""
    place: str
    """The place in words for the user."""
    names: Sequence[str]
    """One for each image."""
    open: Callable[[int], Path | BinaryIO]
    """Image i's file, or its content."""
    key: str
    """Another whenever any image is another."""
    bytes: int
    """The size of all the files together."""
    labels: Callable[[Sequence[int]], Labels]
    """The classes of the images of these numbers. UserError where one has none."""
    captions: Callable[[Sequence[int]], list[str]]
    """Their captions, "" where one has none."""
    passed: Reasons = field(default_factory=dict)
    """What lies there too and is no image of the user's."""
    held_out: range | None = None
    """The images that are not to be trained on; None where the place does not say."""


@dataclass
class Tally:
    """What images were before they were brought to one form: how many of each."""

    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    """How many are of each width and height, such as "640x480"."""
    turned: int = 0
    """How many their EXIF tag turned upright."""

    def add(self, picture: Picture) -> None:
        self.modes[picture.mode] += 1
        size = "{}x{}".format(*picture.size)
        if size in self.sizes or len(self.sizes) < SIZES:
            self.sizes[size] += 1
        self.turned += picture.turned

    @staticmethod
    def from_json(values: dict) -> "Tally":
        return Tally(Counter(values["modes"]), Counter(values["sizes"]), values["turned"])


class Decoded(NamedTuple):
    """The images of a listing that could be read, in its order."""

    images: InMemory | OnDisk
    taken: list[int]
    """The number of each in the listing."""
    skipped: Reasons
    tally: Tally
    repeated: int
    """Images whose pixels are those of one before."""


def decode(listing: Listing, form: Form, cache: Path) -> Decoded:
    """Its images: in memory where a quarter of what is free holds them, else in the cache's file.

    cache: a folder; what was decoded before is not decoded again while the listing is the same.
    UserError where none can be read, or neither memory nor disk holds them.
    """
    asked = [VERSION, PIL.__version__, asdict(form), listing.key]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    place = json.dumps([listing.name, asdict(form)])
    index = cache / f"{hashlib.sha256(place.encode()).hexdigest()[:16]}.safetensors"
    job = _Job(listing, form, index, key)
    decoded = job.kept()
    if decoded is None:
        with alone(index) as writable:  # other processes and commands wait for the one that decodes
            decoded = job.kept() or job.decode(writable)
    if not len(decoded.images):
        total = len(listing.names)
        why = f": {listed(decoded.skipped)}" if decoded.skipped else ""
        raise UserError(f"none of the {total} image files in {listing.place} could be read{why}")
    return decoded


@dataclass(frozen=True)
class _Job:
    """One listing to be decoded, and the two files of the cache that hold it: rows, then index.

    An index is written when its rows are whole, and holds a digest of each.
    """

    listing: Listing
    form: Form
    index: Path
    key: str

    @property
    def rows(self) -> Path:
        return self.index.with_suffix(".rows")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.form.channels, self.form.size, self.form.size

    def kept(self) -> Decoded | None:
        """What was decoded before; None where that is nothing, or damaged, or of other images."""
        try:
            tensors, about = load_tensors(self.index)
            if about["key"] != self.key:
                return None
            digests = tensors["digests"].numpy().view(np.uint64)
            skipped, tally = json.loads(about["skipped"]), json.loads(about["tally"])
            images = self.read(digests)
        except Damaged as error:
            say(f"{error}: the images are decoded anew")
            return None
        except (OSError, LookupError, ValueError):
            return None
        return self.result(images, digests, skipped, Tally.from_json(tally))

    def read(self, digests: np.ndarray) -> InMemory | OnDisk:
        file = open(self.rows, "rb")  # noqa: SIM115  as long as its images
        if os.fstat(file.fileno()).st_size != len(digests) * math.prod(self.shape):
            raise Damaged(f"{self.rows} has another length than was written")
        there = OnDisk(self.rows, file, self.shape, np.arange(len(digests)), digests)
        if not _fits(len(digests) * math.prod(self.shape)):
            return there
        images, count = torch.empty(len(digests), *self.shape, dtype=torch.uint8), 0
        for part in parts(there, len(digests)):
            images[count : count + len(part)] = part
            count += len(part)
        return InMemory(images)

    def decode(self, writable: bool) -> Decoded:
        """In memory and, if that can be, on disk; or on disk alone, as they come."""
        total, row = len(self.listing.names), math.prod(self.shape)
        fits = _fits(total * row)
        digests = np.empty(total, np.uint64)
        skipped, tally, again, count = defaultdict(list), Tally(), False, 0
        images = torch.empty(total if fits else 0, *self.shape, dtype=torch.uint8)

        def pictures() -> Iterator[np.ndarray]:
            nonlocal count, again
            for i, picture in self.each():
                if isinstance(picture, Picture):
                    pixels = picture.pixels.contiguous().numpy().reshape(-1)
                    digests[count] = digest(pixels)
                    tally.add(picture)
                    count += 1
                    yield pixels
                else:
                    why = image_file.reason(picture)
                    skipped[why].append(self.listing.names[i])
                    again |= isinstance(picture, MemoryError) or bool(
                        getattr(picture, "errno", None)
                    )

        if fits:
            for i, pixels in enumerate(pictures()):
                images[i] = torch.from_numpy(pixels).view(self.shape)
            source, digests = InMemory(images[:count]), digests[:count]
            if count and writable and not again:  # what may be read another time is tried again
                with suppress(Unwritable):  # a full disk, or a home that is not ours
                    self.write([source.images.numpy()])
                    self.seal(digests, skipped, tally)
        else:
            self.require_disk(total * row, writable)
            self.write(pictures())
            digests = digests[:count]
            if not again:
                self.seal(digests, skipped, tally)
            source = self.read(digests)
        return self.result(source, digests, skipped, tally)

    def write(self, rows: Iterator[np.ndarray] | list[np.ndarray]) -> None:
        try:
            self.index.unlink(missing_ok=True)  # it is not of what comes now
        except OSError as error:
            raise unwritable(self.index, error) from error
        with atomic_path(self.rows) as part, open(part, "wb") as file:
            for row in rows:
                file.write(row.data)

    def seal(self, digests: np.ndarray, skipped: Reasons, tally: Tally) -> None:
        about = {"skipped": json.dumps(skipped), "tally": json.dumps(vars(tally))}
        tensors = {"digests": torch.from_numpy(digests.view(np.int64))}
        save_tensors(self.index, tensors, {"key": self.key} | about)

    def require_disk(self, size: int, writable: bool) -> None:
        """UserError where the cache's disk has no room for so many bytes."""
        folder = next(path for path in self.index.parents if path.is_dir())
        free = shutil.disk_usage(folder).free if writable else 0
        if free < size:
            raise UserError(
                f"the images of {self.listing.place} take {in_bytes(size)} at --size "
                f"{self.form.size}, more than a quarter of the {in_bytes(free_memory())} of memory "
                f"that are free, and {self.index.parent} has room for {in_bytes(free)}: name a "
                "folder with more in the environment's FEWSTEP_CACHE, or give a lower --size"
            )

    def result(
        self, images: InMemory | OnDisk, digests: np.ndarray, skipped: Reasons, tally: Tally
    ) -> Decoded:
        left_out = {name for names in skipped.values() for name in names}
        taken = [i for i, name in enumerate(self.listing.names) if name not in left_out]
        return Decoded(images, taken, skipped, tally, len(digests) - len(np.unique(digests)))

    def each(self) -> Iterator[tuple[int, Picture | Exception]]:
        """(0, 1, ..., the image or what its decoder raised), by all cores."""

        def one(i: int) -> Picture | Exception:
            try:
                return image_file.read(self.listing.open(i), self.form)
            except Exception as error:  # decoders raise anything
                return error

        total = len(self.listing.names)
        with image_file.unlimited():
            results = enumerate(_in_turn(one, range(total)))
            if self.listing.bytes > SLOW:
                name = Path(self.listing.place).name or self.listing.place
                results = track(results, name, lambda r: (r[0] + 1, total, "images read"))
            yield from results


def _in_turn(one: Callable[[int], Picture | Exception], items: range) -> Iterator:
    """one(item) of each, in order, by threads that are never far ahead of who takes them."""
    pool, queue = ThreadPoolExecutor(workers()), deque()
    try:
        waiting = (pool.submit(one, item) for item in items)
        queue.extend(islice(waiting, 16 * workers()))
        while queue:
            done = queue.popleft().result()
            queue.extend(islice(waiting, 1))
            yield done
    finally:
        pool.shutdown(cancel_futures=True)


def _fits(size: int) -> bool:
    return size <= IN_MEMORY * free_memory()


def also(passed: Reasons) -> str:
    return f"; passed over: {listed(passed)}" if passed else ""


def listed(reasons: Reasons) -> str:
    """Such as: 2 cut short (a.png, b.png), 1 hidden (.d); of other suffixes, how many of each."""
    words = []
    order = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    for reason, names in order[:REASONS]:
        first = sorted(names)[:NAMES]
        if reason == "with other suffixes":
            suffixes = Counter(Path(name).suffix.lower() or "none" for name in names)
            first = [f"{suffix} {count:,}" for suffix, count in suffixes.most_common(NAMES)]
            more = len(suffixes) > NAMES
        else:
            more = len(names) > NAMES
        examples = ", ".join(first) + ", ..." * more
        words.append(f"{len(names):,} {reason} ({examples})")
    rest = sum(len(names) for _, names in order[REASONS:])
    return ", ".join(words) + f", {rest:,} for other reasons" * bool(rest)
