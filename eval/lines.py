"""A record beside the others of its table: its name there, its own teacher, and what follows."""

from dataclasses import dataclass
from statistics import mean

from diffusion.console import UserError
from eval import quality
from eval.records import Record, titles


@dataclass(frozen=True)
class Line:
    record: Record
    title: str
    """Its method, told apart from the others'."""
    teacher: Record | None
    """What it is compared with."""

    @property
    def warnings(self) -> list[str]:
        return quality.warnings(self.record.further, self.record.held_out)

    @property
    def name(self) -> str:
        """The title, and what a reader must not miss."""
        return " ".join([self.title, *(f"({word})" for word in self.warnings)])

    @property
    def ratio(self) -> float | None:
        """To the larger of the teacher's figure and the floor; None where the two are not above 0."""
        if self.teacher is None:
            return None
        least = max(self.teacher.score, mean(self.record.floor))
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
        """In images/s."""
        if self.teacher is None or self.teacher.batch is None or self.record.batch is None:
            return None
        return self.images_per_second / self.teacher.batch.images_per_second


def lines(records: list[Record]) -> list[Line]:
    """A line for each. UserError where a row has not all its figures yet."""
    for record in records:
        if len(record.quality) != len(record.seeds):
            raise UserError(
                f"{record.title} in {record.steps} steps ({record.run}) is not measured with all of "
                f"its {len(record.seeds)} seeds yet: go on with eval.compare"
            )
    found = zip(records, titles(records), teachers(records), strict=True)
    return [Line(record, title, teacher) for record, title, teacher in found]


def teachers(records: list[Record]) -> list[Record | None]:
    """Each row's own: its first ancestor's longest plan; the table's where the line is broken."""
    parents, usual = {record.sha256: record.parent for record in records}, teacher_of(records)
    found = []
    for record in records:
        first = record.sha256
        for _ in records:  # as many generations at most
            first = parents.get(first) or first
        found.append(teacher_of([r for r in records if r.sha256 == first]) or usual)
    return found


def teacher_of(records: list[Record]) -> Record | None:
    """The table's: of first ancestors' own plans the longest."""
    roots = [record for record in records if record.own and record.parent is None]
    return max(roots, key=lambda record: record.nfe, default=None)
