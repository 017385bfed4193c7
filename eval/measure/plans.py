"""Which rows a comparison has: the runs found, and how each is sampled."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from diffusion import foreign
from diffusion.console import UserError
from diffusion.model import Model
from diffusion.plan import MOST_STEPS, Plan
from diffusion.runs import QUICK
from diffusion.samplers import SOLVERS
from eval.results.records import ENOUGH, LONG, title

STAND_IN = 32  # network calls of the row that is added where no other has steps enough


@dataclass(frozen=True, eq=False)
class Row:
    """One model by one plan; itself a key."""

    path: Path
    model: Model
    plan: Plan
    own_plan: bool
    """Whether it is the checkpoint's own plan, not a solver's."""

    @property
    def long(self) -> bool:
        """Whether it is a teacher's own plan of very many steps, for which solvers can stand in."""
        many, teacher = self.plan.num_steps > LONG, self.model.card.parent is None
        return self.own_plan and many and teacher and bool(self.model.solvers)

    @property
    def calls(self) -> int:
        """Network calls for each image."""
        return self.model.calls(self.plan)

    @property
    def method(self) -> str:
        """What made the checkpoint."""
        return self.model.card.method

    @property
    def title(self) -> str:
        """As the table has it, with its number of steps."""
        plan = self.plan
        named = title(self.method, plan.note, self.own_plan, plan.sampler)
        return f"{named} {plan.num_steps}"


def find_runs(paths: tuple[Path, ...]) -> list[Path]:
    """Checkpoints named, and those in folders named, teachers before students, fewer steps last."""
    files: list[Path] = []
    for path in paths:
        if foreign.door(path):
            files.append(path)
            continue
        inside = sorted(path.rglob("model.safetensors"), reverse=True) if path.is_dir() else [path]
        if not inside:
            raise UserError(
                f"{path} holds no finished run: expected a model.safetensors in it or below it"
            )
        files += inside
    return list(dict.fromkeys(files))


def counts_of(steps: str | None) -> list[int] | None:
    """The numbers of --steps, ascending."""
    if steps is None:
        return None
    try:
        counts = sorted({int(word) for word in steps.split(",")})
    except ValueError:
        raise UserError(f"--steps takes numbers such as 1,2,4,8, got {steps!r}") from None
    for each in (counts[0], counts[-1]):
        if not 1 <= each <= MOST_STEPS:
            raise UserError(f"--steps must be at least 1 and at most {MOST_STEPS}, got {each}")
    return counts


def rows(
    path: Path,
    model: Model,
    counts: list[int] | None,
    solvers: tuple[str, ...],
    long: bool = True,
    shifts: tuple[float, ...] = (),
    guidance: tuple[float, ...] = (),
) -> list[Row]:
    """Its own plans, then at the other counts those of the solvers that it takes.

    long: a teacher's own plan too, where it is not among the counts. Where that has very many
    steps, one row of a solver has steps enough to stand in for it. If none of the others has, one
    is added: of the last solver named, or else of the best, at 32 calls. shifts: of the solvers'
    angles, each in turn; by default the card's. guidance: weights, each in turn, of all but that
    long plan, as far as the model can be guided by them; by default the card's.
    """
    card = model.card
    made = []
    for plan in card.plans:
        steps = plan.num_steps
        asked = counts is None or steps in counts or len(card.plans) == 1
        slow = card.parent is None or steps > LONG
        skipped = not long and slow and steps not in (counts or ())
        if asked and not skipped:
            made.append(Row(path, model, plan, own_plan=True))
    free = [solver for solver in solvers if solver in model.solvers]
    best = [solver for solver in QUICK if solver in model.solvers]
    ways = list(product(shifts or (None,), free or best[:1]))
    plans = [(*way, nfe) for way in ways if free for nfe in counts or (1, 2, 4, 8, 16, 32)]
    stands_in = any(SOLVERS[solver].steps(nfe) >= ENOUGH for _, solver, nfe in plans)
    if long and any(row.long for row in made) and not stands_in:
        plans.append((*ways[-1], STAND_IN))
    for shift, solver, nfe in plans:
        steps = SOLVERS[solver].steps(nfe)
        if solver == card.sampler and card.plan(steps):
            continue  # its own
        if steps > 1 or (shift, solver) == ways[0]:  # in one step all are the same
            made.append(Row(path, model, model.plan(nfe, solver, shift), own_plan=False))
    low, high = model.guidance_range
    weights = [weight for weight in guidance if low <= weight <= high and model.kinds]
    return [
        replace(row, plan=model.guided(row.plan, weight))
        for row in made
        for weight in ((None,) if row.long or not weights else weights)
    ]
