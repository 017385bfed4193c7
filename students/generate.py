"""Make images with any checkpoint: `python -m students.generate CHECKPOINT --num 64`."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import tyro
from accelerate import PartialState
from torch import Tensor

from diffusion import machine
from diffusion.condition import Small
from diffusion.console import UserError, at_least, doing, run, say, silence, track
from diffusion.files import write_atomic
from diffusion.folders import check_file
from diffusion.model import Model, load
from diffusion.noise import check_seed
from diffusion.pictures import save_grid
from diffusion.plan import MOST_STEPS, Plan
from students import cascade, filters, watermark
from students.adaptive import Adaptive
from students.api import Checkpoint, ImageModel
from students.filters import Filter
from students.options import Options, one_file, plan_of, prompts_of
from students.prompts import Prompts
from students.provenance import Texts, provenance
from students.shards import Batch, Job, files_before, npz, shared, write_shards

COPIES = 32  # bytes that a batch takes at least for each number: noise in float64, x_t, x0


def generate(model: Model, options: Options) -> Iterator[Tensor]:
    """Batches of images, (B, C, H, W) uint8, in order of their numbers.

    Raises UserError for images that are not finite, which as uint8 would be black.
    """
    yield from (batch.images for batch in generator(model, options)(range(options.num)))


def generator(model: Model, options: Options) -> "Generator":
    """What makes the images that the options ask for."""
    plan, name = plan_of(model, options), str(options.checkpoint)
    given = options.tolerance
    maker = Checkpoint(model, name) if given is None else Adaptive(model, name, given)
    screen = filters.load(options.filter, options.filter_threshold) if options.filter else None
    return Generator(maker, plan, options, prompts_of(model, plan, options), screen)


@dataclass(frozen=True)
class Generator:
    """The batches of the images of some numbers, as the options ask for them."""

    maker: ImageModel
    plan: Plan
    options: Options
    prompts: Prompts | None = None
    screen: Filter | None = None
    tally: Counter = field(init=False, default_factory=Counter)
    """Images, calls and blocked images so far."""

    @property
    def texts(self) -> Texts:
        if not self.options.metadata:
            return {}
        return provenance(self.maker.sha256, self.maker.method, self.plan, self.options.seed)

    def __call__(self, numbers: range) -> Iterator[Batch]:
        maker, options, size = self.maker, self.options, self.options.batch_size
        given = maker.labels(options.label, len(numbers))
        if "label" in maker.kinds and not given:
            given = {"label": maker.kinds["label"].rows(torch.tensor(numbers, device=maker.device))}
        batches = maker.batches(self.plan, options.seed, numbers, given, size, self.prompts)
        for start, images in zip(range(0, len(numbers), size), batches, strict=True):
            part = slice(start, start + size)
            facts = {name: rows[part].cpu().numpy() for name, rows in given.items()}
            if self.prompts:
                facts["text"] = np.array([self.prompts.text(number) for number in numbers[part]])
            if isinstance(maker, Adaptive):
                facts["calls"] = maker.calls.numpy()
            if self.screen:
                images, facts["blocked"] = self.screen(images)
            if options.watermark:
                images = watermark.marked(images)
            self.tally["images"] += len(images)
            for name in ("calls", "blocked"):
                self.tally[name] += int(np.sum(facts.get(name, 0)))
            yield Batch(numbers[start], images, facts, self.texts)

    def tracked(self, parts: Sequence[range]) -> Iterator[Batch]:
        """All batches of these parts, shown as they come."""
        before, total = self.tally["images"], sum(map(len, parts))

        def describe(_: Batch) -> tuple[int, int, str]:
            return self.tally["images"] - before, total, "images"

        yield from track((batch for part in parts for batch in self(part)), "generate", describe)


def write(maker: Generator) -> None:
    """The images, where the options say; of several processes each makes its share."""
    options, plan = maker.options, maker.plan
    if not one_file(options):
        prompts = maker.prompts
        about = {
            "prompts": [prompts.texts, options.negative_prompt] if prompts else None,
            "model": maker.maker.sha256,
            "plan": asdict(plan),
            "options": [options.seed, options.label, options.precision, options.metadata],
            "further": [options.tolerance, options.filter, options.filter_threshold],
            "watermark": options.watermark,
        }
        job = Job(options.num, options.shard, options.format, about)
        write_shards(options.out, job, maker.tracked)
        return
    made = shared(Job(options.num, options.batch_size, "", {}), maker.tracked)
    if not PartialState().is_main_process:
        return
    if options.out.suffix == ".npz":
        write_atomic(options.out, npz(made))
    else:
        images = torch.cat([batch.images for batch in made])
        save_grid(options.out, images, maker.texts)


def makers(model: Model, options: Options) -> list[Generator]:
    """What makes the images of each size that the options ask for, the smallest first.

    UserError for a model that refines, and is given nothing to refine.
    """
    only = generator(model, options)
    first = only.maker
    if isinstance(small := first.kinds.get("small"), Small):
        raise UserError(
            f"{options.checkpoint} refines images of {small.size}x{small.size}: name what makes "
            f"those first, and then --then {options.checkpoint}"
        )
    counts = options.then_steps or (None,) * len(options.then)
    if len(counts) != len(options.then):
        raise UserError(
            f"--then-steps takes a number for each of {len(options.then)} --then models, got "
            f"{len(counts)}"
        )
    precision, place = machine.precision(options.precision), options.autoencoder
    then = [
        Checkpoint(load(path, precision, autoencoder=place), str(path)) for path in options.then
    ]
    chain = cascade.stages(first, only.plan, then, counts)
    sizes = [maker.spec.size for maker, _ in chain]
    outs = [*(cascade.place(options.out, size) for size in sizes[:-1]), options.out]
    return [
        replace(only, maker=maker, plan=plan, options=replace(options, out=out))
        for (maker, plan), out in zip(chain, outs, strict=True)
    ]


def main() -> None:
    options = tyro.cli(Options, prog="python -m students.generate")
    at_least(1, options, "num", "batch_size", "shard")
    at_least(1, options, "steps", most=MOST_STEPS)
    at_least(0, options, "tolerance", most=255)
    check_seed(options.seed)
    suffix = one_file(options)
    check_out = check_file if suffix else files_before
    check_out(options.out)
    machine.this_device()
    if not PartialState().is_main_process:
        silence()
    precision, place = machine.precision(options.precision), options.autoencoder
    model = load(options.checkpoint, precision, autoencoder=place, trust=options.trust)
    pixels = math.prod(model.spec.shape)
    # a shard of pictures goes to the disk batch by batch
    held = options.num if suffix else min(options.shard, options.num)
    machine.require_memory("--num" if suffix else "--shard", held, held * 3 * pixels)
    batch = min(options.batch_size, options.num)
    machine.require_memory("--batch-size", batch, batch * COPIES * math.prod(model.shape))
    chain = makers(model, options)
    if options.watermark:
        channels, size, _ = chain[0].maker.spec.shape
        watermark.check(size, channels)
    for maker in chain:
        check_out(maker.options.out)
    for maker in chain:
        with doing(f"making {options.num} images", f"{maker.options.out} is not whole yet"):
            write(maker)
        steps = f"{maker.plan.num_steps} steps"
        if maker is chain[0] and model.calls_per_step(maker.plan) == 2:
            steps += " of 2 network calls"
        if isinstance(maker.maker, Adaptive):
            steps += f" at most, {maker.tally['calls'] / max(1, maker.tally['images']):.2f} calls"
        if maker.screen:
            steps += f", {maker.tally['blocked']} blocked"
        say(f"{options.num} images by {maker.plan.sampler} in {steps}: {maker.options.out}")


if __name__ == "__main__":
    run(main)
