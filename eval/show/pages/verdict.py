"""Which student to ship, in sentences."""

from html import escape
from statistics import mean

from eval.show import pages
from eval.show.columns import short
from eval.show.lines import Line

LIMITS = (1.2, 2.0)  # how much worse than the teacher a student that ships may be


def students(found: list[Line]) -> list[Line]:
    return [line for line in found if line.record.own_plan and line.record.parent is not None]


def cheapest(found: list[Line], limit: float) -> Line | None:
    """The fewest network calls within `limit` times its teacher; of equals, the best. None with a warning."""
    sound = (line for line in found if line.ratio is not None and not line.warnings)
    within = (line for line in sound if line.ratio <= limit)
    return min(within, key=lambda line: (line.record.nfe, line.record.score), default=None)


def best(found: list[Line]) -> Line | None:
    """The least score of those without a warning, or where all have one, of all."""
    return min(found, key=lambda line: (bool(line.warnings), line.record.score), default=None)


def choice(found: list[Line]) -> Line | None:
    """The student to ship: the cheapest within the first limit that any is within, else the best."""
    made = students(found)
    within = (cheapest(made, limit) for limit in LIMITS)
    return next(filter(None, within), best(made))


def rival(found: list[Line], line: Line) -> Line | None:
    """The best row without training, at no more calls and of the same teacher, where it is as good:
    of a score no greater, or at the floor as the line is."""
    same = (x for x in found if x.yardstick is line.yardstick and x.record.nfe <= line.record.nfe)
    free = best([x for x in same if not x.record.own_plan and not x.warnings])
    floor = mean(line.record.floor)
    if free is None or max(free.record.score, floor) > max(line.record.score, floor):
        return None
    return free


def calls(number: int) -> str:
    return f"{number:,} call" + "s" * (number != 1)


def named(line: Line) -> str:
    return f"<b>{escape(line.name)} at {calls(line.record.nfe)}</b>"


def figures(line: Line) -> str:
    """What it costs and what it saves: time where it was measured, else network calls."""
    longest = line.teacher or line.yardstick
    times = line.speed_up or longest.nfe / line.record.nfe
    what = "speed-up {}×" if line.speed_up else "{}× fewer calls"
    return f"×&nbsp;teacher {line.ratio:.2f}, {what.format(short(times))}"


def verdict(found: list[Line]) -> str:
    """What to ship, and the best student of each number of calls."""
    made, ship = students(found), choice(found)
    if ship is None:
        return '<p class="lede">No student is among these rows, so there is none to ship.</p>'
    if ship.ratio is None:
        words = "No row of the teacher's with steps enough to compare with is among these."
        if ship.teacher is None:
            words = "The teacher is not among these rows."
        words += f" Of the students, {named(ship)} is the best."
        return f'<p class="lede">{words}</p>'
    near, far = (cheapest(made, limit) for limit in LIMITS)
    words = f"the cheapest student within {LIMITS[0]:g}× of the teacher"
    more = []
    if far is None:
        sound = "sound student" if ship.warnings else "student"
        words = f"the best, though no {sound} is within {LIMITS[1]:g}× of the teacher"
    elif near is None:
        words = f"the cheapest student within {LIMITS[1]:g}× of the teacher; none is within {LIMITS[0]:g}×"
    elif near is far:
        words += f", and within {LIMITS[1]:g}×"
    else:
        more.append(f"If {LIMITS[1]:g}× will do: {named(far)} ({figures(far)}).")
    free = cheapest([line for line in found if not line.record.own_plan], LIMITS[0])
    more.append(
        f"Without any training, the cheapest within {LIMITS[0]:g}× is {named(free)}."
        if free
        else f"Without any training, nothing compared here is within {LIMITS[0]:g}×."
    )
    if as_good := rival(found, ship):
        more.append(
            f"{named(as_good)} needs no training and is as good (×&nbsp;teacher "
            f"{as_good.ratio:.2f}): this student gains nothing over it."
        )
    floor = mean(ship.record.floor)
    tied = sum(line.record.score <= floor for line in found if not line.fewer)
    if tied > 1:
        more.append(
            f"{tied} rows are at or below the floor ({floor:.3g}), where {ship.record.num_images:,} "
            "images do not tell them from real ones: their order among themselves says little."
        )
    lede = f'<p class="lede">Ship {named(ship)}: {words} ({figures(ship)}).</p>'
    return f"{lede}<p>{' '.join(more)}</p>{_best_per_count(found, ship)}"


def _best_per_count(found: list[Line], ship: Line) -> str:
    def ratio(line: Line) -> str:
        return "-" if line.ratio is None else f"{line.ratio:.2f}"

    body = []
    for nfe in sorted({line.record.nfe for line in students(found)}):
        first = best([line for line in students(found) if line.record.nfe == nfe])
        free = [line for line in found if not line.record.own_plan and line.record.nfe <= nfe]
        rival = best(free)
        other = f"{ratio(rival)} by {escape(rival.record.sampler)}" if rival else "-"
        body.append(("ship" * (first is ship), nfe, escape(first.name), ratio(first), other))
    heads = ("calls", "best student", "× teacher", "without training")
    return f'<div class="wide best">{pages.table(heads, body)}</div>'
