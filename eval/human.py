"""Blind side-by-side judgement by people: `python -m eval.human make A B`, then `… read results.json`."""

import base64
import hashlib
import json
import random
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from diffusion import checkpoint, model
from diffusion import data as datasets
from diffusion.checkpoint import write_atomic
from diffusion.console import UserError, at_least, out, run, say
from diffusion.folders import check_file
from diffusion.image_file import Form, reason
from diffusion.images import some
from diffusion.noise import check_seed, seed32
from eval.show import pages
from students import generate

FORMAT = "fewstep-human-1"
ANSWERS = ("left", "right", "neither")
REAL = "real:"
QUESTIONS = {True: "Which of the two is real?", False: "Which of the two looks better?"}


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
        counts = ("wins", "losses", "neither")
        sums = (getattr(self, name) + getattr(other, name) for name in counts)
        return Tally(self.first, self.second, *sums)


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927), by default at 95 %; (0, 1) of no trials."""
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, z * z / trials
    middle = share + square / 2
    half = (square * (share * (1 - share) + square / 4)) ** 0.5
    return max((middle - half) / (1 + square), 0.0), min((middle + half) / (1 + square), 1.0)


def images_of(source: str, options: Make, shape: tuple | None) -> Tensor:
    """(N, C, H, W) uint8, at least as many as pairs. shape: of the other's images, for a real folder."""
    path = Path(source)
    if source.startswith(REAL):
        size, channels = (shape[-1], shape[0]) if shape else (32, 3)
        form = Form(size, channels, background_of(options))
        dataset = datasets.load(source.removeprefix(REAL), options.data_dir, form)
        images = _some(some(dataset.train).images, options.seed)
    elif path.suffix == ".npz":
        images = _npz(path)
    elif _holds_images(path):
        images = _some(_folder(path), options.seed)
    else:
        images = _generated(source, options)
    if len(images) < options.pairs:
        raise UserError(
            f"{source} holds {len(images)} images, fewer than --pairs {options.pairs}: ask for fewer pairs"
        )
    return images[: options.pairs]


def background_of(options: Make) -> str:
    """The colour behind real images: the one that is given, else that of a side's checkpoint."""
    if options.background:
        return options.background
    for source in (options.a, options.b):
        if source.startswith(REAL) or source.endswith(".npz") or _holds_images(Path(source)):
            continue
        _, card, _ = checkpoint.load(_checkpoint(source)[0])
        return card.data.get("background") or Form.background
    return Form.background


def _holds_images(path: Path) -> bool:
    return path.is_dir() and not (path / "model.safetensors").exists() and any(path.glob("*.png"))


def _some(images: Tensor, seed: int) -> Tensor:
    """In random order: files may be sorted by what they show."""
    random = torch.Generator().manual_seed(seed32(seed))
    return images[torch.randperm(len(images), generator=random)]


def _npz(path: Path) -> Tensor:
    try:
        images = np.load(path, allow_pickle=False)["images"]
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: expected an .npz file with `images` ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"{path}: expected uint8 images, N x H x W x 1 or 3, got {images.dtype} {images.shape}"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _folder(path: Path) -> Tensor:
    images = []
    for file in sorted(filter(Path.is_file, path.glob("*.png"))):
        try:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB")))
        except Exception as error:  # decoders raise anything
            raise UserError(f"{file} cannot be read: it is {reason(error)}") from error
        if images[-1].shape != images[0].shape:
            raise UserError(
                f"{file} is not of the others' size {images[0].shape[:2]}: it is {images[-1].shape[:2]}"
            )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _generated(source: str, options: Make) -> Tensor:
    path, steps = _checkpoint(source)
    made = generate.Options(path, options.pairs, steps, seed=options.seed)
    return torch.cat(list(generate.generate(model.load(path), made)))


def _checkpoint(source: str) -> tuple[Path, int | None]:
    """RUN or RUN@4: the checkpoint, and the steps where they are named."""
    name, _, steps = source.rpartition("@")
    named = bool(name) and steps.isdecimal() and not Path(source).exists()
    return Path(name if named else source), int(steps) if named else None


def seal(secret: dict) -> str:
    """The secret so that it is not read at a glance. No protection against who wants to know."""
    text = json.dumps(secret, sort_keys=True).encode()
    digest = hashlib.sha256(text).digest()[:16]
    return base64.b64encode(digest + _hide(text, digest)).decode()


def unseal(sealed: str) -> dict:
    """What was sealed; ValueError where a character of it has changed."""
    raw = base64.b64decode(sealed, validate=True)
    text = _hide(raw[16:], raw[:16])
    if hashlib.sha256(text).digest()[:16] != raw[:16]:
        raise ValueError("the sealed sides are damaged")
    return json.loads(text)


def _hide(text: bytes, digest: bytes) -> bytes:
    """Its own inverse."""
    stream = hashlib.shake_256(digest).digest(len(text))
    return bytes(a ^ b for a, b in zip(text, stream, strict=True))


