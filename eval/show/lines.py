"""What tables, pictures and pages show: a line for the records that differ in their seed alone."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from statistics import mean

from diffusion.console import UserError
from eval.measure import intervals, quality
from eval.measure.intervals import Estimate, Interval
from eval.results.records import ENOUGH, Record, Timing
from eval.results.together import most_images, require_comparable, setting, titles

BEST, TIE = "*", "≈"


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
    """Whether it is judged on fewer images than other rows, with another bias in its figure."""
    warnings: tuple[str, ...] = ()
    """What a reader must not miss: collapsed, copies."""
    mark: str = ""
    """BEST or TIE among the rows of as many calls; nothing where none is known to be either."""

    @property
    def name(self) -> str:
        """The title, and the warnings."""
        return " ".join([self.title, *(f"({word})" for word in self.warnings)])

    @property
    def free(self) -> bool:
        """Whether it is a solver's row, which needs no training of its own."""
        return not self.record.own_plan

    @property
    def calls(self) -> str:
        calls = self.record.nfe
        return f"{calls:,} call" + "s" * (calls != 1) if calls else "unknown calls"

    @property
    def floor(self) -> float:
        return mean(self.record.floor)

    @cached_property
    def estimate(self) -> Estimate | None:
        """Its quality with its variance; None where files of older formats lack it."""
        each = [estimate(record) for record in self.trainings]
        some = [one for one in each if one]
        return intervals.of_trainings(some) if len(some) == len(each) else None

    @property
    def interval(self) -> Interval | None:
        """95 %, of its quality; of several trainings, of what such a training has."""
        if self.estimate is None:
            return None
        if len(self.trainings) > 1:
            return self.estimate.interval()
        return intervals.distance_interval(
            self.record.score, intervals.pooled(self.record.uncertainty)
        )

    def figure(self, name: str) -> Estimate | None:
        """A further figure; with a variance where all its trainings have one."""
        if name not in self.record.others:
            return None
        each = []
        for record in self.trainings:
            errors, count = record.errors.get(name), len(record.quality)
            if not errors:
                return None
            variance = sum(error**2 for error in errors) / count**2
            each.append(Estimate(mean(record.others[name]), variance, [], intervals.GROUPS - 1))
        return intervals.of_trainings(each)

    @property
    def ratio(self) -> float | None:
        """Its figure over the yardstick's; None where that is not above 0, and for a row on fewer
        images."""
        if self.yardstick is None or self.fewer or self.yardstick.score <= 0:
            return None
        return self.record.score / self.yardstick.score

    @property
    def ratio_interval(self) -> Interval | None:
        """95 %, of the ratio; None of the yardstick's to itself, and where it has no bounds."""
        return self._ratio_interval()

    @property
    def above(self) -> float | None:
        """The ratio above the floor, (quality - floor) / (yardstick - floor); None where the
        yardstick is not known to be above the floor, and for the yardstick itself."""
        if self.yardstick is None or self.above_interval is None:
            return None
        return (self.record.score - self.floor) / (self.yardstick.score - self.floor)

    @property
    def above_interval(self) -> Interval | None:
        """95 %, of that."""
        return self._ratio_interval(Estimate(self.floor, self.record.floor_error**2, []))

    def _ratio_interval(self, floor: Estimate = intervals.NO_FLOOR) -> Interval | None:
        if self.yardstick is None or self.ratio is None or self.yardstick.key == self.record.key:
            return None
        stick = estimate(self.yardstick)
        if stick is None or self.estimate is None:
            return None
        return intervals.ratio_interval(self.estimate, stick, floor)

    @property
    def milliseconds(self) -> float | None:
        """Milliseconds of an image at batch 1."""
        return 1000 * self.record.single.median if self.record.single else None

    @property
    def images_per_second(self) -> float | None:
        return self.record.batch.images_per_second if self.record.batch else None

    @property
    def speed_up(self) -> float | None:
        """How many times as many images/s as the teacher's longest plan."""
        batch, longest = self.record.batch, self.teacher.batch if self.teacher else None
        return batch.images_per_second / longest.images_per_second if batch and longest else None


@dataclass(frozen=True)
class Comparison:
    """Records that may share a table, and their lines: what all that is shown starts from."""

    records: list[Record]
    times: bool
    """Whether times are shown."""
    lines: list[Line]


def comparison(records: list[Record], times: bool = True) -> Comparison:
    """UserError where the rows are not comparable, or not measured to the end."""
    require_comparable(records, times)
    return Comparison(records, times and any(record.timings for record in records), lines(records))


