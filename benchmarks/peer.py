"""Ours against diffusers and accelerate, as one uses them: `python -m benchmarks.peer`.

The same shape of U-Net, batch and precision. Training: `fit` against the loop that diffusers'
unconditional example makes (pictures one by one through a DataLoader, noise at one of 1000
timesteps, the squared error of eps, AdamW, a cosine schedule, an average, the loss read each step).
Sampling: its DDPMPipeline and DDIMPipeline against ours, of as many steps, up to images on the CPU.
All in turn, in an order that is reversed every other round. Weights and data order differ; no
time depends on them.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.parts import begin, endless, untrained
from benchmarks.rounds import rounds
from benchmarks.theirs import EMAModel, diffusers, get_scheduler
from diffusion import data as datasets
from diffusion.checkpoint import write_atomic
from diffusion.config import FitConfig
from diffusion.console import UserError, out, run, say
from diffusion.data import Dataset
from diffusion.model import Model, build
from diffusion.networks import UNetConfig
from diffusion.schedules import cosine
from diffusion.training import fit
from eval.measure import machine, stream
from teachers.ddpm import Denoising
from teachers.presets import preset

PIPELINES = {  # by our sampler's name
    "ancestral": (diffusers.DDPMPipeline, diffusers.DDPMScheduler),
    "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
}


@dataclass(frozen=True)
class Options:
    """Train and sample a U-Net with fewstep and with diffusers, and compare images/s."""

    data: Literal["digits", "fashion-mnist", "cifar10"] = "fashion-mnist"
    """The images. The network has the shape of their preset, but for the options below."""
    width: int | None = None
    """Channels of the network at its finest level."""
    blocks: int | None = None
    """Residual blocks of the network per level."""
    batch_size: int = 256
    """Images of a training step and of a sampler's call."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of the networks' passes."""
    workers: int = 0
    """Worker processes of diffusers' DataLoader; its example has 0. Batches that they make while
    fewstep is timed cost diffusers nothing."""
    training_steps: int = 25
    """Training steps of each repeat."""
    ancestral_steps: tuple[int, ...] = (1000,)
    """Steps of our ancestral sampler and of its DDPMPipeline."""
    ddim_steps: tuple[int, ...] = (50, 4)
    """Steps of our ddim and of its DDIMPipeline."""
    repeats: int = 5
    """How often each side is timed."""
    out: Path | None = None
    """A .json file to write all figures to."""


def peer_network(net: UNetConfig) -> diffusers.UNet2DModel:
    """Its nearest to our U-Net: it has one attention in the middle, where ours has two, half as many
    features of the noise level, and as many groups to norm at every level."""
    sizes = [net.size >> level for level in range(len(net.multipliers))]
    widths = [net.width * multiplier for multiplier in net.multipliers]
    attended = [size in net.attention for size in sizes]
    groups = min(32, net.width // 8)
    return diffusers.UNet2DModel(
        sample_size=net.size,
        in_channels=net.channels,
        out_channels=net.channels,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        block_out_channels=widths,
        layers_per_block=net.blocks,
        dropout=net.dropout,
        attention_head_dim=min(64, *widths),
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift",
        add_attention=attended[-1],
    )


class Pictures(torch.utils.data.Dataset):
    """Images as such a loop gets them: a PIL picture, made a tensor from -1 to 1 when asked for."""

    def __init__(self, images: Tensor, flip: bool):
        self.arrays = images.permute(0, 2, 3, 1).squeeze(-1).numpy()
        steps = [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
        self.transform = transforms.Compose([transforms.RandomHorizontalFlip()] * flip + steps)

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(Image.fromarray(self.arrays[i]))


def peer_training(
    unet: nn.Module, pictures: Pictures, config: FitConfig, workers: int
) -> Iterator[float]:
    """The peer's loop: each step's loss."""
    mixed, cpu = "no" if config.precision == "fp32" else "bf16", not torch.cuda.is_available()
    AcceleratorState._reset_state()
    worker = Accelerator(mixed_precision=mixed, cpu=cpu)
    loader = DataLoader(
        pictures, config.batch_size, shuffle=True, num_workers=workers, drop_last=True
    )
    noising = diffusers.DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(
        unet.parameters(), config.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6
    )
    counts = {"num_warmup_steps": config.warmup, "num_training_steps": config.iterations}
    rate = get_scheduler("cosine", optimizer, **counts)
    unet, optimizer, loader, rate = worker.prepare(unet, optimizer, loader, rate)
    # a process has one such state, and `fit` asks for its own; the network keeps its autocast
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="no", cpu=cpu)
    average = EMAModel(unet.parameters(), decay=config.ema, use_ema_warmup=True, power=0.75)
    average.to(worker.device)
    unet.train()
    for x0 in chain.from_iterable(repeat(loader)):
        eps = torch.randn_like(x0)
        timestep = torch.randint(1000, (len(x0),), device=x0.device)
        predicted = unet(noising.add_noise(x0, eps, timestep), timestep).sample
        loss = F.mse_loss(predicted.float(), eps)
        worker.backward(loss)
        worker.clip_grad_norm_(unet.parameters(), config.clip)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        yield loss.item()


def time_training(
    model: Model, unet: nn.Module, images: Dataset, config: FitConfig, options: Options
) -> dict[str, list[float]]:
    """Seconds of each repeat, ours and theirs."""
    denoiser = build(model.card.net, config.precision)
    objective = Denoising(cosine().to(model.device))
    pictures = Pictures(images.train, config.flip)
    theirs = peer_training(unet, pictures, config, options.workers)
    with TemporaryDirectory() as folder:
        with closing(fit(denoiser, objective, images, config, Path(folder, "state"))) as ours:
            calls = {  # the peer begins: the state that it is prepared with is not `fit`'s
                "diffusers": lambda: [*islice(theirs, options.training_steps)],
                "ours": partial(next, ours),
            }
            return rounds(calls, options.repeats, model.device)


def time_sampling(
    model: Model, unet: nn.Module, ours: str, steps: int, options: Options
) -> dict[str, list[float]]:
    """Seconds of each repeat, ours and theirs, of a batch of uint8 or numpy images on the CPU."""
    device, size = model.device, options.batch_size
    plan, numbers = model.plan(steps, ours), stream.indices(model, 0, size)
    kind, noising = PIPELINES[ours]
    pipeline = kind(unet=unet, scheduler=noising(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def theirs():
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            return pipeline(batch_size=size, num_inference_steps=steps, output_type="np").images

    calls = {"ours": lambda: model.sample(plan, 0, *numbers).cpu(), "diffusers": theirs}
    return rounds(calls, options.repeats, device)


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.peer")
    begin(options, "batch_size", "training_steps", "repeats")
    chosen = preset(options.data)
    width, blocks = options.width or chosen.net.width, options.blocks or chosen.net.blocks
    net = replace(chosen.net, width=width, blocks=blocks)
    images = replace(datasets.load(options.data), train_labels=None)
    model = untrained(net, images, options.precision)
    unet = peer_network(net).to(model.device)
    config = replace(
        endless(chosen.teacher),
        precision=options.precision,
        batch_size=options.batch_size,
        log_every=options.training_steps,
    )
    if options.batch_size > len(images.train):
        raise UserError(f"--batch-size must be at most {len(images.train)}, all images there are")
    networks = {"ours": model.denoiser, "diffusers": unet}
    parameters = {who: sum(p.numel() for p in n.parameters()) for who, n in networks.items()}
    environment = machine.environment(model.device, options.precision, False)
    say(f"{environment['device']}, {options.precision}, batches of {options.batch_size}")

    shown = Table("", "ours", "diffusers", "ours / theirs")
    shown.add_row("parameters", *(f"{n:,}" for n in parameters.values()))
    figures = {}

    def row(name: str, images: int, seconds: dict[str, list[float]]) -> None:
        rates = {who: images / median(seconds[who]) for who in ("ours", "diffusers")}
        pairs = zip(seconds["diffusers"], seconds["ours"], strict=True)
        ratio = median(theirs / ours for theirs, ours in pairs)
        shown.add_row(name, *(f"{rate:,.1f} images/s" for rate in rates.values()), f"{ratio:.2f}")
        figures[name] = {"images_per_second": rates, "ratio": ratio, "seconds": seconds}
        say(f"{name}: {ratio:.2f}")

    seconds = time_training(model, unet, images, config, options)
    row("training", options.batch_size * options.training_steps, seconds)
    unet = peer_network(net).to(model.device).eval()  # without the loop's autocast
    runs = [("ancestral", steps) for steps in options.ancestral_steps]
    for sampler, steps in runs + [("ddim", steps) for steps in options.ddim_steps]:
        seconds = time_sampling(model, unet, sampler, steps, options)
        row(f"{sampler}, {steps} steps", options.batch_size, seconds)
    out.print(shown)
    if options.out:
        found = {"environment": environment, "conditions": machine.conditions(model.device)}
        found |= {"diffusers": diffusers.__version__, "parameters": parameters, "figures": figures}
        write_atomic(options.out, json.dumps(found, indent=1))
        say(str(options.out))


if __name__ == "__main__":
    run(main)
