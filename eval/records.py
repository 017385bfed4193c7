"""One record per row of the table: what was measured, of what, on what; JSON lines on disk."""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch

from diffusion.checkpoint import write_atomic
from diffusion.console import UserError

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """A measured row. Times are seconds; lists hold one figure per seed or per repeat."""

    run: str
    method: str
    sha256: str
    """Of the checkpoint's weights."""
    parent: str | None
    sampler: str
    steps: int
    """Of the sampler."""
    own: bool
    """Whether it is the checkpoint's own plan, not a solver's on the teacher."""
    angles: list[float]
    nfe: int
    """Network calls per image, counted."""
    metric: str
    extractor: dict
    """sha256, and the accuracy of a classifier."""
    num_images: int
    seeds: list[int]
    quality: list[float]
    floor: list[float]
    """The metric of as many real images, over repeated draws."""
    batch_size: int
    batch_seconds: list[float]
    """Noise to uint8, one whole batch, synchronised."""
    single_seconds: list[float]
    """The same at batch 1."""
    parameters: int
    environment: dict
    others: dict[str, list[float]] = field(default_factory=dict)
    """Further figures, one per seed."""
    held_out: dict[str, float] = field(default_factory=dict)
    """The same figures of held-out real images: what a good model should come near to."""
    format: int = FORMAT

    @property
    def key(self) -> tuple:
        """What makes a measurement the same: measured again, it is skipped."""
        place = json.dumps(self.environment, sort_keys=True)
        what = (self.sha256, self.sampler, tuple(self.angles), self.metric, self.num_images)
        return *what, tuple(self.seeds), self.batch_size, place

    @property
    def tag(self) -> str:
        """The key's name in samples.safetensors."""
        return hashlib.sha256(repr(self.key).encode()).hexdigest()[:16]

    @property
    def further(self) -> dict[str, float]:
        """Means of the further figures over the seeds."""
        return {name: mean(figures) for name, figures in self.others.items()}

    @property
    def score(self) -> float:
        return mean(self.quality)

    @property
    def spread(self) -> float:
        return stdev(self.quality) if len(self.quality) > 1 else 0.0


def environment(device: torch.device, precision: str) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    facts = {"device": name, "precision": precision, "torch": torch.__version__}
    return facts | {"threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read(path: Path) -> list[Record]:
    """The records of a results file; none where there is no file."""
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not a record of format {FORMAT} ({error})"
            ) from error
    return records


def write(path: Path, records: list[Record]) -> None:
    write_atomic(path, "".join(json.dumps(asdict(record)) + "\n" for record in records))
