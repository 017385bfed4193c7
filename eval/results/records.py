"""One record per row of the table: what was measured, of what, on what; JSON lines on disk."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

from diffusion.checkpoint import write_atomic
from diffusion.console import UserError
from eval.measure.timing import Timing
from eval.results import schema

FORMAT = 2
LONG = (
    100  # steps; a teacher's own plan of more may be judged on fewer images than its table's rest
)
ENOUGH = 16  # steps; a teacher's row of as many can then stand in for that plan


@dataclass(frozen=True)
class Record:
    """A measured row; lists hold one figure per seed."""

    run: str
    method: str
    sha256: str
    """Identity of the checkpoint's weights."""
    parent: str | None
    sampler: str
    steps: int
    """Steps of the sampler."""
    own: bool
    """Whether it is the checkpoint's own plan, not a solver's on the teacher."""
    angles: list[float]
    parameters: int
    training: dict
    """Iterations, images seen and seconds of the checkpoint's own training."""
    data: dict
    """The real images: name, split and number of those that all is measured against."""
    metric: str
    extractor: dict
    """sha256, and the accuracy of a classifier."""
    num_images: int
    seeds: list[int]
    floor: list[float]
    """The metric of as many real images, over repeated draws."""
    held_out: dict[str, float]
    """The further figures of held-out real images: what a good model should come near to."""
    batch_size: int
    """Batch size of the table's images/s."""
    environment: dict
    """Device, precision, threads and versions: what a time depends on."""
    nfe: int = 0
    """Network calls per image, counted."""
    quality: list[float] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=dict)
    """Further figures by name."""
    likelihood: dict[str, float] = field(default_factory=dict)
    """A teacher's bits per dimension of held-out images."""
    timings: list[Timing] = field(default_factory=list)
    """At batch 1, at batch_size, and of a sweep over batch sizes."""
    conditions: dict = field(default_factory=dict)
    """When it was measured, and at which clocks."""
    format: int = FORMAT

    @property
    def key(self) -> tuple:
        """What makes a measurement the same: measured again, it is skipped."""
        place = json.dumps([self.environment, self.data], sort_keys=True)
        what = (self.sha256, self.sampler, tuple(self.angles), self.metric, self.num_images)
        return *what, tuple(self.seeds), self.batch_size, place

    @property
    def tag(self) -> str:
        """The key's name in samples.safetensors."""
        return hashlib.sha256(repr(self.key).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """What made it, and the solver that is not its own."""
        return self.method if self.own else f"{self.method}, {self.sampler}"

    @property
    def long(self) -> bool:
        """Whether it is a teacher's own plan of very many steps."""
        return self.own and self.parent is None and self.steps > LONG

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

    def timing(self, batch_size: int) -> Timing | None:
        """The repeats at that batch size, where there are any."""
        found = (t for t in self.timings if t.batch_size == batch_size and t.seconds)
        return next(found, None)

    @property
    def single(self) -> Timing | None:
        return self.timing(1)

    @property
    def batch(self) -> Timing | None:
        return self.timing(self.batch_size)

    @property
    def best(self) -> Timing | None:
        """The batch size of the highest throughput."""
        whole = [timing for timing in self.timings if timing.seconds]
        return max(whole, key=lambda timing: timing.images_per_second, default=None)


def setting(record: Record, times: bool = True, most: int = 0) -> dict[str, str]:
    """What two rows of one table must have in common, by name. times: whether it shows times.

    most: images of the table's other rows; a long plan of fewer counts as one of as many.
    """
    images = max(record.num_images, most) if record.long else record.num_images
    extractor, real = record.extractor["sha256"][:8], record.data
    pixels = f" {real['sha256'][:8]}" if "sha256" in real else ""
    found = {
        "metric": record.metric if extractor in record.metric else f"{record.metric} {extractor}",
        "real images": f"{real['images']} of {Path(real['name']).name} {real['split']}{pixels}",
        "num images": str(images),
        "seeds": " ".join(map(str, record.seeds)),
    }
    if times:
        found["batch size"] = str(record.batch_size)
        found |= {name: str(value) for name, value in sorted(record.environment.items())}
    return found


def most_images(records: list[Record]) -> int:
    """The most images that a row is judged on, long plans apart; 0 where there are no other rows."""
    return max((record.num_images for record in records if not record.long), default=0)


def fullest(records: list[Record]) -> Record:
    """The first row that is judged on as many images as any."""
    return max(records, key=lambda record: record.num_images)


def require_comparable(records: list[Record], times: bool = True) -> None:
    """UserError where rows cannot share a table, with the rows and what they differ in."""
    names = [f"{title} {r.steps}" for title, r in zip(titles(records), records, strict=True)]
    found = [setting(record, times, most_images(records)) for record in records]
    differ = [name for name in _keys(found) if len({each.get(name) for each in found}) > 1]
    if not differ:
        return
    groups: dict[str, list[str]] = {}
    for name, each in zip(names, found, strict=True):
        what = _some([f"{key} {each.get(key, 'unknown')}" for key in differ])
        groups.setdefault(what, []).append(name)
    kinds = [f"{what} in {_some(rows)}" for what, rows in groups.items()]
    mend = "measure them alike"
    if times and not {*differ} & {*setting(records[0], times=False)}:
        mend += ", or leave the times out with --no-times"
    raise UserError(f"these rows cannot share a table: {_some(kinds, '; ')}: {mend}")


def titles(records: list[Record]) -> list[str]:
    """A name for each row's method; where two of one title and steps would be mixed up, with what
    tells them apart: a folder, the machine, or in the end the weights' sha256, in brackets."""
    apart: dict[str, list[str]] = {}
    places = [_place(record) for record in records]
    for title in {record.title for record in records}:
        same = [i for i, record in enumerate(records) if record.title == title]

        def kinds(keys: list[str], same=same) -> int:
            return len({(records[i].steps, *(places[i].get(k) for k in keys)) for i in same})

        keys: list[str] = []
        for key in _keys([places[i] for i in same]):
            if kinds([*keys, key]) > kinds(keys):
                keys.append(key)
        apart[title] = keys
    found = []
    for record, place in zip(records, places, strict=True):
        words = [place[key] for key in apart[record.title] if key in place]
        found.append(record.title + (f" [{', '.join(words)}]" if words else ""))
    return found


def _place(record: Record) -> dict[str, str]:
    """Where and on what it was measured, the parts of its path from the last to the first."""
    path = {f"part {i}": part for i, part in enumerate(reversed(Path(record.run).parts))}
    first = {"device": record.environment["device"], "precision": record.environment["precision"]}
    sizes = {"batch": f"batch {record.batch_size}", "sha256": record.sha256[:8]}
    return (
        path
        | first
        | {k: f"{k} {v}" for k, v in record.environment.items() if k not in first}
        | sizes
    )


def _keys(found: list[dict]) -> list[str]:
    return list(dict.fromkeys(key for each in found for key in each))


def _some(words: list[str], between: str = ", ", most: int = 3) -> str:
    more = [f"and {len(words) - most} more"] if len(words) > most else []
    return between.join(words[:most]) + "".join(f" {word}" for word in more)


def merge(lists: Iterable[list[Record]]) -> list[Record]:
    """Every measurement once, of equals the latest; teachers first, else in their order."""
    found: dict[tuple, Record] = {}
    for record in (record for records in lists for record in records):
        before = found.setdefault(record.key, record)
        if date(record) > date(before):
            found[record.key] = record
    return sorted(found.values(), key=lambda record: record.parent is not None)


def date(record: Record) -> str:
    """ISO 8601 in UTC; "" where it is not known."""
    return record.conditions.get("date", "")


def read(path: Path) -> list[Record]:
    """The records of a results file; none where there is no file. UserError names a bad line."""
    found = path.read_bytes().splitlines() if path.exists() else []
    return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(found, 1)]


def write(path: Path, records: list[Record]) -> None:
    write_atomic(path, lines(records))


def lines(records: list[Record]) -> str:
    """JSON lines, as `read` takes them. UserError names a figure that is not finite."""
    found = [json.dumps(asdict(record)) for record in records]
    for record, line in zip(records, found, strict=True):
        _parsed(line, f"the record of {record.run}, {record.sampler} in {record.steps} steps")
    return "".join(line + "\n" for line in found)


def _parsed(line: bytes | str, place: str) -> Record:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: expected a JSON object, got {line[:40]!r} ({error})") from error
    version = fields.get("format") if isinstance(fields, dict) else FORMAT
    if version != FORMAT:
        raise UserError(f"{place}: format {version!r:.40}, expected {FORMAT}: measure again")
    if mistake := schema.mistake(fields):
        raise UserError(f"{place}: {mistake}")
    timings = [Timing(**each | {"seconds": tuple(each["seconds"])}) for each in fields["timings"]]
    record = Record(**fields | {"timings": timings})
    for name, figures in {"quality": record.quality, **record.others}.items():
        if len(figures) > len(record.seeds):
            raise UserError(f"{place}: {name}: expected one a seed, got {len(figures)}")
    return record
