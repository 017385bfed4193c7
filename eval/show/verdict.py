"""Which student to take, in sentences."""

from eval.show.columns import short
from eval.show.lines import Line

LIMITS = (1.2, 2.0)  # how much worse than the teacher a student that is taken may be


def students(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.record.student]


def cheapest(lines: list[Line], limit: float) -> Line | None:
    """The fewest network calls within `limit` times its teacher; of equals, the best. None of those
    with a warning."""
    sound = [line for line in lines if not line.warnings]
    within = (line for line in sound if line.ratio is not None and line.ratio <= limit)
    return min(within, key=lambda line: (line.record.nfe, line.record.score), default=None)


def best(lines: list[Line]) -> Line | None:
    """The least score of those without a warning, or where all have one, of all."""
    return min(lines, key=lambda line: (bool(line.warnings), line.record.score), default=None)


def choice(lines: list[Line]) -> Line | None:
    """The student to take: the cheapest within the first limit that any keeps, else the best."""
    made = students(lines)
    within = (cheapest(made, limit) for limit in LIMITS)
    return next(filter(None, within), best(made))


def rival(lines: list[Line], line: Line) -> Line | None:
    """The best row without training, at no more calls and of the same teacher, where it is as good:
    of a score no greater, or at the floor as the line is."""
    same = (x for x in lines if x.yardstick is line.yardstick and x.record.nfe <= line.record.nfe)
    free = best([x for x in same if x.free and not x.warnings])
    if free is None:
        return None
    as_good = max(free.record.score, line.floor) <= max(line.record.score, line.floor)
    return free if as_good else None


def named(line: Line) -> str:
    return f"{line.name} at {line.calls}"


def figures(line: Line) -> str:
    """What it costs and what it saves: time where it was measured, else network calls."""
    longest = line.teacher or line.yardstick or line.record
    saved = f"{short(longest.nfe / line.record.nfe)}× fewer calls"
    if line.speed_up:
        saved = f"speed-up {short(line.speed_up)}×"
    return f"× teacher {ratio(line)}, {saved}"


def sentences(lines: list[Line]) -> list[str]:
    """Which student to ship, and what else a reader should know."""
    made, ship = students(lines), choice(lines)
    if ship is None:
        return ["No student is among these rows, so there is none to ship."]
    if ship.ratio is None:
        lack = "No row of the teacher's with steps enough to compare with is among these."
        if ship.teacher is None:
            lack = "The teacher is not among these rows."
        return [f"{lack} Of the students, {named(ship)} is the best."]
    near, far = (cheapest(made, limit) for limit in LIMITS)
    more = []
    if far is None:
        sound = "sound student" if ship.warnings else "student"
        reason = f"the best, though no {sound} is within {LIMITS[1]:g}× of the teacher"
    elif near is None:
        reason = f"the cheapest student within {LIMITS[1]:g}× of the teacher; "
        reason += f"none is within {LIMITS[0]:g}×"
    else:
        reason = f"the cheapest student within {LIMITS[0]:g}× of the teacher"
        if near is far:
            reason += f", and within {LIMITS[1]:g}×"
        else:
            more.append(f"If {LIMITS[1]:g}× will do: {named(far)} ({figures(far)}).")
    free = cheapest([line for line in lines if line.free], LIMITS[0])
    more.append(
        f"Without any training, the cheapest within {LIMITS[0]:g}× is {named(free)}."
        if free
        else f"Without any training, nothing compared here is within {LIMITS[0]:g}×."
    )
    if as_good := rival(lines, ship):
        ratio = f" (× teacher {as_good.ratio:.2f})"
        more.append(
            f"{named(as_good)} needs no training and is as good{ratio}: "
            "this student gains nothing over it."
        )
    tied = sum(line.record.score <= ship.floor for line in lines if not line.fewer)
    if tied > 1:
        more.append(
            f"{tied} rows are at or below the floor ({ship.floor:.3g}), where "
            f"{ship.record.num_images:,} images do not tell them from real ones: "
            "their order among themselves says little."
        )
    return [f"Ship {named(ship)}: {reason} ({figures(ship)}).", *more]


def best_by_calls(lines: list[Line]) -> list[tuple[Line, str, str]]:
    """The best student of each number of calls with its ratio, and the best of the rows without
    training that make no more. Empty where no student has a teacher to be compared with."""
    ship = choice(lines)
    if ship is None or ship.ratio is None:
        return []
    made = []
    for nfe in sorted({line.record.nfe for line in students(lines)}):
        first = best([line for line in students(lines) if line.record.nfe == nfe]) or ship
        free = best([line for line in lines if line.free and line.record.nfe <= nfe])
        made.append(
            (first, ratio(first), f"{ratio(free)} by {free.record.sampler}" if free else "-")
        )
    return made


def ratio(line: Line) -> str:
    return "-" if line.ratio is None else f"{line.ratio:.2f}"
