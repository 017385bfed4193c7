"""A line of a table: the records that differ in their training's seed alone, its name there, its own
teacher, and what follows."""

from dataclasses import dataclass, replace
from statistics import mean

from diffusion.console import UserError
from eval.measure import quality
from eval.results.records import ENOUGH, Record, Timing
from eval.results.together import most_images, setting, titles


@dataclass(frozen=True)
class Line:
    record: Record
    """The row's record. For several trainings it holds a figure of each."""
    title: str
    """Its method, told apart from the others'."""
    teacher: Record | None
    """Its teacher's longest plan, which its speed is compared with."""
    trainings: tuple[Record, ...]
    """The records of its trainings: of one recipe, from other seeds."""
    yardstick: Record | None = None
    """The row of its teacher's that its quality is compared with."""
    fewer: bool = False
    """Whether it is judged on fewer images than the table's rest, with another bias in its figure."""

    @property
    def warnings(self) -> list[str]:
        return quality.warnings(self.record.further, self.record.held_out)

    @property
    def name(self) -> str:
        """The title, and what a reader must not miss."""
        return " ".join([self.title, *(f"({word})" for word in self.warnings)])

    @property
    def ratio(self) -> float | None:
        """To the larger of the yardstick's figure and the floor; None where the two are not above 0,
        and of a row on fewer images."""
        if self.yardstick is None or self.fewer:
            return None
        least = max(self.yardstick.score, mean(self.record.floor))
        return self.record.score / least if least > 0 else None

    @property
    def milliseconds(self) -> float | None:
        """Per image at batch 1."""
        return 1000 * self.record.single.median if self.record.single else None

    @property
    def images_per_second(self) -> float | None:
        return self.record.batch.images_per_second if self.record.batch else None

    @property
    def speed_up(self) -> float | None:
        """How many times as many images/s as the teacher's longest plan."""
        if self.teacher is None or self.teacher.batch is None or self.record.batch is None:
            return None
        return self.images_per_second / self.teacher.batch.images_per_second


def lines(records: list[Record]) -> list[Line]:
    """A line for each method by each plan. UserError where a row has not all its figures yet."""
    for record in records:
        if len(record.quality) != len(record.seeds):
            raise UserError(
                f"{record.title} in {record.steps} steps ({record.run}) is not measured with all of "
                f"its {len(record.seeds)} seeds yet: go on with eval.compare"
            )
    groups: dict[tuple, list[Record]] = {}
    origins: dict[tuple, tuple[Record | None, Record | None]] = {}
    compared = zip(teachers(records), yardsticks(records), strict=True)
    for record, (teacher, yardstick) in zip(records, compared, strict=True):
        kind = _kind(record, teacher)
        while any(record.sha256 == other.sha256 for other in groups.get(kind, [])):
            kind = (*kind, "again")  # one checkpoint by two plans is not two trainings
        groups.setdefault(kind, []).append(record)
        origins[kind] = teacher, yardstick
    names = titles([same[0] for same in groups.values()])
    most = most_images(records)
    made = []
    for title, (kind, same) in zip(names, groups.items(), strict=True):
        record, (teacher, yardstick) = pooled(same), origins[kind]
        fewer = record.num_images < most
        title += f" ({record.num_images:,} images)" if fewer else ""
        made.append(Line(record, title, teacher, tuple(same), yardstick, fewer))
    return made


def _kind(record: Record, teacher: Record | None) -> tuple:
    """What trainings of one line have in common; one of unknown recipe has it with no other."""
    recipe = record.training.get("recipe", record.sha256)
    origin = teacher.sha256 if teacher else None
    plan = record.title, record.guidance, record.steps, record.nfe
    return recipe, origin, *plan, record.training.get("total_images"), *setting(record).values()


def pooled(same: list[Record]) -> Record:
    """The first of several trainings, with a figure of each in place of one for each noise seed,
    and with the times of all."""
    if len(same) == 1:
        return same[0]
    shared = [name for name in same[0].others if all(name in record.others for record in same)]
    times: dict[int, Timing] = {}
    for timing in (timing for record in same for timing in record.timings):
        before = times.get(timing.batch_size)
        seconds = timing.seconds + (before.seconds if before else ())
        times[timing.batch_size] = replace(before or timing, seconds=seconds)
    return replace(
        same[0],
        quality=[record.score for record in same],
        others={name: [record.further[name] for record in same] for name in shared},
        timings=list(times.values()),
    )


def teachers(records: list[Record]) -> list[Record | None]:
    """Each row's own: its first ancestor's longest plan; the table's where the line is broken."""
    usual = teacher_of(records)
    return [teacher_of(rows) or usual for rows in _ancestors(records)]


def yardsticks(records: list[Record]) -> list[Record | None]:
    """For each row that of its teacher's rows which its quality is compared with."""
    usual, most = teacher_of(records), most_images(records)
    rest = [row for row in records if usual and row.sha256 == usual.sha256]
    return [yardstick_of(rows or rest, most) for rows in _ancestors(records)]


def _ancestors(records: list[Record]) -> list[list[Record]]:
    """For each row the rows of its first ancestor; none where the line is broken."""
    parents = {record.sha256: record.parent for record in records}
    made = []
    for record in records:
        first = record.sha256
        for _ in records:  # as many generations at most
            first = parents.get(first) or first
        made.append([row for row in records if row.sha256 == first and row.parent is None])
    return made


def teacher_of(records: list[Record]) -> Record | None:
    """The table's: of first ancestors' own plans the longest."""
    roots = [record for record in records if record.own_plan and record.parent is None]
    return max(roots, key=lambda record: record.nfe, default=None)


def yardstick_of(rows: list[Record], most: int) -> Record | None:
    """What quality is compared with, of one teacher's rows: its longest own plan where that is judged
    on as many images as the others (most); else the best of those of 16 steps or more."""
    longest = teacher_of(rows)
    if longest and longest.num_images >= most:
        return longest
    enough = [row for row in rows if row.num_images >= most and row.steps >= ENOUGH]
    return min(enough, key=lambda row: row.score, default=None)
