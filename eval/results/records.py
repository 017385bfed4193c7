"""What was measured, as types: they are the schema of results.jsonl and its validation at once.

A record is one row of a table. What the rows of a comparison share stands in its `Head`, the rest
in its `Row`; the file has a head once and the rows that it holds for below it (see jsonl.py).
`python -m eval.results.records` prints the JSON schema of a line.
"""

import hashlib
import json
from dataclasses import dataclass, field
from statistics import mean, median, quantiles
from typing import Annotated, Literal, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from diffusion.files import CHECKSUM
from diffusion.plan import MOST_STEPS, Angle, Weight, ascending
from diffusion.typed import CLOSED, OPEN, Amount, Count, Positive, Sha256, Text

FORMAT = 4
LONG = 100  # steps; a teacher's own plan of more may be judged on fewer images than other rows
ENOUGH = 16  # steps; a teacher's row of as many can then stand in for that plan
BLOCKS = 50  # of images, whose influences are kept with a row
FOR_P90 = 29  # as many samples have one beyond the 90th percentile with 95 %: 0.9^29 < 0.05


def _distinct(seeds: list[int]) -> list[int]:
    if len({*seeds}) < len(seeds):
        raise ValueError("List should have no two alike")
    return seeds


IN_ORDER = AfterValidator(lambda angles: angles and ascending(angles))
Angles = Annotated[list[Angle], Field(max_length=MOST_STEPS + 1), IN_ORDER]
Figure = Annotated[float, Field(ge=-1e30, le=1e30)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=1e-12, le=1e12)]
Date = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]
Fact = str | int | float | bool | None


@with_config(CLOSED)
class Training(TypedDict, total=False):
    """The training of the checkpoint itself, not of its parents; as much as its card says."""

    iterations: Count
    """Steps of the optimizer."""
    images: Count
    """Images seen, each as often as it was seen."""
    total_images: Count
    """Those, and the images that the students it goes on from saw."""
    passes: Count
    """Forward passes of all networks in this training, the teacher's among them."""
    recipe: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
    """Identity of its settings but the seed: equal for runs that differ in it alone."""
    seconds: Amount
    """Seconds of the training loop."""


@with_config(CLOSED)
class Data(TypedDict):
    """The real images that all is measured against."""

    name: Text
    """The dataset's name, or its folder."""
    split: Text
    """Which part of it, e.g. train."""
    images: Count
    """How many they are; 0 where saved statistics alone are known of them."""
    statistics: NotRequired[Sha256]
    """Identity of the file of saved statistics that the metric is a distance to."""
    sha256: NotRequired[Sha256]
    """Identity of their uint8 pixels."""
    background: NotRequired[str]
    """The colour behind what is transparent in a folder's images, if not white."""
    aspect: NotRequired[Literal["pad"]]
    """What became of a folder's images that were no squares, if they were not cropped."""
    of: NotRequired[Positive]
    """Images of the source, where they are more than those that all is measured against."""


@with_config(CLOSED)
class Extractor(TypedDict):
    """What the features are made by."""

    sha256: Sha256
    """Identity of its weights."""
    accuracy: NotRequired[Share | None]
    """A classifier's share of held-out images that it names rightly."""
    further: NotRequired[list[Text]]
    """Metrics of further extractors, which are among the further figures."""


@with_config(OPEN)
class Environment(TypedDict, extra_items=Fact):
    """What a time depends on; rows that differ in it share no table of times."""

    device: Text
    """The processor's or the GPU's name."""
    type: NotRequired[str]
    """cpu or cuda."""
    precision: Text
    """Number format of the network: fp32 or bf16."""
    compile: NotRequired[bool]
    """Whether the network is compiled."""
    threads: NotRequired[Positive]
    """Threads that torch uses."""
    cores: NotRequired[Positive | None]
    """Cores of the machine."""
    python: NotRequired[str]
    """Its version."""
    torch: NotRequired[str]
    """Its version."""


@with_config(OPEN)
class Conditions(TypedDict, total=False, extra_items=Fact):
    """When a row was measured and what else might be of use; makes no row another."""

    date: Date
    """UTC, ISO 8601. Of two measurements of the same, the later is kept."""
    processes: Positive
    """Processes that shared the work."""
    clock_mhz: float | None
    """The device's clock."""
    memory_clock_mhz: float | None
    """Clock of a GPU's memory."""
    celsius: float | None
    """A GPU's heat."""
    watts: float | None
    """What a GPU draws."""


