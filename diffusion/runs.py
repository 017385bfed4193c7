"""A run on disk: train a model once, resume it where it was stopped, leave it whole."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from accelerate import PartialState
from torch import nn

from diffusion import checkpoint, machine, older
from diffusion.autoencoder import FILE as AUTOENCODER
from diffusion.checkpoint import Card
from diffusion.config import FitConfig, check, settings_of
from diffusion.console import UserError, doing, say, silence, track
from diffusion.data import Dataset
from diffusion.denoiser import Denoiser
from diffusion.files import (
    Damaged,
    append,
    metadata,
    read_object,
    remove,
    remove_parts,
    sealed,
    write_atomic,
)
from diffusion.folders import check_claim, claim, is_ours
from diffusion.machine import this_device
from diffusion.model import Model, load
from diffusion.owner import owned
from diffusion.pace import in_minutes, with_warning
from diffusion.pictures import save_grid
from diffusion.state import settings_of as settings_of_state
from diffusion.tracking import check_tracker, tracked
from diffusion.training import Method, Progress, fit

FINISHED = {"model.safetensors": "card", AUTOENCODER: "autoencoder"}  # what says a run's settings
GOES_ON = "the last save is kept, and the same command goes on from it"


T = TypeVar("T", covariant=True)


class Product(Protocol[T]):
    """What a training makes, and how that lies in its run's folder."""

    @property
    def file(self) -> str:
        """The name of what the run is finished by."""

    def settings(self, config: FitConfig) -> dict:
        """All that decides the result, as JSON has it: what a run is recognised by."""

    def show(self, run: Path, student: nn.Module) -> None:
        """Write samples.png of a student that is not finished."""

    def leave(self, run: Path, method: Method, training: dict) -> None:
        """Write the run's files, at last the one that finishes it. training: what was done."""

    def load(self, run: Path, precision: str) -> tuple[T, dict]:
        """What a finished run made, verified, and its settings."""


@dataclass(frozen=True)
class AModel(Product[Model]):
    """A model with its card, whose `training` names the objective's settings."""

    card: Card
    dataset: Dataset
    beside: Mapping[str, Denoiser]
    file = "model.safetensors"

    def settings(self, config: FitConfig) -> dict:
        return settings_of_run(self.card, self.dataset, config)

    def show(self, run: Path, student: nn.Module) -> None:
        assert isinstance(student, Denoiser)
        draw(run, Model(student, self.card, sha256=""), 16, self.dataset)

    def leave(self, run: Path, method: Method, training: dict) -> None:
        card, student = replace(self.card, training=training), method.players["student"].module
        assert isinstance(student, Denoiser)
        for name, denoiser in self.beside.items():  # first: a run that has its model is whole
            checkpoint.save(run / name, denoiser.net.state_dict(), card)
        leave(run, student, card, self.dataset)

    def load(self, run: Path, precision: str) -> tuple[Model, dict]:
        model = load(run, precision)
        return model, dict(model.card.training.get("settings", {}))


def train_model(
    run: Path,
    method: Method,
    dataset: Dataset,
    config: FitConfig,
    card: Card,
    advice: Callable[[], str] | None = None,
    beside: Mapping[str, Denoiser] | None = None,
) -> Model:
    """The model of this run: loaded where it is finished, else trained from where it was stopped.

    The card's `training` names the objective's settings; a run made with others is an error. Its
    `earlier_images`, those of the students it goes on from, count in the total.
    Leaves model.safetensors, log.jsonl and samples.png, which grows sharper while it trains; state/
    only while it is unfinished. A folder that holds somebody else's files is a UserError. advice:
    how a training of more than an hour could be faster. beside: by a file's name, what is kept of
    the method's followers.
    """
    return train(run, method, dataset, config, AModel(card, dataset, beside or {}), advice)