def lines(records: list[Record]) -> list[Line]:
    """A line for each method by each plan. UserError where a row has not all its figures yet."""
    for record in records:
        if len(record.quality) != len(record.seeds):
            raise UserError(
                f"{record.title} in {record.steps} steps ({record.run}) is not measured with "
                f"all of its {len(record.seeds)} seeds yet: go on with eval.compare"
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
    names = titles([trainings[0] for trainings in groups.values()])
    most = most_images(records)
    made = []
    for title, (kind, trainings) in zip(names, groups.items(), strict=True):
        record, (teacher, yardstick) = pooled(trainings), origins[kind]
        fewer = record.num_images < most
        title += f" ({record.num_images:,} images)" if fewer else ""
        warnings = tuple(quality.warnings(record.further, record.held_out))
        made.append(Line(record, title, teacher, tuple(trainings), yardstick, fewer, warnings))
    return marked(made)


def estimate(record: Record) -> Estimate | None:
    """The record's quality; None where it has no uncertainty. Its blocks are of its seeds' images,
    so that rows of as many images and seeds can be compared image by image."""
    if not record.uncertainty:
        return None
    known = intervals.pooled(record.uncertainty)
    blocks = [] if record.outside else known.influence  # others' images come from other noise
    return Estimate(record.score, known.variance, blocks)


def tied(a: Line, b: Line) -> bool:
    """Whether the difference of two rows is within its 95 % interval; so is a row with itself."""
    if a.estimate is None or b.estimate is None:
        return a is b
    return a is b or intervals.tied(a.estimate, b.estimate)


def marked(made: list[Line]) -> list[Line]:
    """The lines, marked at each number of calls: the best alone, or the best and its ties."""
    marks: dict[int, str] = {}

    def calls(line: Line) -> int:
        return line.record.nfe

    compared = [x for x in made if x.estimate and x.record.nfe and not x.fewer]
    for _, group in groupby(sorted(compared, key=calls), calls):
        rivals = [*group]
        first = min(rivals, key=lambda line: line.record.score)
        ties = [line for line in rivals if tied(line, first)]
        if len(rivals) > 1:
            marks |= {id(line): BEST if len(ties) == 1 else TIE for line in ties}
    return [replace(line, mark=marks.get(id(line), "")) for line in made]


def _kind(record: Record, teacher: Record | None) -> tuple:
    """What trainings of one line have in common; one of unknown recipe has it with no other."""
    recipe = record.training.get("recipe", record.sha256)
    origin = teacher.sha256 if teacher else None
    plan = record.title, record.guidance, record.steps, record.nfe
    return recipe, origin, *plan, record.training.get("total_images"), *setting(record).values()


def pooled(trainings: list[Record]) -> Record:
    """The first of several trainings, with a figure of each in place of one for each noise seed,
    and with the times of all."""
    first = trainings[0]
    if len(trainings) == 1:
        return first
    shared = [name for name in first.others if all(name in each.others for each in trainings)]
    times: dict[int, Timing] = {}
    for timing in (timing for record in trainings for timing in record.timings):
        before = times.get(timing.batch_size)
        seconds = timing.seconds + (before.seconds if before else ())
        times[timing.batch_size] = replace(before or timing, seconds=seconds)
    return replace(
        first,
        quality=[record.score for record in trainings],
        others={name: [record.further[name] for record in trainings] for name in shared},
        timings=list(times.values()),
    )


def teachers(records: list[Record]) -> list[Record | None]:
    """Each row's teacher: its first ancestor's longest plan; any teacher's where the records lack
    an ancestor."""
    usual = teacher_of(records)
    return [teacher_of(rows) or usual for rows in _ancestors(records)]


def yardsticks(records: list[Record]) -> list[Record | None]:
    """For each row, the row of its teacher's that its quality is compared with."""
    usual, most = teacher_of(records), most_images(records)
    first = [row for row in records if row.parent is None and not row.outside]
    usual_rows = [row for row in first if usual is None or row.sha256 == usual.sha256]
    return [yardstick_of(rows or usual_rows, most) for rows in _ancestors(records)]


def _ancestors(records: list[Record]) -> list[list[Record]]:
    """For each row, the rows of its first ancestor; none where the records lack one."""
    parents = {record.sha256: record.parent for record in records}
    made = []
    for record in records:
        first = record.sha256
        for _ in records:  # as many generations at most
            first = parents.get(first) or first
        alike = [row for row in records if row.sha256 == first and row.parent is None]
        made.append([row for row in alike if not row.outside])
    return made


def teacher_of(records: list[Record]) -> Record | None:
    """The longest of the first ancestors' own plans."""
    roots = [record for record in records if record.own_plan and record.parent is None]
    roots = [record for record in roots if not record.outside]
    return max(roots, key=lambda record: record.nfe, default=None)


def yardstick_of(rows: list[Record], most: int) -> Record | None:
    """The row of one teacher's to compare quality with: the best of those of 16 steps or more that
    are judged on as many images as the others (most); where none has as many, of the most steps."""
    whole = [row for row in rows if row.num_images >= most]
    steps = min(ENOUGH, max((row.steps for row in whole), default=0))
    return min((row for row in whole if row.steps >= steps), key=lambda x: x.score, default=None)