Bits = Annotated[Figure, Field(description="Bits per dimension of held-out images.")]
Error = Annotated[Amount, Field(description="Its standard error.")]
Likelihood = with_config(CLOSED)(
    TypedDict(
        "Likelihood",
        {
            "variational-bound": Bits,
            "variational-bound-error": Error,
            "probability-flow": Bits,
            "probability-flow-error": Error,
            "images": Annotated[int, Field(ge=1, description="How many they are the mean over.")],
        },
        total=False,
    )
)
Likelihood.__doc__ = "A teacher's bits per dimension of held-out images."


@with_config(CLOSED)
@dataclass(frozen=True)
class Timing:
    """What a batch of that size takes from noise to uint8."""

    batch_size: Positive
    """Images in a call."""
    first: Amount | None = None
    """Seconds of the first call of all: compilation and warm-up are in it."""
    seconds: tuple[Seconds, ...] = ()
    """Seconds of each repeat, synchronised; none where it failed."""
    allocated: Count | None = None
    """Peak bytes that the call took beyond those that were held before; none on a CPU."""
    reserved: Count | None = None
    """Peak bytes that the allocator held, with the weights of every model loaded; none on a CPU."""
    failed: str | None = None
    """Why there are no repeats, e.g. "out of memory"."""

    @property
    def over(self) -> bool:
        """Whether it has repeats, or can have none."""
        return bool(self.seconds or self.failed)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def iqr(self) -> tuple[float, float]:
        """The quartiles of the repeats."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def p90(self) -> float | None:
        """The 90th percentile; None where the repeats are too few to claim one."""
        if len(self.seconds) < FOR_P90:
            return None
        return quantiles(self.seconds, n=10, method="inclusive")[-1]

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.median


@with_config(CLOSED)
@dataclass(frozen=True)
class Uncertainty:
    """How uncertain the Fréchet distance of one seed's images is (eval/measure/intervals.py)."""

    bias: Figure
    """By which so many images have a larger distance than infinitely many, in expectation."""
    first: Amount
    """Variance by the influence of each image, at the measured moments."""
    second: Amount
    """Variance that is left where the distance itself is zero."""
    growth: Amount
    """Most by which the variance grows with the distance, whatever the direction."""
    influence: Annotated[list[Figure], Field(min_length=1, max_length=BLOCKS)]
    """Influences of successive blocks of images, of mean 0 and of the distance's variance: rows of
    one noise are compared by their products."""

    @property
    def variance(self) -> float:
        """Near zero the first order counts the second twice."""
        return max(self.first - self.second, self.second)


@with_config(CLOSED)
@dataclass(frozen=True, kw_only=True)
class Head:
    """What rows share: what they are measured on, against what, and where."""

    format: Literal[4] = FORMAT
    """The version of this schema."""
    data: Data
    metric: Text
    """fid for clean-fid's Inception in mode clean alone; any other names its extractor."""
    extractor: Extractor
    num_images: Positive
    """Generated images per seed."""
    seeds: Seeds
    """Seeds of the noise."""
    floor: Annotated[list[Figure], Field(min_length=1)]
    """The metric of as many real images, over repeated draws."""
    floor_error: Amount = 0.0
    """Standard error of the floor's mean; 0 in files of formats before 4."""
    held_out: dict[str, Figure] = field(default_factory=dict)
    """The further figures of held-out real images: what a good model should come near to."""
    batch_size: Positive
    """Batch size of the table's images/s."""
    environment: Environment
    """Device, precision, threads and versions: what a time depends on."""


