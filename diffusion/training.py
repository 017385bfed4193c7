"""THE training loop. Objectives differ; everything else is here, once."""

import math
import signal
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from pydantic import TypeAdapter
from torch import Tensor, nn

from diffusion.batches import Batch, Batches, split
from diffusion.config import FitConfig, check, learning_rate
from diffusion.console import Interrupted, UserError
from diffusion.data import Dataset
from diffusion.denoiser import Denoiser
from diffusion.sharded import Held, gathered, portion
from diffusion.state import Moments, Part, restore, save
from diffusion.typed import Amount, Count, Positive

Nets = Mapping[str, nn.Module]  # a method's players by name


class Follower(Part, Protocol):
    """What moves on after each step: an average of weights, a running moment, a history."""

    def follow(self, nets: Nets, done: int, progress: float) -> None:
        """Move on after iteration number `done`, which began at this share of the training."""


Followers = Mapping[str, Follower]  # by name


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


def _of_student(objective: Objective, nets: Nets, batch: Batch, turn: Turn) -> Tensor:
    return objective(nets["student"], batch, turn.progress)


def one_network(student: nn.Module, objective: Objective) -> Method:
    """The method that trains one network by an objective."""
    loss = partial(_of_student, objective)  # unlike a closure, copied with all that it holds
    return Method({"student": Player(student)}, loss, objective.followers)


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
    kinds = getattr(method.players["student"].module, "kinds", None)
    batches = Batches(dataset, config, worker, kinds)
    team = Team(method, worker, config, fused)
    kept = restore(state, team.parts, LINE)
    last = first = kept or Progress(0, config.iterations, 0.0, 0.0, 0.0, 0.0, 0.0)
    team.student_steps = sum(map(method.players["student"].moves, range(first.iteration)))
    alone = worker.num_processes == 1  # else all must agree on where to stop
    logged = saved = time.monotonic()
    if kept:
        yield kept  # its line in the log may not have been written
    with _stop_requests() as stop, closing(batches):
        for i in range(first.iteration, config.iterations):
            team.step(batches.draw(i), i)
            done = i + 1
            due = done % config.log_every == 0 or done == config.iterations
            if alone:  # the first line comes early, too: it tells the pace
                due = due or stop or (last is first and time.monotonic() - logged > EARLY)
            if not due:
                continue
            wishes = len(stop), time.monotonic() - saved >= config.save_every
            loss, norm, largest, passes, stopped, keep = team.means(done - last.iteration, *wishes)
            now, keep = time.monotonic(), keep or stopped or done == config.iterations
            if not math.isfinite(loss + norm + largest):
                raise _diverged(done, kept, state, config)
            pace = (done - last.iteration) * config.batch_size / (now - logged)
            figures = loss, norm, learning_rate(config, i), pace, last.seconds + now - logged
            counts = last.number + 1, last.passes + round(passes * worker.num_processes)
            line = Progress(done, config.iterations, *figures, *counts)
            if keep:
                save(state, team.parts, line._asdict(), settings, worker.is_main_process)
                saved, kept = now, line
            if preview and (keep or last is first) and not stopped:
                team.show(preview)
            if stopped:
                where = f"stopped at iteration {done} of {config.iterations}"
                number = stop[0] if stop else signal.SIGTERM
                raise Interrupted(f"{where}; the same command resumes", number)
            last, logged = line, now
            yield line
    team.finish()