def arrange(pairs: int, seed: int) -> tuple[list[int], list[bool]]:
    """The images' numbers in the order they are shown, and whether A is on the left: as often as not."""
    chance = random.Random(seed)
    order, a_left = list(range(pairs)), [i % 2 == 0 for i in range(pairs)]
    chance.shuffle(order)
    chance.shuffle(a_left)
    return order, a_left


def page(options: Make) -> str:
    """The page's HTML."""
    names = (options.a, options.b)
    found: dict[int, Tensor] = {}
    for i in sorted((0, 1), key=lambda i: names[i].startswith(REAL)):
        shape = tuple(found[1 - i].shape[1:]) if found else None
        found[i] = images_of(names[i], options, shape)
    a, b = found[0], found[1]
    if a.shape[2:] != b.shape[2:]:
        sizes = " and ".join(f"{tuple(x.shape[2:])} in {name}" for x, name in zip((a, b), names))
        raise UserError(f"both sides must have images of one size, got {sizes}")
    order, a_left = arrange(options.pairs, options.seed)
    uris = [[pages.data_uri(image.expand(3, -1, -1)) for image in images] for images in (a, b)]
    shown = [[uris[not left][i], uris[left][i]] for i, left in zip(order, a_left, strict=True)]
    real = options.a.startswith(REAL) != options.b.startswith(REAL)
    sealed = seal({"a": options.a, "b": options.b, "a_left": a_left, "seed": options.seed})
    content = {"format": FORMAT, "question": QUESTIONS[real], "sealed": sealed, "pairs": shown}
    return pages.fill("human", content=json.dumps(content).replace("</", "<\\/"))


def make(options: Make) -> None:
    at_least(1, options, "pairs")
    check_seed(options.seed)
    check_file(options.out)
    write_atomic(options.out, page(options))
    say(f"{options.out}: {options.pairs} pairs; open it in a browser, then `read` what it saves")


def tally(path: Path) -> Tally:
    """The judgements of one results file: wins are A's, or the generated images' against real ones."""
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, expected {FORMAT!r}")
        secret = unseal(found["sealed"])
        sides, answers = secret["a_left"], found["answers"]
        if not isinstance(answers, list) or len(answers) > len(sides) or {*answers} - {*ANSWERS}:
            raise ValueError(f"expected at most {len(sides)} answers out of {', '.join(ANSWERS)}")
        session = str(found["session"])
    except FileNotFoundError:
        raise UserError(f"no file {path}: expected what the page's Download button saved") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a results file of eval.human ({error!s:.200})") from error
    a, b = secret["a"], secret["b"]
    chosen = [
        (answer == "left") == left for answer, left in zip(answers, sides) if answer != "neither"
    ]
    wins = sum(chosen)
    if a.startswith(REAL) and not b.startswith(REAL):
        a, b, wins = b, a, len(chosen) - wins
    return Tally(a, b, wins, len(chosen) - wins, len(answers) - len(chosen), session)


def read(options: Read) -> Table:
    """A line per file, and one for all files of the same two."""
    if not options.files:
        raise UserError("read takes the files that the page's Download button saved, got none")
    found = [(path, tally(path)) for path in options.files]
    seen: dict[str, Path] = {}
    groups: dict[tuple, list[Tally]] = {}
    for path, each in found:
        if each.session in seen:
            raise UserError(
                f"{path} and {seen[each.session]} hold one session's judgements: give one of them"
            )
        seen[each.session] = path
        groups.setdefault((each.first, each.second), []).append(each)
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left", caption=(
        "rate: of the judgements that chose a side, with Wilson's 95 % interval, every judgement "
        "counted as independent; taken for real at 50 % means not to be told from real"
    ))  # fmt: skip
    for i, column in enumerate(("file", "question", "rate", "95 %", "chose", "cannot say")):
        table.add_column(column, justify="right" if i > 1 else "left", overflow="fold")
    for path, each in found:
        table.add_row(*_cells(str(path), each))
    for same in groups.values():
        if len(same) > 1:
            table.add_row(*_cells(f"{len(same)} files together", sum(same[1:], same[0])))
    return table


def _cells(name: str, found: Tally) -> tuple[str, ...]:
    real = found.second.startswith(REAL) and not found.first.startswith(REAL)
    question = f"{found.first} {'taken for real' if real else f'over {found.second}'}"
    low, high = wilson(found.wins, found.decided)
    rate = f"{found.wins / found.decided:.1%}" if found.decided else "-"
    between = f"{low:.1%} to {high:.1%}"
    chose = f"{found.wins} of {found.decided}"
    return escape(name), escape(question), rate, between, chose, str(found.neither)


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Make | Read, prog="python -m eval.human", config=config)
    if isinstance(options, Make):
        make(options)
    else:
        out.print(read(options))


if __name__ == "__main__":
    run(main)