@with_config(CLOSED)
@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint sampled in one way, and what that costs; lists hold one figure per seed."""

    run: Text
    """Where the checkpoint lay when it was measured."""
    method: Text
    """What made the checkpoint, by its card."""
    sha256: Sha256
    """Identity of the checkpoint's weights: names, shapes and bytes."""
    parent: Sha256 | None = None
    """sha256 of the weights that it was distilled from; none for a teacher."""
    parameters: Count
    """Numbers that the network learns."""
    training: Training = field(default_factory=Training)
    """Iterations, images seen and seconds of the checkpoint's own training."""
    tried: Positive | None = None
    """Settings that its method was tuned over, as whoever compared it says; none where unsaid."""
    sampler: Text
    """Its name, as in diffusion/samplers.py; of images that others made: folder, npz or onnx."""
    steps: Count
    """Steps of the sampler; 0 where others made the images, and the steps are not known."""
    own_plan: bool
    """True for the checkpoint's own plan, false for a solver that needs no training."""
    angles: Angles = field(default_factory=list)
    """Noise levels in radians, ascending from 0: one more than steps, or none of no steps."""
    guidance: Weight | None = None
    """The weight of classifier-free guidance; none without it."""
    note: str = ""
    """How the angles were chosen, where they are not those of the card."""
    nfe: Count = 0
    """Network calls per image, counted; 0 before they are, and where others made the images."""
    quality: list[Figure] = field(default_factory=list)
    """The metric of each seed's images; of fewer seeds while the row is being measured."""
    others: dict[str, Annotated[list[Figure], Field(min_length=1)]] = field(default_factory=dict)
    """Further figures by name, each of each seed."""
    uncertainty: list[Uncertainty] = field(default_factory=list)
    """That of each seed's metric; none in files of formats before 4."""
    errors: dict[str, Annotated[list[Amount], Field(min_length=1)]] = field(default_factory=dict)
    """Standard errors of the further figures, each of each seed."""
    likelihood: Likelihood = field(default_factory=Likelihood)
    """A teacher's bits per dimension of held-out images."""
    timings: list[Timing] = field(default_factory=list)
    """At batch 1, at batch_size, and of a sweep over batch sizes."""
    conditions: Conditions = field(default_factory=Conditions)
    """When it was measured, and at which clocks."""


def title(method: str, note: str, own_plan: bool, sampler: str) -> str:
    """What made a row's images: the method, how its angles were chosen, and a solver that is not
    the checkpoint's own."""
    named = f"{method} {note}".strip()
    return named if own_plan else f"{named}, {sampler}"


@dataclass(frozen=True, kw_only=True)
class Record(Row, Head):
    """A row with the head that it stands under."""

    @property
    def key(self) -> tuple:
        """What makes a measurement the same: measured again, it is skipped."""
        place = json.dumps([self.environment, self.data], sort_keys=True)
        plan = (self.sha256, self.sampler, tuple(self.angles), self.metric, self.num_images)
        # an unguided row keeps the key, and so the tag, that it had before rows knew of guidance
        guided = () if self.guidance in (None, 1) else (self.guidance,)
        further = tuple(self.extractor.get("further", ()))
        return *plan, tuple(self.seeds), self.batch_size, place, *guided, *further

    @property
    def tag(self) -> str:
        """The key's name in samples.safetensors."""
        return hashlib.sha256(repr(self.key).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """What made it, how its angles were chosen, and the solver that is not the checkpoint's."""
        return title(self.method, self.note, self.own_plan, self.sampler)

    @property
    def date(self) -> str:
        """ISO 8601 in UTC; "" where it is not known."""
        return self.conditions.get("date", "")

    @property
    def outside(self) -> bool:
        """Whether others made its images: it is no checkpoint, and has no plan."""
        return self.steps == 0

    @property
    def student(self) -> bool:
        """Whether it is a student by its own plan."""
        return self.own_plan and self.parent is not None

    @property
    def long(self) -> bool:
        """Whether it is a teacher's own plan of very many steps."""
        return self.own_plan and self.parent is None and self.steps > LONG

    @property
    def further(self) -> dict[str, float]:
        """Means of the further figures over the seeds."""
        return {name: mean(figures) for name, figures in self.others.items()}

    @property
    def score(self) -> float:
        return mean(self.quality)

    def timing(self, batch_size: int) -> Timing | None:
        """The repeats at that batch size, where there are any."""
        timings = (t for t in self.timings if t.batch_size == batch_size and t.seconds)
        return next(timings, None)

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


def schema() -> dict:
    """The JSON schema of a line of results.jsonl: a head, or a row below it."""
    whole = TypeAdapter(Head | Row).json_schema()
    for kind in ("Head", "Row"):
        about = {"type": "string", "description": "A checksum over the line's other fields."}
        whole["$defs"][kind]["properties"][CHECKSUM] = about
    return whole


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
