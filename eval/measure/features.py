"""Feature extractors: a callable from uint8 images to vectors, with a name and a sha256.

`fid` is clean-fid's Inception alone. Every other extractor names its dataset and weights.
"""

import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.checkpoint import weights_sha256
from diffusion.console import UserError, say, track
from diffusion.machine import CACHE
from diffusion.owner import cached
from eval.measure import custom, efficientnet, pretrained
from eval.measure import inception as clean_fid
from eval.measure.machine import full_float32
from eval.measure.real import Real

OWN_CLASSIFIER = ("digits", "fashion-mnist")  # where it is the usual extractor
STEPS = 1500  # of the classifier's training


@dataclass(frozen=True)
class Extractor:
    """A metric's name, e.g. fd-cnn-digits-1a2b3c4d, and what it is computed from."""

    name: str
    sha256: str
    dim: int
    extract: Callable[[Tensor], Tensor]
    """uint8 (B, C, H, W) on its device -> float32 (B, dim)."""
    accuracy: float | None = None
    """The classifier's accuracy on held-out images."""
    probabilities: Callable[[Tensor], Tensor] | None = None
    """A classifier's: features (B, dim) -> (B, classes)."""


def extractor(
    choice: str,
    dataset: Real,
    device: torch.device,
    inception: Path | None = None,
    cache: Path = CACHE,
    trust: bool = False,
) -> Extractor:
    """classifier, random, inception, efficientnet-lite0, dinov2:folder, clip:folder, or a network
    of one's own: its file, or module:place:name.

    inception: the file of clean-fid's weights, or its folder; None to find or download it. trust:
    whether a file of one's own may run code.
    """
    if custom.is_named(choice) and inception is None:
        chosen = users_network(choice, dataset, device, trust)
    else:
        chosen = _extractor(choice, dataset, device, inception, cache)
    # all of them here, so that none forgets it: a figure must not depend on the kind of device
    return replace(chosen, extract=full_float32()(chosen.extract))


def _extractor(
    choice: str, dataset: Real, device: torch.device, inception: Path | None, cache: Path
) -> Extractor:
    if choice == "inception":
        file = clean_fid.weights(inception, cache)
        network = clean_fid.network(file, device)
        return Extractor("fid", clean_fid.SHA256, clean_fid.DIM, network)
    if inception is not None:
        raise UserError(f"--inception goes with --features inception, not with {choice}")
    if choice == "classifier":
        return classifier(dataset, device, cache)
    if choice == "random":
        return random_network(dataset, device)
    if choice == "efficientnet-lite0":
        network, sha256 = efficientnet.network(dataset.spec.size, device)
        return Extractor(f"fd-{choice}-{sha256[:8]}", sha256, efficientnet.DIM, network)
    if pretrained.is_named(choice):
        network, dim, sha256 = pretrained.network(choice, device)
        return Extractor(f"fd-{choice.partition(':')[0]}-{sha256[:8]}", sha256, dim, network)
    raise UserError(
        "--features takes classifier, random, inception, efficientnet-lite0, dinov2:FOLDER, "
        "clip:FOLDER, the path of an .onnx, .pt (TorchScript) or .pt2 (torch.export) file, or "
        f"module:PACKAGE.MODULE:FUNCTION, got {choice!r}"
    )


def usual(name: str, inception: Path | None, cache: Path = CACHE) -> str:
    """The extractor of a dataset for which none was chosen: its own classifier where it is one of
    OWN_CLASSIFIER; else Inception where its weights are at hand, named or in the cache; else
    EfficientNet-Lite0, whose weights a package brings."""
    if name in OWN_CLASSIFIER:
        return "classifier"
    if inception is not None or (cache / clean_fid.FILE).exists():
        return "inception"
    return "efficientnet-lite0"


