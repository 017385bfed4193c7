"""Train an autoencoder, whose latents a teacher may learn: `python -m teachers.autoencoder`.

Rombach et al. 2022, section 3.1, regularised by KL, without their discriminator.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion import data as datasets
from diffusion.autoencoder import FILE, Autoencoder, AutoencoderConfig, load, psnr
from diffusion.batches import Batch
from diffusion.codec import Scale
from diffusion.config import FitConfig, check, settings_of
from diffusion.console import UserError, check_limits, run, say
from diffusion.data import Dataset
from diffusion.dry import check_memory
from diffusion.files import metadata, save_tensors
from diffusion.folders import check_claim
from diffusion.image_file import Form
from diffusion.images import Images, some
from diffusion.machine import this_device
from diffusion.noise import seed32
from diffusion.pictures import save_grid
from diffusion.runs import Product, settled, train
from diffusion.training import Followers, Method, one_network
from teachers import ddpm
from teachers.presets import preset

PIXELS = Scale(127.5, 127.5)  # images from -1 to 1
SHOWN, COLUMNS = 32, 8  # images in samples.png, each above what is made of it
JUDGED = 512  # held-out images, at most, whose reconstruction is measured


@dataclass(frozen=True)
class Loss:
    """How an image made again is compared with the original."""

    distance: Literal["l1", "l2"] = "l1"
    """The mean of absolute (l1) or of squared (l2) differences of pixels, from -1 to 1."""
    kl: float = 1e-6
    """Weight of the latents' KL divergence from normal noise, in nats for each value of a pixel
    (Rombach et al. 2022, app. G, have 1e-6). More makes latents smoother and images worse."""


@dataclass(frozen=True)
class Options:
    """Train an autoencoder (Rombach et al. 2022): it makes of an image a smaller one of a few
    channels, its latents, and of these the image again. teachers.ddpm --codec RUN learns them."""

    data: str = "emoji"
    """The images: a dataset's name, or a folder, whose images are cropped to a square of --size."""
    data_dir: Path | None = None
    """The folder that holds a named dataset's files."""
    background: str = "white"
    """The colour behind what is transparent in a folder's images: a name, or #rrggbb."""
    size: int = 64
    """Height and width of the images, in pixels."""
    out: Path | None = None
    """The run's folder. If left out: runs/DATA/autoencoder."""
    net: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: Loss = field(default_factory=Loss)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            minutes=10, batch_size=32, learning_rate=1e-3, warmup=100, ema=0.998
        )
    )


@dataclass(frozen=True)
class Reconstruction:
    """The distance of images from what is made of their latents, and the latents' KL divergence."""

    loss: Loss
    precision: str
    followers: Followers = field(default_factory=dict)

    def __call__(self, student: nn.Module, batch: Batch, progress: float) -> Tensor:
        with torch.autocast(batch.x0.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            again, posterior = student(batch.x0, batch.dropout())
        error = (again.float() - batch.x0).flatten(1)
        distance = error.abs() if self.loss.distance == "l1" else error.square()
        return distance.mean(1) + self.loss.kl * posterior.kl().float() / error.shape[1]


def train_autoencoder(options: Options) -> tuple[Autoencoder, float]:
    """The run's autoencoder, and its mean PSNR in decibels on held-out images (training images
    where none is held out); trained, unless the run is finished."""
    check(options.fit)
    options.net.check()
    check_limits(options.loss, {"kl": ("from 0 to 1e3", lambda weight: 0 <= weight <= 1e3)})
    out = options.out or ddpm.run_folder(options.data) / "autoencoder"
    check_claim(out)
    config = settled(options.fit, out)
    dataset = load_data(options)
    check_memory(lambda: Autoencoder(options.net))
    torch.manual_seed(seed32(config.seed))
    network = Autoencoder(options.net)
    method = one_network(network, Reconstruction(options.loss, config.precision))
    network = train(out, method, dataset, config, AnAutoencoder(options, dataset))
    quality = float(psnr(*reconstructed(network, dataset, JUDGED)).mean())
    where = "held-out" if len(dataset.test) else "training"
    say(f"{out}  {quality:.2f} dB PSNR on {where} images")
    return network, quality


def load_data(options: Options) -> Dataset:
    """The images, from -1 to 1, after a check that their shape suits the network."""
    form = Form(options.size, options.net.channels, options.background)
    dataset = datasets.load(options.data, options.data_dir, form)
    shape, factor = dataset.spec.shape, options.net.factor
    if shape != (options.net.channels, options.size, options.size):
        raise UserError(
            f"{options.data} images have {shape[0]} channels and size {shape[1]}, but --channels "
            f"is {options.net.channels} and --size is {options.size}: give those"
        )
    if options.size % factor:
        raise UserError(f"--size must be divisible by --factor {factor}, got {options.size}")
    return replace(dataset, codec=PIXELS)


def reconstructed(network: Autoencoder, dataset: Dataset, most: int) -> tuple[Tensor, Tensor]:
    """Held-out images (N, C, H, W) uint8, at most so many, and what is made of their latents."""
    source: Images = dataset.test if len(dataset.test) else dataset.train
    count, device = min(most, len(source)), next(network.parameters()).device
    images = some(source, count - count % COLUMNS or count).images
    with torch.no_grad():
        parts = [
            PIXELS.decode(network.decode(network.encode(PIXELS.encode(part.to(device)))))
            for part in images.split(64)
        ]
    return images, torch.cat(parts).cpu()


@dataclass(frozen=True)
class AnAutoencoder(Product[Autoencoder]):
    """What a training of an autoencoder shows and leaves."""

    options: Options
    dataset: Dataset
    file = FILE

    def settings(self, config: FitConfig) -> dict:
        settings = {
            **settings_of(config),
            **asdict(self.options.loss),
            "net": asdict(self.options.net),
            "size": self.options.size,
            "data": self.dataset.spec.name,
            "data_sha256": self.dataset.spec.sha256,
        }
        return json.loads(json.dumps(settings))

    def show(self, run: Path, student: nn.Module) -> None:
        """samples.png: images, and under each row of them what is made of their latents."""
        assert isinstance(student, Autoencoder)
        images, again = reconstructed(student, self.dataset, SHOWN)
        rows = zip(images.split(COLUMNS), again.split(COLUMNS), strict=True)
        picture = torch.cat([each for pair in rows for each in pair])
        save_grid(run / "samples.png", picture, columns=min(COLUMNS, len(images)))

    def leave(self, run: Path, method: Method, training: dict) -> None:
        student = method.players["student"].module
        assert isinstance(student, Autoencoder)
        described = {"config": asdict(student.config), "training": training}
        self.show(run, student)
        save_tensors(run / FILE, student.state_dict(), {"autoencoder": json.dumps(described)})

    def load(self, run: Path, precision: str) -> tuple[Autoencoder, dict]:
        load.cache_clear()  # it may be of a run of another time
        network = load(str(run)).to(this_device())
        assert isinstance(network, Autoencoder)
        described = json.loads(metadata(run / FILE)["autoencoder"])
        return network, described["training"].get("settings", {})


def main() -> None:
    data = ddpm.peek("--data", Options.data)
    net = preset(data).net
    size = Options.size if data == Options.data else net.size
    default = Options(data=data, size=size, net=AutoencoderConfig(channels=net.channels))
    train_autoencoder(ddpm.parse(default, "python -m teachers.autoencoder"))


if __name__ == "__main__":
    run(main)
