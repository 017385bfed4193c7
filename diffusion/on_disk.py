"""Images larger than memory: each is decoded once, into a file of rows, which workers read.

To decode a photograph takes a core milliseconds, to read its row microseconds: a GPU would wait for
a dozen cores that decode every batch anew. Rows are read by `pread`, not mapped: a mapped file
counts as the process's memory, and a file that is cut short under its map ends the process.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from diffusion.files import Damaged, Unwritable, read_json, write_json
from diffusion.images import Rows

WORKERS = 8  # threads that read: what they wait for is the disk
SHARE = 32  # rows that one thread reads at a time


@dataclass(frozen=True, eq=False)
class OnDisk:
    """Images in a file, row after row, each read and checked when it is asked for."""

    path: Path
    file: BinaryIO
    """Open: what was renamed in its place since is another file."""
    shape: tuple[int, int, int]
    places: np.ndarray
    """(N,) int64: the row in the file of each image."""
    digests: np.ndarray
    """(rows in the file,) uint64: what `digest` gives of each."""
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    """(N, ...) each, in memory."""
    device = torch.device("cpu")
    slow = True

    def __len__(self) -> int:
        return len(self.places)

    def take(self, indices: Tensor) -> Rows:
        """Those rows. Damaged where one is not what was written."""
        which = indices.numpy()
        images = np.empty((len(which), math.prod(self.shape)), np.uint8)

        def read(start: int) -> None:
            for row, place in enumerate(self.places[which[start : start + SHARE]], start):
                count = os.preadv(self.file.fileno(), [images[row]], place * images.shape[1])
                if count < images.shape[1] or digest(images[row]) != self.digests[place]:
                    raise Damaged(
                        f"{self.path} is damaged: delete it, and the same command decodes the "
                        "images anew"
                    )

        for _ in _readers().map(read, range(0, len(which), SHARE)):
            pass
        known = {name: rows[indices] for name, rows in self.condition.items()}
        return Rows(torch.from_numpy(images).view(-1, *self.shape), known)

    def near(self, device: torch.device) -> "OnDisk":
        return self

    def only(self, which: Tensor, condition: Mapping[str, Tensor]) -> "OnDisk":
        """The images at these indices, and what is known of them."""
        return replace(self, places=self.places[which.numpy()], condition=condition)

    def fingerprint(self) -> str:
        """As InMemory has it. Each byte is read once for it; the result is kept beside the file."""
        known = hashlib.sha256(self.digests.tobytes() + self.places.tobytes())
        for name in sorted(self.condition):
            known.update(self.condition[name].contiguous().numpy())
        key, kept = known.hexdigest(), self.path.with_suffix(".json")
        with suppress(OSError, Damaged):
            if (read := read_json(kept).get(key)) is not None:
                return read
        whole = hashlib.sha256()
        for rows in self.in_turn():
            whole.update(rows.numpy())
        for name in sorted(self.condition):
            whole.update(self.condition[name].contiguous().numpy())
        with suppress(Unwritable):
            write_json(kept, {key: whole.hexdigest()})
        return whole.hexdigest()

    def in_turn(self, size: int = 1024) -> Iterator[Tensor]:
        """All images, so many at a time."""
        for some in torch.arange(len(self)).split(size):
            yield self.take(some).images


def digest(row: np.ndarray) -> int:
    """What a row of the file is known by: the same of equal pixels."""
    return xxhash.xxh3_64_intdigest(row.data)


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, "rows")
