"""Feature extractors: a callable from uint8 images to vectors, with a name and a sha256.

`fid` is clean-fid's Inception alone. Every other extractor names its dataset and weights.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.checkpoint import load_tensors, save_tensors, weights_sha256
from diffusion.console import UserError, say
from diffusion.data import CACHE, Dataset

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = "nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"


@dataclass(frozen=True)
class Extractor:
    """A metric's name, e.g. fd-cnn-digits-1a2b3c4d, and what it is computed from."""

    name: str
    sha256: str
    dim: int
    extract: Callable[[Tensor], Tensor]
    """uint8 (B, C, H, W) on its device -> float32 (B, dim)."""
    accuracy: float | None = None
    """Of the classifier, on held-out images."""
    probabilities: Callable[[Tensor], Tensor] | None = None
    """A classifier's: uint8 (B, C, H, W) -> (B, classes)."""


class Classifier(nn.Module):
    """A small convolutional classifier whose last hidden layer (64 numbers) is the feature."""

    def __init__(self, channels: int, classes: int, dim: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, dim)
        self.out = nn.Linear(dim, classes)

    def features(self, images: Tensor) -> Tensor:
        h = F.relu(self.conv1(images.float() / 127.5 - 1))
        h = F.relu(self.conv2(h))
        h = F.relu(self.conv3(F.adaptive_avg_pool2d(h, max(4, images.shape[-1] // 2))))
        return self.hidden(F.adaptive_avg_pool2d(h, 4).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(F.dropout(F.relu(self.features(images)), 0.3, self.training))


def classifier(dataset: Dataset, device: torch.device, cache: Path = CACHE) -> Extractor:
    """The dataset's own classifier: trained once with a fixed seed, then read from the cache."""
    name = dataset.spec.name
    if dataset.train_labels is None:
        raise UserError(f"{name} has no classes to train a classifier on: use --features random")
    path = cache / "features" / f"cnn-{name}.safetensors"
    model = Classifier(dataset.spec.channels, dataset.spec.num_classes)
    if path.exists():
        weights, metadata = load_tensors(path)
        model.load_state_dict(weights)
        accuracy = json.loads(metadata["accuracy"])
    else:
        accuracy = _train(model, dataset, device)
        save_tensors(path, model.state_dict(), {"accuracy": json.dumps(accuracy)})
    sha256 = weights_sha256(model.state_dict())
    say(f"features: classifier of {name}, accuracy {accuracy:.2%} on held-out images, {sha256[:8]}")
    model = model.to(device).eval().requires_grad_(False)
    return Extractor(
        name=f"fd-cnn-{name}-{sha256[:8]}",
        sha256=sha256,
        dim=model.hidden.out_features,
        extract=model.features,
        accuracy=accuracy,
        probabilities=lambda images: model(images).softmax(1),
    )


def _train(model: Classifier, dataset: Dataset, device: torch.device) -> float:
    """Accuracy on the test images after about 1500 steps of AdamW; the same weights every time."""
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.to(device).train()
    images, labels = dataset.train.to(device), dataset.train_labels.to(device)
    steps, batch_size = 1500, 128
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        which = torch.randint(len(images), (batch_size,), generator=random).to(device)
        loss = F.cross_entropy(model(images[which]), labels[which], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        predicted = [model(part.to(device)).argmax(1).cpu() for part in dataset.test.split(1000)]
    return float((torch.cat(predicted) == dataset.test_labels).double().mean())


class RandomNetwork(nn.Module):
    """Three convolutions that were never trained, pooled to means: 64 numbers."""

    def __init__(self, channels: int):
        super().__init__()
        widths = [channels, 32, 64, 64]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        random = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            nn.init.normal_(
                parameter, std=(2 / fan) ** 0.5 * (parameter.ndim > 1), generator=random
            )

    def forward(self, images: Tensor) -> Tensor:
        h = images.float() / 127.5 - 1
        for i, conv in enumerate(self.convs):
            h = F.relu(conv(h))
            h = F.avg_pool2d(h, 2) if i < 2 else h
        return h.mean((2, 3))


def random_network(dataset: Dataset, device: torch.device, cache: Path = CACHE) -> Extractor:
    """Features of an untrained network: a cross-check that no training can favour."""
    model = RandomNetwork(dataset.spec.channels).to(device).eval().requires_grad_(False)
    sha256 = weights_sha256(model.state_dict())
    name = Path(dataset.spec.name).name
    return Extractor(f"fd-random-{name}-{sha256[:8]}", sha256, 64, model)


def inception(dataset: Dataset, device: torch.device, cache: Path = CACHE) -> Extractor:
    """clean-fid's Inception in mode clean, from its weights' file; never anything in its place."""
    import numpy as np
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    path = cache / INCEPTION_FILE
    if not path.exists():
        raise UserError(
            f"fid needs clean-fid's Inception weights at {path}: get {INCEPTION_FILE} from "
            f"{INCEPTION_URL}, or choose --features classifier or random"
        )
    import hashlib

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    model = InceptionV3W(str(cache), download=False, resize_inside=False).to(device).eval()
    resize = build_resizer("clean")

    def extract(images: Tensor) -> Tensor:
        pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        resized = np.stack([resize(image) for image in pixels])
        return model(torch.from_numpy(resized).permute(0, 3, 1, 2).to(device))

    return Extractor("fid", sha256, 2048, extract)


EXTRACTORS = {"classifier": classifier, "random": random_network, "inception": inception}