def train(
    run: Path,
    method: Method,
    dataset: Dataset,
    config: FitConfig,
    product: Product[T],
    advice: Callable[[], str] | None = None,
) -> T:
    """What this run makes: loaded where it is finished, else trained from where it was stopped."""
    config = settled(config, run)
    check(config)
    check_tracker(config.track)
    check_claim(run)
    processes, finished = PartialState(), run / product.file
    state = run / "state" / "state.safetensors"
    with nullcontext() if finished.exists() else owned(run):
        if config.minutes and not settings_before(run):
            config = in_minutes(method, dataset, config)
        if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:  # launch --cpu
            words = "accelerate launch --cpu starts one process; --multi_gpu starts several"
            say(f"{words}, CPUs or GPUs")
        settings = product.settings(config)
        shape = dataset.codec.shape(dataset.spec.shape)
        size = 16 * math.prod(shape) * config.batch_size  # x0, eps, x_t, prediction
        machine.require_memory("--batch-size", config.batch_size, size / processes.num_processes)
        news = f"finished before: {finished}"
        if not finished.exists():
            processes.wait_for_everyone()  # all have looked at the folder before the first writes
            if processes.is_main_process:
                claim(run)
                if state.exists():
                    require_same(run, settings_before(run), settings)
            processes.wait_for_everyone()
            preview = Preview(run, product)
            lines = fit(method, dataset, config, state, preview=preview, settings=settings)
            lines = tracked(with_warning(lines, config, advice), config.track, run, settings)
            lines = _logged(lines, run / "log.jsonl")
            with doing(
                f"training {run}", lambda: GOES_ON if state.exists() else "nothing was saved"
            ):
                *_, last = track(lines, str(run), _describe)
            if processes.is_main_process:
                product.leave(run, method, _spent(settings, config, last))
            processes.wait_for_everyone()
            news = f"loss {last.loss:.4f} after {last.seconds:.0f} s: {finished}"
            news += f", {run / 'samples.png'}"
        made, before = product.load(run, config.precision)
        require_same(run, before, settings)
        if processes.is_main_process:
            with suppress(OSError):  # it may lie where one cannot write
                tidy(run)  # here, as a kill may come between the model and this
        say(f"{run}  {news}")
        return made


def _spent(settings: dict, config: FitConfig, last: Progress) -> dict:
    """What the card says of a training whose last line this is."""
    images = config.iterations * config.batch_size
    return {
        "settings": settings,
        "iterations": config.iterations,
        "images": images,
        "total_images": images + settings.get("earlier_images", 0),
        "passes": last.passes,
        "seconds": last.seconds,
    }


def settings_of_run(card: Card, dataset: Dataset, config: FitConfig) -> dict:
    """All that decides a run's result, as JSON has it: what a run is recognised by."""
    plans = {plan.num_steps: list(plan.angles) for plan in card.plans}
    scale = {k: v for k, v in card.codec.items() if (k, v) != ("name", "scale")}
    scale.pop("autoencoder", None)  # its place: its sha256 says which it is
    said_elsewhere = ("sha256", "background", "aspect", "classes", "text_encoder", "text_sha256")
    images = {k: v for k, v in card.data.items() if k not in said_elsewhere}
    settings = {
        **card.training,
        **settings_of(config),
        "parent": card.parent,
        "net": older.net_settings(card.net, card.denoiser, card.condition),
        "shift": card.shift,
        "data": dataset.spec.name,
        "data_sha256": dataset.spec.sha256,
        "images": images | {"num_classes": dataset.num_classes} | scale,
        "plans": hashlib.sha256(json.dumps(plans).encode()).hexdigest()[:8],
    }
    return json.loads(json.dumps(settings))


def settled(config: FitConfig, *runs: Path) -> FitConfig:
    """The config with what `auto` and `minutes` stand for: this machine's, or an earlier start's.

    runs: where the training is, or may have been begun. From here on the first process alone
    speaks.
    """
    this_device()  # before anything asks PartialState
    if not PartialState().is_main_process:
        silence()
    before = next(filter(None, map(settings_before, runs)), {})
    if config.precision == "auto" and before.get("precision"):
        config = replace(config, precision=before["precision"])
    config = replace(config, precision=machine.precision(config.precision))
    if config.minutes and config.minutes == before.get("minutes"):
        config = replace(config, iterations=before["iterations"], warmup=before["warmup"])
    return config


def settings_before(run: Path) -> dict:
    """The settings of a run that is finished or was begun; none of one that is neither.

    A user's own state/settings.json, in a folder that is about to be refused, is not read.
    """
    if not is_ours(run):
        return {}
    for name, described in FINISHED.items():
        if (run / name).exists():
            try:
                return json.loads(metadata(run / name)[described])["training"].get("settings", {})
            except (AttributeError, LookupError, TypeError, ValueError):  # loading it says why
                return {}
    return settings_of_state(run / "state" / "state.safetensors")