def _slug(name: str) -> str:
    """A dataset's name, or the last part of its folder's path, for the name of a metric."""
    return re.sub(r"[^\w.]+", "-", Path(name).name).strip("-") or "images"


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
        h = F.relu(self.conv2(_pool(h, max(8, h.shape[-1] // 2))))
        h = F.relu(self.conv3(_pool(h, max(4, h.shape[-1] // 2))))
        return self.hidden(_pool(h, 4).flatten(1))

    def logits(self, features: Tensor) -> Tensor:
        return self.out(F.dropout(F.relu(features), 0.3, self.training))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.features(images))


def _pool(h: Tensor, size: int) -> Tensor:
    """Adaptive average pooling to size x size.

    Where windows overlap, as products of matrices: a GPU adds up the usual gradient in any order.
    """
    if h.shape[-1] == size:
        return h
    if h.shape[-1] % size == 0:
        return F.avg_pool2d(h, h.shape[-1] // size)
    windows = F.adaptive_avg_pool1d(torch.eye(h.shape[-1], device=h.device), size)
    return windows.T @ h @ windows


def classifier(dataset: Real, device: torch.device, cache: Path = CACHE) -> Extractor:
    """The dataset's own classifier: trained once with a fixed seed, then read from the cache."""
    name = _slug(dataset.spec.name)
    if dataset.train_labels is None:
        raise UserError(
            f"{name} has no classes to train a classifier on: give --features random or inception"
        )
    seen = weights_sha256({"images": dataset.train, "labels": dataset.train_labels})
    path = cache / "features" / f"cnn-{name}-{seen[:8]}-{STEPS}.safetensors"

    def make() -> tuple[dict[str, Tensor], dict[str, str]]:
        say(f"features: training the classifier of {name}, once for all")
        accuracy = _train(model, dataset, device)
        return model.state_dict(), {"accuracy": json.dumps(accuracy)}

    with _repeatable(device):
        model = Classifier(dataset.spec.channels, dataset.num_classes)
        weights, metadata = cached(path, make)
    try:
        model.load_state_dict(weights)
        accuracy = json.loads(metadata["accuracy"])
    except (RuntimeError, KeyError):
        raise UserError(
            f"{path} was written by another version: delete it, and the classifier is trained anew"
        ) from None
    sha256 = weights_sha256(model.state_dict())
    say(f"features: classifier of {name}, accuracy {accuracy:.2%} on held-out images, {sha256[:8]}")
    model = model.to(device).eval().requires_grad_(False)
    return Extractor(
        name=f"fd-cnn-{name}-{sha256[:8]}",
        sha256=sha256,
        dim=model.hidden.out_features,
        extract=model.features,
        accuracy=accuracy,
        probabilities=lambda features: model.logits(features).softmax(1),
    )


def _train(model: Classifier, dataset: Real, device: torch.device) -> float:
    """Accuracy on the test images after STEPS steps of AdamW; the same weights every time."""
    images, labels, test_labels = dataset.train, dataset.train_labels, dataset.test_labels
    assert labels is not None
    assert test_labels is not None
    images, labels = images.to(device), labels.to(device)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    random = torch.Generator().manual_seed(0)
    for _ in track(range(STEPS), "classifier", lambda i: (i + 1, STEPS, "steps")):
        which = torch.randint(len(images), (128,), generator=random).to(device)
        loss = F.cross_entropy(model(images[which]), labels[which], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        predicted = [model(part.to(device)).argmax(1).cpu() for part in dataset.test.split(1000)]
    return float((torch.cat(predicted) == test_labels).double().mean())


@contextmanager
def _repeatable(device: torch.device) -> Generator[None]:
    """Torch's own random numbers from seed 0 and all sums in one order; then all as before."""
    cudnn = torch.backends.cudnn
    before, threads = (cudnn.deterministic, cudnn.benchmark), torch.get_num_threads()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        cudnn.deterministic, cudnn.benchmark = True, False
        torch.set_num_threads(1)  # a gradient's sums are cut by the number of them
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
            torch.set_num_threads(threads)


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


def random_network(dataset: Real, device: torch.device) -> Extractor:
    """Features of an untrained network: a cross-check that no training can favour."""
    model = RandomNetwork(dataset.spec.channels).to(device).eval().requires_grad_(False)
    sha256 = weights_sha256(model.state_dict())
    return Extractor(f"fd-random-{_slug(dataset.spec.name)}-{sha256[:8]}", sha256, 64, model)


def users_network(choice: str, dataset: Real, device: torch.device, trust: bool) -> Extractor:
    """The network of one's own: see custom.load."""
    network, sha256 = custom.load(choice, device, trust)
    images = dataset.train[:3]
    if len(images) < 3:
        images = torch.zeros(3, *dataset.spec.shape, dtype=torch.uint8)
    dim = custom.probe(choice, network, images.to(device))
    stem = choice.rpartition(":")[2] if choice.startswith(custom.MODULE) else Path(choice).stem
    name = f"fd-{_slug(stem)}-{_slug(dataset.spec.name)}-{sha256[:8]}"
    return Extractor(name, sha256, dim, network)
