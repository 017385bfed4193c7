"""A teacher that is not ours: `python -m experiments.diffusers_digits --minutes 3`.

A small UNet2DModel, trained on digits by the loop of diffusers' own example of unconditional
training, with its scheduler, its optimizer, its average of weights, and saved by its pipeline. No
part of fewstep but the images has a hand in it: it is what `--teacher diffusers:PATH` is tried on.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from diffusion import data
from diffusion.console import UserError, at_least, run, say
from diffusion.networks.diffusers import library

LINE_EVERY = 15.0  # seconds of processor time


@dataclass(frozen=True)
class Options:
    """Train a small network on digits by diffusers alone."""

    minutes: float = 3.0
    """Minutes of processor time to train for, however busy the machine is."""
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts, by diffusers' name."""
    width: int = 24
    """Channels at the finest of its two levels."""
    batch_size: int = 64
    """Images of a training step."""
    learning_rate: float = 2e-3
    """AdamW's step size, after 50 steps of warm-up; it falls to 0 by a cosine."""
    seed: int = 0
    """Seed of weights and noise."""
    out: Path = Path("runs/diffusers-digits/pipeline")
    """The pipeline's folder."""


def train(options: Options) -> Path:
    """The pipeline's folder, as its save_pretrained writes it."""
    diffusers = library()
    if options.out.exists():
        raise UserError(f"{options.out} is there already: delete it, or give another --out")
    torch.manual_seed(options.seed)
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(options.width, 2 * options.width),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=1000, prediction_type=options.prediction
    )
    digits = data.load("digits").train
    images = digits.take(torch.arange(len(digits))).images.float() / 127.5 - 1

    def loss() -> Tensor:
        clean = images[torch.randint(len(images), (options.batch_size,))]
        return step_loss(network, scheduler, clean)

    fit("U-Net", network, loss, options.minutes, options.learning_rate, 1e-6)
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(options.out)
    say(str(options.out))
    return options.out


def fit(
    name: str,
    network: nn.Module,
    loss: Callable[[], Tensor],
    minutes: float,
    rate: float,
    decay: float,
) -> None:
    """Train for so many minutes of processor time, and leave the average of the weights.

    rate, decay: AdamW's learning rate, after 50 steps of warm-up, and its weight decay.
    """
    from diffusers.training_utils import EMAModel

    average = EMAModel(network.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
    begun = said = time.process_time()
    step, done = 0, 0.0
    while done < 1:
        rising, falling = min(1.0, (step + 1) / 50), (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * rising * falling
        error = loss()
        error.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        now = time.process_time()
        step, done = step + 1, (now - begun) / (60 * minutes)
        if now - said > LINE_EVERY or done >= 1:
            say(f"{name}, step {step:,}: loss {error.item():.4f}, {100 * min(done, 1):.0f} %")
            said = now
    average.copy_to(network.parameters())


def step_loss(network: nn.Module, scheduler: Any, clean: Tensor) -> Tensor:
    """The mean squared error of what the network predicts, at random timesteps."""
    noise = torch.randn_like(clean)
    k = torch.randint(scheduler.config.num_train_timesteps, (len(clean),))
    noisy = scheduler.add_noise(clean, noise, k)
    targets = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(clean, noise, k),
        "sample": lambda: clean,
    }
    predicted = network(noisy, k).sample
    return F.mse_loss(predicted, targets[scheduler.config.prediction_type]())


def main() -> None:
    options = tyro.cli(Options, prog="python -m experiments.diffusers_digits")
    at_least(1, options, "batch_size", "width")
    train(options)


if __name__ == "__main__":
    run(main)
