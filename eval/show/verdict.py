"""Which row to take, a student or a solver that needs no training, in sentences."""

from typing import NamedTuple

from eval.show.columns import between, short
from eval.show.lines import Line, tied

LIMITS = (1.2, 2.0)  # how much worse than the teacher a row that is taken may be


def candidates(lines: list[Line]) -> list[Line]:
    """The students and solvers to choose from: those without a warning, or all if each has one."""
    known = [line for line in lines if line.record.nfe and not line.fewer]
    made = [line for line in known if line.free or line.record.student]
    return [line for line in made if not line.warnings] or made


def as_good(a: Line, b: Line) -> bool:
    """Whether these images do not show that a is worse than b."""
    return a.record.score <= b.record.score or tied(a, b)


def pick(lines: list[Line]) -> Line | None:
    """The row of the fewest calls, then one without training, of the best and what ties with it."""
    best = min(lines, key=lambda line: line.record.score, default=None)
    ties = [line for line in lines if best and as_good(line, best)]
    return min(
        ties, key=lambda line: (line.record.nfe, not line.free, line.record.score), default=None
    )


def cheapest(lines: list[Line], limit: float) -> Line | None:
    """The pick of the fewest network calls within `limit` times the teacher."""
    within = [line for line in lines if line.ratio is not None and line.ratio <= limit]
    fewest = min((line.record.nfe for line in within), default=0)
    return pick([line for line in within if line.record.nfe == fewest])


def choice(lines: list[Line]) -> Line | None:
    """The row to take: the cheapest within the first limit that any keeps, else the best."""
    made = candidates(lines)
    return next(filter(None, (cheapest(made, limit) for limit in LIMITS)), pick(made))


def named(line: Line) -> str:
    return f"{line.name} at {line.calls}"


def ratio(line: Line) -> str:
    return "-" if line.ratio is None else f"{line.ratio:.2f}{between(line.ratio_interval)}"


def figures(line: Line) -> str:
    """What it costs and what it saves: time where it was measured, else network calls."""
    longest = line.teacher or line.yardstick or line.record
    saved = f"{short(longest.nfe / line.record.nfe)}× fewer calls"
    if line.speed_up:
        saved = f"speed-up {short(line.speed_up)}×"
    return f"× teacher {ratio(line)}, {saved}"


def against(lines: list[Line], line: Line) -> str:
    """The row beside the best of the other sort at no more calls: what training gains, or not."""
    others = [x for x in candidates(lines) if x.free != line.free]
    other = pick([x for x in others if x.record.nfe <= line.record.nfe])
    start = "It needs no training. " if line.free else ""
    sort = "student" if line.free else "row without training"
    if other is None:
        return f"{start}No {sort} makes as few calls."
    part = "is worse" if line.record.score < other.record.score else "is better"
    if tied(other, line):
        part = "is a tie with it"
    elif line.estimate is None or other.estimate is None:
        part += ", as far as can be told without intervals"
    return f"{start}The best {sort} of no more calls, {named(other)} ({ratio(other)}), {part}."


def sentences(lines: list[Line]) -> list[str]:
    """Which row to take, why, and what else a reader should know."""
    made, ship = candidates(lines), choice(lines)
    if ship is None:
        return ["Neither a student nor a solver is among these rows, so there is none to take."]
    if ship.ratio is None:
        return [f"The teacher is not among these rows. Of the others, {named(ship)} is the best."]
    near, far = (cheapest(made, limit) for limit in LIMITS)
    more = [against(lines, ship)]
    if far is None:
        reason = f"the best, though none is within {LIMITS[1]:g}× of the teacher"
    elif near is None:
        reason = f"the cheapest within {LIMITS[1]:g}× of the teacher; none is within {LIMITS[0]:g}×"
    else:
        reason = f"the cheapest within {LIMITS[0]:g}× of the teacher"
        if near is far:
            reason += f", and within {LIMITS[1]:g}×"
        else:
            more.append(f"If {LIMITS[1]:g}× will do: {named(far)} ({figures(far)}).")
    real = [line for line in made if (line.interval or (line.record.score,))[0] <= line.floor]
    if len(real) > 1:
        more.append(
            f"{len(real)} rows are not told from the floor ({ship.floor:.3g}), which is that of "
            "real images: their order among themselves says little."
        )
    return [f"Take {named(ship)}: {reason} ({figures(ship)}).", *more]


class Budget(NamedTuple):
    """What to take for at most so much."""

    most: str
    line: Line
    why: str


def budgets(lines: list[Line]) -> list[Budget]:
    """The pick for each budget at which it changes, ascending: of milliseconds for an image alone
    where all rows have times, else of network calls."""
    made = candidates(lines)
    timed = all(line.milliseconds is not None for line in made)
    budgets: list[Budget] = []

    def cost(line: Line) -> float:
        return line.milliseconds or 0.0 if timed else line.record.nfe

    for most in sorted({cost(line) for line in made}):
        line = pick([x for x in made if cost(x) <= most])
        if line is None or (budgets and budgets[-1].line is line):
            continue
        words = f"{short(most)} ms an image" if timed else f"{short(most)} calls"
        rivals = [x for x in made if cost(x) <= most and x is not line and tied(x, line)]
        ties = f" A tie with it: {', '.join(map(named, rivals))}." if rivals else ""
        interval = between(line.interval)
        quality = f"quality {line.record.score:.3g}{interval}, × teacher {ratio(line)}."
        budgets.append(Budget(words, line, f"{quality} {against(lines, line)}{ties}"))
    return budgets


def best_by_calls(lines: list[Line]) -> list[tuple[Line, str, str, str]]:
    """The best student of each number of calls with its ratio, the best of the rows without
    training that make no more, and which of the two is better."""
    made = []
    some = candidates(lines)
    for nfe in sorted({line.record.nfe for line in some if line.record.student}):
        first = pick([x for x in some if x.record.student and x.record.nfe == nfe])
        free = pick([x for x in some if x.free and x.record.nfe <= nfe])
        if first is None or first.ratio is None:
            continue
        if free is None:
            made.append((first, ratio(first), "-", "-"))
            continue
        better = "student" if first.record.score < free.record.score else "untrained"
        words = f"{ratio(free)} by {free.record.sampler}, {free.calls}"
        made.append((first, ratio(first), words, "tie" if tied(first, free) else better))
    return made
