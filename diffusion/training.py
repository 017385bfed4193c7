"""THE training loop. Objectives differ; everything else is here, once."""

import json
import math
import signal
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from pydantic import TypeAdapter
from torch import Tensor, nn

from diffusion import older
from diffusion.batches import Batch, Batches, split
from diffusion.config import FitConfig, check, learning_rate
from diffusion.console import Interrupted, UserError
from diffusion.data import Dataset
from diffusion.denoiser import Denoiser
from diffusion.files import load_tensors, save_tensors, sealed
from diffusion.typed import Amount, Count, Positive, checked, parse

Nets = Mapping[str, nn.Module]  # a method's players by name


class Follower(Protocol):
    """What moves on after each step: an average of weights, a running moment, a history.

    It saves and restores itself; its state is the same in every process.
    """

    def follow(self, nets: Nets, done: int, progress: float) -> None:
        """Move on after iteration number `done`, which began at this share of the training."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed training needs of it."""

    def load_state_dict(self, state: dict[str, Tensor], /) -> Any: ...


Followers = Mapping[str, Follower]  # by name
Optimizers = Mapping[str, torch.optim.Optimizer]  # by the name of the player that each moves


@dataclass(frozen=True)
class Average:
    """A network that follows a player: w <- decay w + (1 - decay) player, after each step."""

    module: nn.Module
    decay: Callable[[int, float], float]
    """(iterations done, share of the training at the last one's start) -> decay."""
    fused: bool = True
    """A few kernels for all parameters, not one for each."""
    player: str = "student"
    """Whom it follows."""

    @torch.no_grad()
    def follow(self, nets: Nets, done: int, progress: float = 0.0) -> None:
        kept: list[Tensor] = list(self.module.parameters())
        new: list[Tensor] = list(nets[self.player].parameters())
        share = 1 - self.decay(done, progress)
        if self.fused:
            torch._foreach_lerp_(kept, new, share)
            return
        for old, value in zip(kept, new, strict=True):
            old.lerp_(value, share)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state)


class Turn(NamedTuple):
    """Where a training is when it asks for a loss."""

    iteration: int
    """Iterations done before."""
    progress: float
    """The share of the training that is done, in [0, 1)."""
    movers: tuple[str, ...]
    """The players that move on this loss."""


def always(iteration: int) -> bool:
    return True


@dataclass(frozen=True)
class Player:
    """A network that is trained, by its own optimizer."""

    module: nn.Module
    moves: Callable[[int], bool] = always
    """Whether it moves at that iteration, the first being 0. Someone must at each."""
    rate: float = 1.0
    """Its learning rate, as a multiple of --learning-rate."""


@dataclass(frozen=True)
class Method:
    """What is trained, and on what: the loop knows no more of a method."""

    players: Mapping[str, Player]
    """By name. The one named "student" is what a training is for."""
    loss: Callable[[Nets, Batch, Turn], Tensor]
    """Loss per image (B,), of those whose turn it is: only they get gradients, which are cut to
    --clip all together."""
    followers: Followers = field(default_factory=dict)
    """What the loss reads and moves on with the training, by name. "average" is the loop's own, of
    the student."""

    def __post_init__(self) -> None:
        taken = {"average"} & {*self.followers} | {"follower", "optimizer"} & {*self.players}
        if taken or "student" not in self.players:
            raise ValueError(
                f"players {[*self.players]} and followers {[*self.followers]}: one player must be "
                'named "student", and "average", "follower", "optimizer" are names of the loop'
            )


class Objective(Protocol):
    """The loss of a method with one network, per image (B,)."""

    @property
    def followers(self) -> Followers:
        """What it reads and moves on with the training, by name."""

    def __call__(self, student: nn.Module, batch: Batch, progress: float) -> Tensor:
        """progress: the share of the training that is done, in [0, 1)."""


@dataclass(frozen=True)
class OnStudent:
    """An objective as a method's loss."""

    objective: Objective

    def __call__(self, nets: Nets, batch: Batch, turn: Turn) -> Tensor:
        return self.objective(nets["student"], batch, turn.progress)


def one_network(student: nn.Module, objective: Objective) -> Method:
    """The method that trains one network by an objective."""
    return Method({"student": Player(student)}, OnStudent(objective), objective.followers)


class Progress(NamedTuple):
    """One log line; loss and gradient norm are means since the last."""

    iteration: Positive
    iterations: Positive
    loss: float
    gradient_norm: float
    learning_rate: Amount
    images_per_second: Amount
    seconds: Amount
    number: Count = 0  # of lines with this one; 0 in a state from before they were counted
    passes: Count = 0  # forward, of all networks, on an image each; 0 as above


LINE = TypeAdapter(Progress)


# The mend for a state that cannot be read, and what it costs.
DELETE = "delete it, and the training begins anew; no finished model is touched"
EARLY = 5.0  # seconds to the first line at the latest, or to the end of the step


Network = TypeVar("Network", bound=nn.Module)