class Team:
    """A method's players and followers, ready to move: several processes share the networks."""

    def __init__(self, method: Method, worker: Accelerator, config: FitConfig, fused: bool):
        self.method, self.worker, self.config = method, worker, config
        self.nets = {name: player.module.train() for name, player in method.players.items()}
        self.average = Average(
            frozen_copy(self.nets["student"]), partial(_decay, config.ema), fused
        )
        self.followers = {"average": self.average, **method.followers}
        averages = [each.module for each in self.followers.values() if isinstance(each, Average)]
        self.held = Held([*self.nets.values(), *averages], worker)
        self.trained = {
            name: [p for p in net.parameters() if p.requires_grad]  # the rest are kept still
            for name, net in self.nets.items()
        }
        adamw = partial(
            torch.optim.AdamW,
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=fused,
            foreach=False,  # where it is not fused, one parameter after the other
        )
        self.optimizers = {name: adamw(own) for name, own in self.trained.items()}
        self.parts: dict[str, Part] = {
            **self.nets,
            **{f"follower.{name}": follower for name, follower in self.followers.items()},
            **{f"optimizer.{name}": Moments(each) for name, each in self.optimizers.items()},
        }
        if config.compile:  # what is never called is never compiled
            for part in self.parts.values():
                module = getattr(part, "module", part)
                if isinstance(module, Denoiser):
                    module.net.compile()
        self.shared = {name: self.held.synchronised(net) for name, net in self.nets.items()}
        self.sums = torch.zeros(2, device=worker.device)  # of losses and gradients' norms
        self.passes = 0  # images that a denoiser's network was called on within the losses
        self.student_steps = 0

    def step(self, batch: Batch, i: int) -> None:
        """Move those whose turn it is at iteration i, then the followers.

        batch: this process's share. Each image counts alike, however unevenly they are shared out:
        the processes' gradients are averaged, so each divides its sum by their mean share.
        """
        config, players = self.config, self.method.players
        movers = tuple(name for name, player in players.items() if player.moves(i))
        turn = Turn(i, i / config.iterations, movers)
        still = {name: net for name, net in self.nets.items() if name not in movers}
        waiting = [parameter for name in still for parameter in self.trained[name]]
        for parameter in waiting:
            parameter.requires_grad_(False)
        total, share = 0, config.batch_size / self.worker.num_processes
        for number, part in enumerate(split(batch, config.accumulate), 1):
            with ExitStack() as alone:
                if number < config.accumulate:
                    for name in movers:
                        alone.enter_context(getattr(self.shared[name], "no_sync", nullcontext)())
                before = Denoiser.passes
                loss = self.method.loss({**self.shared, **still}, part, turn).sum() / share
                self.passes += Denoiser.passes - before
                self.worker.backward(loss)
            total = total + loss.detach()
        moved = [parameter for name in movers for parameter in self.trained[name]]
        norm = gathered(nn.utils.clip_grad_norm_(moved, config.clip))
        rate = learning_rate(config, i)
        for name in movers:
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = rate * players[name].rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter in waiting:
            parameter.requires_grad_(True)
        self.sums += torch.stack([torch.as_tensor(total), norm])
        if "student" in movers:
            self.student_steps += 1
            self.average.follow(self.nets, self.student_steps, turn.progress)
        for follower in self.method.followers.values():
            follower.follow(self.nets, i + 1, turn.progress)

    def means(self, steps: int, *wishes: int) -> list[float]:
        """Over all processes: the loss and the norm of its gradient in these last steps, the
        largest weight, which is not finite where any is not, the passes, and the wishes."""
        weights = [portion(p.detach()) for net in self.nets.values() for p in net.parameters()]
        weights = [weight for weight in weights if weight.numel()]
        largest = torch.stack(torch._foreach_norm(weights, math.inf)).float().amax(0, keepdim=True)
        mine = self.sums.new_tensor([self.passes, *wishes])
        means = torch.cat([self.sums / steps, largest, mine])
        self.sums.zero_()
        self.passes = 0
        return self.worker.reduce(means, "mean").tolist()

    def show(self, preview: Callable[[nn.Module], None]) -> None:
        """Show the averaged student, whole, in the first process."""
        student = self.held.whole(self.average.module)
        if self.worker.is_main_process:
            preview(student)

    def finish(self) -> None:
        """Leave the student with its averaged weights, and all networks whole."""
        self.nets["student"].load_state_dict(self.average.state_dict())
        self.held.gather()
        for net in self.nets.values():
            net.eval()


def _decay(ema: float, done: int, progress: float) -> float:
    """The average's decay: it starts fast, at 1/10, and ends at what was asked for."""
    return min(ema, done / (done + 9))


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


def _diverged(done: int, kept: Progress | None, state: Path, config: FitConfig) -> UserError:
    """The error that says what is on disk. kept: the line of the log at which that was saved."""
    saved = "nothing was saved"
    if kept:
        saved = f"{state} is of iteration {kept.iteration}, of loss {kept.loss:.4g}: delete it"
    return UserError(
        f"the loss, its gradient or a weight is not finite at iteration {done}; {saved}; "
        f"try a lower --learning-rate than {config.learning_rate:g}"
    )