class Preview:
    """Draws samples.png of a training's averaged weights, as long as that takes little time."""

    SHARE = 0.05  # of the time since the picture before

    def __init__(self, run: Path, product: Product):
        self.run, self.product = run, product
        self.drawn, self.took = time.monotonic(), 0.0

    def __call__(self, student: nn.Module) -> None:
        begun = time.monotonic()
        if not self.took:
            say(f"{self.run / 'samples.png'}  its samples, drawn anew as it trains")
        if self.took <= self.SHARE * (begun - self.drawn):
            self.product.show(self.run, student)
            self.drawn = time.monotonic()
            self.took = self.drawn - begun


def draw(run: Path, model: Model, calls: int = 50, dataset: Dataset | None = None) -> None:
    """Write samples.png, 64 images by the model's own plan, or where that is longer by a solver.

    dataset: whose held-out images say what the model is told, where nothing is usual.
    """
    indices, steps = torch.arange(64, device=model.device), model.card.plans[0].num_steps
    # a teacher's 1000 calls would take longer than its training where there is no GPU
    sampler = next((name for name in QUICK if name in model.solvers), None)
    plan = model.plan(calls, sampler) if steps > calls and sampler else model.card.plans[0]
    with torch.compiler.set_stance("force_eager"):  # to compile for one batch would take longer
        given = dataset.given(indices, model.kinds) if dataset else None
        images = model.sample(plan, 0, indices, given)
    save_grid(run / "samples.png", images)


QUICK = ("unipc", "dpm-solver++", "ddim")  # solvers of few calls, the best first


def leave(run: Path, denoiser: Denoiser, card: Card, dataset: Dataset | None = None) -> None:
    """Write the run's samples.png, then its model.safetensors: the run is finished."""
    weights = {name: value.cpu() for name, value in denoiser.net.state_dict().items()}
    model = Model(denoiser.requires_grad_(False), card, checkpoint.weights_sha256(weights))
    draw(run, model, dataset=dataset)
    checkpoint.save(run / "model.safetensors", weights, card)


def tidy(run: Path) -> None:
    """Delete what only an unfinished run needs; whatever else lies there is not the run's."""
    for name in ("state.safetensors", "settings.json"):
        remove(run / "state" / name)
    for name in (*FINISHED, "log.jsonl", "samples.png"):
        remove_parts(run / name)
    with suppress(OSError):  # not empty
        (run / "state").rmdir()


def require_same(run: Path, before: dict, now: dict) -> None:
    """UserError where the run there has other settings; one that it lacks was off, as 0 or none.

    Images are known by their sha256, wherever they lie; where a run has none, by their name.
    """
    known = before.get("data_sha256") and now.get("data_sha256")
    if known and before["data_sha256"] != now["data_sha256"]:
        raise UserError(
            f"{run} was trained on other images than {now['data']} holds, or on another "
            "--background: give those again, or another --out, or delete it"
        )
    if known:
        before, now = _anywhere(before), _anywhere(now)
    keys = (before.keys() | now.keys()) - {"data_sha256"}
    for key in sorted(keys, key=lambda key: (key != "minutes", key)):
        if (before.get(key) or None) != (now.get(key) or None):
            raise UserError(
                f"{run} holds a run with other settings ({key} was {before.get(key)}, now "
                f"{now.get(key)}): give the same, or another --out, or delete it"
            )


def _anywhere(settings: dict) -> dict:
    """The settings without the place of the images."""
    images = {k: v for k, v in settings.get("images", {}).items() if k != "name"}
    return {k: v for k, v in settings.items() if k != "data"} | {"images": images}


def _describe(p: Progress) -> tuple[int, int, str]:
    return p.iteration, p.iterations, f"loss {p.loss:.4f}  {p.images_per_second:,.0f} images/s"


def _logged(lines: Iterator[Progress], path: Path) -> Iterator[Progress]:
    """Append each line to the log; lines that a resumed run makes again are first cut off."""
    for first, line in enumerate(lines):
        if PartialState().is_main_process:
            if first == 0:
                before = _lines_before(path, line.iteration)
                if (lacking := line.number - 1 - len(before)) > 0:
                    say(f"{path} lacks {lacking} of its {line.number - 1} lines: it was damaged")
                write_atomic(path, "".join(before))
            append(path, json.dumps(sealed(line._asdict())) + "\n")
        yield line


def _lines_before(path: Path, iteration: int) -> list[str]:
    """The log's whole lines of before that iteration."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        with suppress(Damaged, KeyError, TypeError):
            if line.endswith(b"\n") and read_object(line, path)["iteration"] < iteration:
                kept.append(line.decode())
    return kept
