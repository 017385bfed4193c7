"""Blind side-by-side judgement by people: `python -m eval.human make A B`, then `… read FILES`."""

import hashlib
import json
import math
import random
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from pydantic import TypeAdapter, with_config
from rich import box
from rich.table import Table
from scipy.stats import binomtest
from torch import Tensor
from typing_extensions import TypedDict

from diffusion import checkpoint, model
from diffusion import data as datasets
from diffusion.console import UserError, at_least, out, plain, run, say
from diffusion.files import write_atomic
from diffusion.folders import check_file
from diffusion.image_file import Aspect, Form
from diffusion.images import some
from diffusion.machine import require_memory
from diffusion.noise import check_seed, seed32
from diffusion.pictures import png
from diffusion.typed import OPEN, Text, checked, parse
from eval.measure import outside
from eval.show import page
from students import generate

FORMAT = "fewstep-human-2"
REAL = "real:"
QUESTIONS = {True: "Which of the two is real?", False: "Which of the two looks better?"}


@with_config(OPEN)
class Judged(TypedDict):
    """What the page saves of one judge's session."""

    format: Literal["fewstep-human-2"]
    a: Text
    b: Text
    session: str
    answers: list[Literal["a", "b", "neither"]]


JUDGED = TypeAdapter(Judged)


@dataclass(frozen=True)
class Make:
    """Write a page that asks people which of two images looks better, or is real, without saying
    whose it is."""

    a: tyro.conf.Positional[str]
    """Images of one side: a run or checkpoint (RUN@4: in 4 steps), an .npz, a folder of PNGs, or
    real:digits."""
    b: tyro.conf.Positional[str]
    """Images of the other side. Two models' images of one number come from the same noise and make
    a pair."""
    out: Path = Path("human.html")
    """The page to write. It needs no other file and no network."""
    pairs: int = 50
    """How many pairs the page shows."""
    seed: int = 0
    """Seed of the order and the sides, of the noise, and of the choice of real images: from 0 to
    2^63 - 1."""
    data_dir: Path | None = None
    """The folder that holds a named dataset's files."""
    background: str | None = None
    """The colour behind what is transparent in a folder's real images. If left out: the one that
    the other side's checkpoint was trained with, else white."""


@dataclass(frozen=True)
class Read:
    """Say how often one side was preferred, or taken for real, with a 95 % confidence interval."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files that the page's Download button saved, one from each judge."""


@dataclass(frozen=True)
class Tally:
    """How judgements of `first` against `second` went."""

    first: str
    second: str
    wins: int
    losses: int
    neither: int
    session: str = ""

    @property
    def decided(self) -> int:
        return self.wins + self.losses

    def __add__(self, other: "Tally") -> "Tally":
        wins, losses = self.wins + other.wins, self.losses + other.losses
        return Tally(self.first, self.second, wins, losses, self.neither + other.neither)


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; everything where there are no trials."""
    if trials == 0:
        return 0.0, 1.0
    low, high = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(low), float(high)


def images_of(source: str, options: Make, shape: tuple | None) -> Tensor:
    """(N, C, H, W) uint8, at least as many as pairs. shape: the other side's, for a folder."""
    path = Path(source)
    if source.startswith(REAL):
        size, channels = (shape[-1], shape[0]) if shape else (32, 3)
        form = Form(size, channels, *look_of(options))
        dataset = datasets.load(source.removeprefix(REAL), options.data_dir, form)
        images = _shuffled(some(dataset.train).images, options.seed)
    elif path.suffix == ".npz":
        images = outside.npz(path)
    elif _holds_images(path):
        size = shape[-1] if shape else outside.form_of(path).size
        images = _shuffled(outside.folder(path, Form(size)), options.seed)
    else:
        path, steps = _checkpoint(source)
        made = generate.Options(path, options.pairs, steps, seed=options.seed)
        loaded = model.load(path)
        require_memory("--pairs", options.pairs, options.pairs * math.prod(loaded.spec.shape))
        images = torch.cat(list(generate.generate(loaded, made)))
    if len(images) < options.pairs:
        raise UserError(
            f"{source} holds {len(images)} images, fewer than --pairs {options.pairs}: ask for "
            "fewer pairs"
        )
    return images[: options.pairs]


def look_of(options: Make) -> tuple[str, Aspect]:
    """The colour behind real images and what becomes of those that are no squares: a side's
    checkpoint's, but for a background that is given."""
    background = options.background or Form.background
    for source in (options.a, options.b):
        if source.startswith(REAL) or source.endswith(".npz") or _holds_images(Path(source)):
            continue
        _, card, _ = checkpoint.load(_checkpoint(source)[0])
        form = datasets.ImageSpec(**card.data).form
        return options.background or form.background, form.aspect
    return background, Form.aspect


def _holds_images(path: Path) -> bool:
    return path.is_dir() and outside.is_outside(path)


def _shuffled(images: Tensor, seed: int) -> Tensor:
    """In random order: files may be sorted by what they show."""
    return images[
        torch.randperm(len(images), generator=torch.Generator().manual_seed(seed32(seed)))
    ]


