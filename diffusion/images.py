"""Images: a source that is asked for rows, in memory or not."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.condition import Kinds, Small
from diffusion.machine import free_memory

SAMPLE = 60_000  # images, evenly spread, that stand for a source in scales, features and copies


class Rows(NamedTuple):
    images: Tensor
    """(B, C, H, W) uint8."""
    condition: Mapping[str, Tensor]
    """What is known of each image, by name, as diffusion.condition has it; empty for nothing."""


class Source(NamedTuple):
    """Images to train on, images held out, and the kinds of what is known of each."""

    train: "Images"
    test: "Images"
    kinds: Kinds
    captions: Sequence[Sequence[str]] = ((), ())
    """The caption of each image of either, "" for none; empty where nobody looked for any."""


class Images(Protocol):
    """A source of images, however large."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def device(self) -> torch.device:
        """Where its rows are, and the indices that it is asked by."""

    @property
    def slow(self) -> bool:
        """Whether rows are worth fetching ahead, by a thread."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Rows:
        """Those rows, in that order."""

    def near(self, device: torch.device) -> "Images":
        """The same source as near to a device as its size allows."""

    def fingerprint(self) -> str:
        """A sha256 by which the same images are known, wherever they lie."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images in one tensor, on the device where a quarter of its free memory holds them."""

    images: Tensor
    """(N, C, H, W) uint8."""
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    """(N, ...) each."""
    slow = False

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def device(self) -> torch.device:
        return self.images.device

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> Rows:
        return Rows(
            self.images[indices], {name: rows[indices] for name, rows in self.condition.items()}
        )

    def only(self, which: Tensor, condition: Mapping[str, Tensor]) -> "InMemory":
        """The images at these indices, and what is known of them."""
        return InMemory(self.images[which], condition)

    def near(self, device: torch.device) -> "InMemory":
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            device = device if self.images.nbytes < free / 4 else torch.device("cpu")
        moved = {name: rows.to(device) for name, rows in self.condition.items()}
        return InMemory(self.images.to(device), moved)

    def fingerprint(self) -> str:
        """sha256 over the bytes of the images, and of what is known of them."""
        digest = hashlib.sha256(self.images.contiguous().numpy())
        for name in sorted(self.condition):
            digest.update(self.condition[name].contiguous().numpy())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Texts:
    """A text for each image, each different one encoded once."""

    table: Tensor
    """(U, L, D) float16; zeros for no text."""
    which: Tensor
    """(N,) int64: each image's row of the table."""
    sha256: str
    """Identity of the images' texts and of their encoder."""
    words: Sequence[str]
    """The U texts, "" for none."""

    def take(self, indices: Tensor) -> Tensor:
        """The texts of images number `indices`: (B, L, D) float32 on the indices' device."""
        rows = self.which[indices.to(self.which.device)]
        return self.table[rows.to(self.table.device)].to(indices.device).float()


@dataclass(frozen=True, eq=False)
class _Around:
    """Images, of whatever source, of which more is known."""

    images: Images

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def slow(self) -> bool:
        return self.images.slow

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class Captioned(_Around):
    """Images, of whatever source, with a text each."""

    texts: Texts

    def captions(self, indices: Tensor) -> list[str]:
        """The captions of images number `indices`, "" for none."""
        return [self.texts.words[i] for i in self.texts.which.cpu()[indices.cpu()].tolist()]

    def take(self, indices: Tensor) -> Rows:
        rows = self.images.take(indices)
        return rows._replace(condition={**rows.condition, "text": self.texts.take(indices)})

    def near(self, device: torch.device) -> "Captioned":
        """Where the device is a GPU, the texts go there if an eighth of its free memory holds
        them."""
        images, table = self.images.near(device), self.texts.table
        if device.type == "cuda" and table.nbytes < torch.cuda.mem_get_info(device)[0] / 8:
            table = table.to(device)
        which = self.texts.which.to(table.device)
        return Captioned(images, replace(self.texts, table=table, which=which))

    def fingerprint(self) -> str:
        """A sha256 of the images' own and of the texts': what encodes them rounds them otherwise on
        another machine, and they are the same."""
        both = f"{self.images.fingerprint()} {self.texts.sha256}"
        return hashlib.sha256(both.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Reduced(_Around):
    """Images, of whatever source, with conditions that are made of their pixels."""

    kinds: Mapping[str, Small]

    def take(self, indices: Tensor) -> Rows:
        rows = self.images.take(indices)
        made = {name: kind.of(rows.images) for name, kind in self.kinds.items()}
        return rows._replace(condition={**rows.condition, **made})

    def near(self, device: torch.device) -> "Reduced":
        return replace(self, images=self.images.near(device))

    def fingerprint(self) -> str:
        return self.images.fingerprint()


def with_conditions(images: Images, kinds: Kinds) -> Images:
    """The images, with the conditions of these kinds that their pixels give."""
    small = {name: kind for name, kind in kinds.items() if isinstance(kind, Small)}
    return Reduced(images, small) if small else images


def spread(images: Images, most: int) -> Tensor:
    """The indices of at most so many images, evenly spread over the source, in its order."""
    count = min(len(images), most)
    return (torch.arange(count) * len(images)) // max(count, 1)


def some(images: Images, most: int | None = None) -> Rows:
    """At most so many rows, evenly spread.

    By default all of a source in memory, which are then not copied; of a slow one SAMPLE, or as
    many as a quarter of the free memory holds. Their texts, which are larger than images, are not
    among them.
    """
    if isinstance(images, Captioned):
        return some(images.images, most)
    fits = int(free_memory() / 4 / math.prod(images.shape))
    count = most or (max(2, min(SAMPLE, fits)) if images.slow else len(images))
    if isinstance(images, InMemory) and count >= len(images):
        return Rows(images.images, images.condition)
    return images.take(spread(images, count))


def parts(images: Images, most: int | None = None) -> Iterator[Tensor]:
    """At most so many images, SAMPLE by default, evenly spread, a megabyte or one at a time."""
    size = max(1, 2**20 // math.prod(images.shape))
    for which in spread(images, most or SAMPLE).split(size):
        yield images.take(which.to(images.device)).images


class Ahead:
    """Fetches the rows of the batch to come by a thread, while those of this one are used."""

    def __init__(self, images: Images, which: Callable[[int], Tensor], batches: int):
        """which: number of a batch -> the indices of its images. batches: how many there are."""
        self.images, self.which, self.batches = images, which, batches
        self.thread = ThreadPoolExecutor(1, "images")
        self.coming: tuple[int, Future] | None = None

    def take(self, i: int) -> Rows:
        """The rows of batch i; batches are best asked for in turn."""
        awaited = self.coming[1] if self.coming and self.coming[0] == i else None
        rows = awaited.result() if awaited else self.images.take(self.which(i))
        self.coming = None
        if i + 1 < self.batches:
            self.coming = i + 1, self.thread.submit(self.images.take, self.which(i + 1))
        return rows

    def close(self) -> None:
        """Wait for what is being fetched: a source is asked by one at a time."""
        self.thread.shutdown(wait=True, cancel_futures=True)
