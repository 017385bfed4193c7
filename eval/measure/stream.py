"""Images by the batch, shared out among processes, looked at and forgotten; resumable."""

import time
from collections.abc import Callable, Iterator
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from diffusion.codec import Codec
from diffusion.condition import Condition, Kinds, Label, of_images
from diffusion.console import UserError, out_of_memory, say
from diffusion.files import Damaged, load_tensors, remove, save_tensors
from diffusion.plan import Plan
from eval.measure.judge import Asked, Judge
from eval.measure.real import Real
from eval.measure.seen import Seen

SAVE_EVERY = 30.0  # seconds


class Maker(Protocol):
    """What images are streamed from: a Model, or an Outside row, which has no plan."""

    @property
    def device(self) -> torch.device: ...

    @property
    def codec(self) -> Codec: ...

    @property
    def kinds(self) -> Kinds: ...

    def x0(
        self, plan: Any, seed: int, indices: Tensor, given: Condition | None = None, /
    ) -> Tensor: ...


def indices(model: Maker, start: int, end: int) -> Tensor:
    """The numbers of images start to end, on the model's device."""
    return torch.arange(start, end, device=model.device)


def look(
    judge: Judge,
    model: Maker,
    plan: Plan | None,
    seed: int,
    num_images: int,
    batch_size: int,
    part: Path,
    watch: Callable[[Callable[[], Tensor], int], Tensor] = lambda call, _: call(),
) -> Iterator[tuple[int, Seen]]:
    """(images, what they show) after each batch, this process's; at last those of all processes.

    part: a file's stem, beside which each process keeps what it has seen so that a killed one
    resumes there, with any number of processes. watch: makes each call for a batch, told of how
    many images. What the images show to be wrong with the model is a UserError in every process.
    """
    processes = PartialState()
    rank, count = processes.process_index, processes.num_processes
    kept = _kept(part, model.device)
    done = {start for seen in kept for start in seen.parts}
    mine = part.with_name(f"{part.name}-{rank}.safetensors")
    processes.wait_for_everyone()  # all have read what was kept before any writes
    total = reduce(add, kept, Seen()) if rank == 0 else Seen()
    left = [start for start in range(0, num_images, batch_size) if start not in done]
    images, saved, trouble = _count(total), time.monotonic(), ""
    for start in left[rank::count]:
        numbers = indices(model, start, min(start + batch_size, num_images))
        try:
            given = judge.dataset.given(numbers, model.kinds)
            call = partial(model.x0, plan, seed, numbers, given)
            x0 = watch(call, len(numbers))
            total += judge.see(
                x0, start, model.codec, asked_of(judge.dataset, model.kinds, numbers)
            )
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            trouble = f"a batch of {len(numbers)} does not fit the memory: lower --batch-size"
            break
        images += len(numbers)
        if time.monotonic() - saved > SAVE_EVERY:
            if trouble := _trouble(total):
                break
            save_tensors(mine, total.tensors(), {})
            saved = time.monotonic()
        if images < num_images:
            yield images, total
    trouble = trouble or _trouble(total)
    gathered = gather_object([(trouble, total.tensors() if count > 1 and not trouble else {})])
    if troubles := [trouble for trouble, _ in gathered if trouble]:
        raise UserError(troubles[0])
    if count > 1:
        total = reduce(add, (Seen.of(tensors, model.device) for _, tensors in gathered if tensors))
    yield num_images, total


def asked_of(real: Real, kinds: Kinds, numbers: Tensor) -> Asked:
    """What a model of these kinds is asked for in images of these numbers: their class, or that of
    the real image whose caption it is told; and their captions."""
    kind, source = kinds.get("label"), real.source
    label = kind.rows(numbers) if isinstance(kind, Label) else None
    if source is None or not of_images(kinds):
        return Asked(label)
    label = source.labels_given(numbers) if label is None else label
    return Asked(label, source.captions_given(numbers) if "text" in kinds else ())


def forget(part: Path) -> None:
    """Remove what `look` kept, once its result is on disk."""
    for path in _files(part):
        remove(path)


def _trouble(seen: Seen) -> str:
    try:
        if seen.parts:
            seen.refuse()
    except UserError as error:
        return str(error)
    return ""


def _count(seen: Seen) -> int:
    return seen.moments["own"].count if seen.parts else 0


def _files(part: Path) -> list[Path]:
    return sorted(part.parent.glob(f"{part.name}-*.safetensors"))


def _kept(part: Path, device: torch.device) -> list[Seen]:
    """What was seen before, no batch twice.

    The first process's file takes in the others' of an earlier start, which then lie about until
    they are written over: of two that share a batch the larger holds all of the smaller.
    """
    earlier = []
    for path in _files(part):
        try:
            earlier.append(Seen.of(load_tensors(path)[0], device))
        except Damaged as error:
            say(f"{error}: its images are made anew")
    kept: list[Seen] = []
    for seen in sorted(earlier, key=_count, reverse=True):
        if not any(seen.parts.keys() & other.parts.keys() for other in kept):
            kept.append(seen)
    return kept