def frozen_copy(network: Network) -> Network:
    return deepcopy(network).eval().requires_grad_(False)


def fit(
    method: Method,
    dataset: Dataset,
    config: FitConfig,
    state: Path,
    fused: bool = True,
    preview: Callable[[nn.Module], None] | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Generator[Progress]:
    """Train a method's players in place; its student ends with its averaged weights.

    Resumes from the file `state` where there is one, to the same result bit for bit, and
    writes it, the run's settings in it, after log lines. A loss or weights that are not finite
    raise UserError before they are written.
    fused: of the optimizers and the average; what that saves, benchmarks.speed measures.
    preview: is shown the averaged student early and after each save, in the first process.
    """
    check(config)
    worker = make_worker()
    nets = {name: player.module for name, player in method.players.items()}
    student = nets["student"]
    batches = Batches(dataset, config, worker, getattr(student, "kinds", None))
    for net in nets.values():
        net.to(worker.device).train()
    trained = {name: [p for p in net.parameters() if p.requires_grad] for name, net in nets.items()}
    moves = method.players["student"].moves
    average = Average(frozen_copy(student), Decay(config.ema), fused)
    followers = {"average": average, **method.followers}
    optimizers = {name: _optimizer(trained[name], config, fused) for name in nets}
    before = _restore(state, nets, followers, optimizers)
    start, spent, number, passes = (
        (before.iteration, before.seconds, before.number, before.passes) if before else (0,) * 4
    )
    if config.compile:  # what is never called is never compiled
        averaged = (getattr(follower, "module", None) for follower in followers.values())
        for module in (*nets.values(), *averaged):
            if isinstance(module, Denoiser):
                module.net.compile()
    team = Team(method, worker, trained, optimizers)

    sums, counted = torch.zeros(2, device=worker.device), 0
    begun = logged = saved = time.monotonic()
    lines, kept = 0, before
    alone = worker.num_processes == 1  # else all must agree on where to stop
    if before:
        yield before  # its line in the log may not have been written
    student_steps = sum(map(moves, range(start)))
    with _stop_requests() as stop, closing(batches):
        for i in range(start, config.iterations):
            done, progress = i + 1, i / config.iterations
            rate = learning_rate(config, i)
            movers = tuple(name for name, each in method.players.items() if each.moves(i))
            turn = Turn(i, progress, movers)
            sums += team.step(batches.draw(i), turn, rate, config)
            counted += 1
            if moves(i):
                student_steps += 1
                average.follow(nets, student_steps, progress)
            for follower in method.followers.values():
                follower.follow(nets, done, progress)
            due = done % config.log_every == 0 or done == config.iterations
            if alone and not (due or lines):  # the first line comes early: it tells the pace
                due = time.monotonic() - begun > EARLY
            if not due and not (stop and alone):
                continue
            mine = sums.new_tensor([len(stop), team.passes])
            means = worker.reduce(torch.cat([sums / counted, _largest(nets), mine]), "mean")
            mean_loss, mean_norm, largest, stopped, passed = means.tolist()
            now = time.monotonic()
            if not math.isfinite(mean_loss + mean_norm + largest):
                raise _diverged(done, kept, state, config)
            seconds = spent + now - begun
            pace = counted * config.batch_size / (now - logged)
            passes += round(passed * worker.num_processes)
            number += 1
            means = mean_loss, mean_norm
            line = Progress(done, config.iterations, *means, rate, pace, seconds, number, passes)
            save = stopped or done == config.iterations or now - saved >= config.save_every
            if worker.is_main_process and save:
                _save(state, nets, followers, optimizers, line, settings)
                saved, kept = now, line
            if preview and worker.is_main_process and (save or not lines) and not stopped:
                preview(average.module)
            lines += 1
            if stopped:
                where = f"stopped at iteration {done} of {config.iterations}"
                number = stop[0] if stop else signal.SIGTERM
                raise Interrupted(f"{where}; the same command resumes", number)
            sums.zero_()
            counted, team.passes, logged = 0, 0, now
            yield line
    student.load_state_dict(average.module.state_dict())
    for net in nets.values():
        net.eval()


class Team:
    """A method's players, ready to move: their networks as several processes share them."""

    def __init__(
        self,
        method: Method,
        worker: Accelerator,
        trained: Mapping[str, list[nn.Parameter]],
        optimizers: Optimizers,
    ):
        """trained: each player's parameters but those that it keeps still."""
        self.method, self.worker, self.trained = method, worker, trained
        self.bare = {name: player.module for name, player in method.players.items()}
        self.shared = {name: worker.prepare(net) for name, net in self.bare.items()}
        self.optimizers = {name: worker.prepare(each) for name, each in optimizers.items()}
        self.passes = 0  # images that a denoiser's network was called on within the losses

    def step(self, batch: Batch, turn: Turn, rate: float, config: FitConfig) -> Tensor:
        """Move those whose turn it is. (2,): the loss, and the norm of its gradient.

        batch: this process's share. Each image counts alike, however unevenly they are shared out:
        the processes' gradients are averaged, so each divides its sum by their mean share.
        """
        still = self.bare.keys() - {*turn.movers}
        waiting = list(chain(*(self.trained[name] for name in still)))
        for parameter in waiting:
            parameter.requires_grad_(False)
        nets = {name: (self.bare if name in still else self.shared)[name] for name in self.bare}
        total, share = 0, config.batch_size / self.worker.num_processes
        for number, part in enumerate(split(batch, config.accumulate), 1):
            with ExitStack() as alone:
                if number < config.accumulate:
                    for name in turn.movers:
                        alone.enter_context(self.worker.no_sync(self.shared[name]))
                before = Denoiser.passes
                loss = self.method.loss(nets, part, turn).sum() / share
                self.passes += Denoiser.passes - before
                self.worker.backward(loss)
            total = total + loss.detach()
        moved = list(chain(*(self.trained[name] for name in turn.movers)))
        norm = self.worker.clip_grad_norm_(moved, config.clip)
        for name in turn.movers:
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = rate * self.method.players[name].rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter in waiting:
            parameter.requires_grad_(True)
        return torch.stack([torch.as_tensor(total), norm])


@dataclass(frozen=True)
class Decay:
    """The average's decay: it starts fast, at 1/10, and ends at what was asked for."""

    ema: float

    def __call__(self, done: int, progress: float) -> float:
        return min(self.ema, done / (done + 9))


def _optimizer(
    parameters: list[nn.Parameter], config: FitConfig, fused: bool
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=fused,
        foreach=False,  # where it is not fused, one parameter after the other
    )


def make_worker() -> Accelerator:
    """The processes of this training, whatever accelerate's variables in the environment say of it.

    Precision is the denoiser's own affair and compiling --compile's; a plugin alone keeps
    ACCELERATE_GRADIENT_ACCUMULATION_STEPS from dividing the gradients.
    """
    return Accelerator(
        mixed_precision="no",
        cpu=not torch.cuda.is_available(),
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


@contextmanager
def _stop_requests() -> Generator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second one is not waited for."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _largest(nets: Nets) -> Tensor:
    """(1,): the largest weight, which is not finite where any is not."""
    weights = [p.detach() for net in nets.values() for p in net.parameters()]
    return torch.stack(torch._foreach_norm(weights, math.inf)).float().amax(0, keepdim=True)


def _diverged(done: int, kept: Progress | None, state: Path, config: FitConfig) -> UserError:
    """The error that says what is on disk. kept: the line of the log at which that was saved."""
    saved = "nothing was saved"
    if kept:
        saved = f"{state} is of iteration {kept.iteration}, of loss {kept.loss:.4g}: delete it"
    return UserError(
        f"the loss, its gradient or a weight is not finite at iteration {done}; {saved}; "
        f"try a lower --learning-rate than {config.learning_rate:g}"
    )


def _save(
    path: Path,
    nets: Nets,
    followers: Followers,
    optimizers: Optimizers,
    line: Progress,
    settings: Mapping[str, Any],
) -> None:
    tensors = {}
    for name, net in nets.items():
        tensors |= {f"{name}.{key}": value for key, value in net.state_dict().items()}
    for name, follower in followers.items():
        tensors |= {f"follower.{name}.{k}": v for k, v in follower.state_dict().items()}
    for name, optimizer in optimizers.items():
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{i}.{slot}": v for slot, v in slots.items()}
    described = {"line": line._asdict(), "settings": sealed(dict(settings))}
    save_tensors(path, tensors, {name: json.dumps(each) for name, each in described.items()})


def _restore(
    path: Path, nets: Nets, followers: Followers, optimizers: Optimizers
) -> Progress | None:
    """The line of the log at which the state was saved; None where there is no state."""
    if not path.exists():
        return None
    try:
        return _restored(path, nets, followers, optimizers)
    except (UserError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "state_dict" not in str(error):  # out of memory
            raise
        reason = str(error) if isinstance(error, UserError) else f"{path} is of another training"
        raise UserError(f"{reason}: {DELETE}") from error


def _restored(path: Path, nets: Nets, followers: Followers, optimizers: Optimizers) -> Progress:
    tensors, metadata = load_tensors(path)
    parameters = {name: each.param_groups[0]["params"] for name, each in optimizers.items()}
    sizes = {name: len(moved) for name, moved in parameters.items()}
    tensors = older.state(tensors, sizes, list(followers))

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    for name, net in nets.items():
        net.load_state_dict(part(f"{name}."))
    for name, follower in followers.items():
        follower.load_state_dict(part(f"follower.{name}."))
    for name, optimizer in optimizers.items():
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in part(f"optimizer.{name}.").items():
            i, slot = key.split(".")
            like = parameters[name][int(i)]
            if value.shape == like.shape:  # a moment: in memory it must lie as its parameter does
                value = torch.empty_like(like).copy_(value)
            slots.setdefault(int(i), {})[slot] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": slots, "param_groups": groups})
    return checked(LINE, parse(metadata["line"]), f"{path}: its line")
