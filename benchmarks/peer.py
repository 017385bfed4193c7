"""Ours beside diffusers and accelerate, as one uses them: `python -m benchmarks.peer`.

Both have the same shape of U-Net, batch and precision. Training: `fit` beside the loop that
diffusers' unconditional example makes (pictures one by one through a DataLoader, noise at one of
1000 timesteps, the squared error of eps, AdamW, a cosine schedule, an average, the loss read each
step). Sampling: its DDPMPipeline and DDIMPipeline beside ours, of as many steps, up to images on
the CPU. Weights and data order differ; no time depends on them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.speed import lap
from benchmarks.subjects import endless, made_up, untrained
from benchmarks.turns import Comparison, TimingOptions, compare
from diffusion.config import FitConfig
from diffusion.console import at_least, err, run, say
from diffusion.denoiser import DenoiserConfig
from diffusion.images import some
from diffusion.machine import this_device
from diffusion.model import Model, build
from diffusion.networks import UNetConfig
from diffusion.schedules import cosine
from diffusion.training import fit, one_network
from eval.measure import stream
from teachers.ddpm import Denoising
from teachers.presets import preset

try:
    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
except ModuleNotFoundError as missing:
    err.print(f"error: {missing.name} is not installed: pip install -e '.[bench]'", markup=False)
    sys.exit(2)

# A pipeline and its scheduler, by our sampler's name.
PIPELINES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "ancestral": (diffusers.DDPMPipeline, diffusers.DDPMScheduler),
    "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
}


@dataclass(frozen=True)
class Options(TimingOptions):
    """Train and sample a U-Net with fewstep and with diffusers, and compare images/s."""

    data: Literal["digits", "fashion-mnist", "cifar10"] = "fashion-mnist"
    """The data whose preset the network has, but for the options below. The images are made up."""
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


def peer_network(net: UNetConfig) -> nn.Module:
    """The peer's nearest to our U-Net.

    It has one attention in the middle, where ours has two, half as many features of the noise
    level, and as many groups to norm at every level.
    """
    sizes = [net.size >> level for level in range(len(net.multipliers))]
    widths = [net.width * multiplier for multiplier in net.multipliers]
    attended = [size in net.attention for size in sizes]
    groups = min(32, net.width // 8)
    return UNet2DModel(
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

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.fromarray(self.arrays[index]))


def peer_training(
    unet: nn.Module, pictures: Pictures, config: FitConfig, workers: int = 0
) -> Iterator[float]:
    """The peer's loop: each step's loss."""
    mixed, cpu = "no" if config.precision == "fp32" else "bf16", not torch.cuda.is_available()
    AcceleratorState._reset_state()
    worker = Accelerator(mixed_precision=mixed, cpu=cpu)
    loader = DataLoader(
        pictures, config.batch_size, shuffle=True, num_workers=workers, drop_last=True
    )
    _, scheduler = PIPELINES["ancestral"]
    noising = scheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(
        unet.parameters(), config.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6
    )
    rate = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=config.warmup,
        num_training_steps=config.iterations,
    )
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


def training(net: UNetConfig, config: FitConfig, workers: int = 0) -> Iterator[Comparison]:
    """One comparison, log_every steps a call."""
    dataset = made_up(net.channels, net.size, max(11_000, 2 * config.batch_size))
    unet, denoiser = peer_network(net), build(net, DenoiserConfig(), {}, config.precision)
    images = some(dataset.train, len(dataset.train)).images
    theirs = peer_training(unet, Pictures(images, config.flip), config, workers)
    steps = config.log_every
    method = one_network(denoiser, Denoising(cosine().to(this_device())))
    with TemporaryDirectory() as folder:
        with closing(fit(method, dataset, config, Path(folder, "state"))) as ours:
            calls = {  # the peer begins: the state that it is prepared with is not `fit`'s
                "diffusers": lambda: [*islice(theirs, steps)],
                "ours": partial(lap, ours, steps),
            }
            yield Comparison("training", calls, steps * config.batch_size)


def sampling(
    model: Model, unet: nn.Module, sampler: str, num_steps: int, batch_size: int
) -> Comparison:
    """A batch of uint8 images, ours, beside numpy ones, theirs, on the CPU."""
    plan, numbers = model.plan(num_steps, sampler), stream.indices(model, 0, batch_size)
    kind, noising = PIPELINES[sampler]
    pipeline = kind(unet=unet, scheduler=noising(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)
    bf16 = model.denoiser.precision == "bf16"

    def theirs() -> np.ndarray:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            settings = {"num_inference_steps": num_steps, "output_type": "np"}
            return pipeline(batch_size=batch_size, **settings).images

    calls = {"diffusers": theirs, "ours": lambda: model.sample(plan, 0, numbers).cpu()}
    return Comparison(f"{sampler}, steps: {num_steps}", calls, batch_size)


def comparisons(options: Options) -> Iterator[Comparison]:
    at_least(0, options, "workers")
    chosen = preset(options.data)
    width, blocks = options.width or chosen.net.width, options.blocks or chosen.net.blocks
    net = replace(chosen.net, width=width, blocks=blocks)
    model = untrained(net, made_up(net.channels, net.size, 11), options.precision)
    unet = peer_network(net).to(model.device).eval()
    for name, network in {"ours": model.denoiser, "diffusers": unet}.items():
        say(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")
    config = replace(
        endless(chosen.teacher),
        precision=options.precision,
        batch_size=options.batch_size,
        log_every=options.training_steps,
    )
    yield from training(net, config, options.workers)
    runs = [("ancestral", n) for n in options.ancestral_steps]
    for sampler, num_steps in runs + [("ddim", n) for n in options.ddim_steps]:
        yield sampling(model, unet, sampler, num_steps, options.batch_size)


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.peer")
    compare(options, comparisons(options), options.precision)


if __name__ == "__main__":
    run(main)