def _checkpoint(source: str) -> tuple[Path, int | None]:
    """RUN or RUN@4: the checkpoint, and the steps where they are named."""
    name, _, steps = source.rpartition("@")
    named = bool(name) and steps.isdecimal() and not Path(source).exists()
    return Path(name if named else source), int(steps) if named else None


def arrange(pairs: int, seed: int) -> tuple[list[int], list[bool]]:
    """The images' numbers in the page's order, and whether A is on the left: half of the time."""
    chance = random.Random(seed)
    order, a_left = list(range(pairs)), [i % 2 == 0 for i in range(pairs)]
    chance.shuffle(order)
    chance.shuffle(a_left)
    return order, a_left


def html(options: Make) -> str:
    """The page."""
    names = options.a, options.b
    sides: dict[str, Tensor] = {}
    for name in sorted({*names}, key=lambda name: name.startswith(REAL)):
        shape = tuple(next(iter(sides.values())).shape[1:]) if sides else None
        sides[name] = images_of(name, options, shape)
    a, b = (sides[name] for name in names)
    if a.shape[2:] != b.shape[2:]:
        sizes = " and ".join(f"{tuple(x.shape[2:])} in {name}" for x, name in zip((a, b), names))
        raise UserError(f"both sides must have images of one size, got {sizes}")
    pairs = []
    for i, a_left in zip(*arrange(options.pairs, options.seed), strict=True):
        left, right = (a[i], b[i]) if a_left else (b[i], a[i])
        pairs.append({"left": _uri(left), "right": _uri(right), "a": "left" if a_left else "right"})
    real = options.a.startswith(REAL) != options.b.startswith(REAL)
    name = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
    content = {"format": FORMAT, "page": name, "a": options.a, "b": options.b, "pairs": pairs}
    question = QUESTIONS[real]
    return page.render("human.html", title="Left or right?", question=question, content=content)


def _uri(image: Tensor) -> str:
    return "data:image/png;base64," + b64encode(png(image.expand(3, -1, -1))).decode()


def make(options: Make) -> None:
    at_least(1, options, "pairs")
    check_seed(options.seed)
    check_file(options.out)
    write_atomic(options.out, html(options))
    say(f"{options.out}: {options.pairs} pairs; open it in a browser, then `read` what it saves")


def tally(path: Path) -> Tally:
    """The judgements of one file: wins are A's, or the generated images' against real ones."""
    try:
        values = parse(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no file {path}: expected what the page's Download button saved") from None
    except ValueError as error:
        raise UserError(f"{path} is not a results file of eval.human ({error!s:.200})") from error
    judged = checked(JUDGED, values, f"{path} is not a results file of eval.human")
    a, b, answers = judged["a"], judged["b"], judged["answers"]
    wins, losses, neither = (answers.count(each) for each in ("a", "b", "neither"))
    if a.startswith(REAL) and not b.startswith(REAL):
        a, b, wins, losses = b, a, losses, wins
    return Tally(a, b, wins, losses, neither, judged["session"])


def read(options: Read) -> Table:
    """A line per file, and one for all files of the same two."""
    if not options.files:
        raise UserError("read takes the files that the page's Download button saved, got none")
    tallies = [(path, tally(path)) for path in options.files]
    files: dict[str, Path] = {}
    groups: dict[tuple, list[Tally]] = {}
    for path, each in tallies:
        if each.session in files:
            raise UserError(
                f"{path} and {files[each.session]} hold one session's judgements: give one of them"
            )
        files[each.session] = path
        groups.setdefault((each.first, each.second), []).append(each)
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left", caption=(
        "rate: of the judgements that chose a side, with Wilson's 95 % interval, every judgement "
        "counted as independent; taken for real at 50 % means not to be told from real"
    ))  # fmt: skip
    for i, column in enumerate(("file", "question", "rate", "95 %", "chose", "cannot say")):
        table.add_column(column, justify="right" if i > 1 else "left", overflow="fold")
    for path, each in tallies:
        table.add_row(*_cells(str(path), each))
    for group in groups.values():
        if len(group) > 1:
            table.add_row(*_cells(f"{len(group)} files together", sum(group[1:], group[0])))
    return table


def _cells(name: str, each: Tally) -> tuple[str, ...]:
    real = each.second.startswith(REAL) and not each.first.startswith(REAL)
    question = f"{each.first} {'taken for real' if real else f'over {each.second}'}"
    low, high = interval(each.wins, each.decided)
    rate = f"{each.wins / each.decided:.1%}" if each.decided else "-"
    chose = f"{each.wins} of {each.decided}"
    between = f"{low:.1%} to {high:.1%}"
    return plain(name), plain(question), rate, between, chose, str(each.neither)


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Make | Read, prog="python -m eval.human", config=config)
    if isinstance(options, Make):
        make(options)
    else:
        out.print(read(options))


if __name__ == "__main__":
    run(main)
