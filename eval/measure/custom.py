"""A network of the user's own as a feature extractor, from a TorchScript or torch.export file."""

import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from diffusion.console import UserError

BATCH = 128  # images that the network sees at once, at most
EXPECTED = "expected uint8 (B, C, H, W) of 0..255 -> float (B, D)"


def _torchscript(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    return torch.jit.load(path, map_location=device).eval()


def _exported(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    from torch.export.passes import move_to_device_pass  # slow to import

    return move_to_device_pass(torch.export.load(path), str(device)).module()


LOADERS = {".pt": _torchscript, ".pt2": _exported}


def network(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network saved by torch.jit.save as .pt, or by torch.export.save as .pt2, on the device.

    It is called with uint8 images (B, C, H, W) of 0..255 at the dataset's size, for any B from 2
    to 128, and returns float features (B, D), each row of its own image alone. Scaling and
    resizing are up to it.
    """
    if not path.is_file():
        raise UserError(f"--features: there is no file {path}")
    try:
        with _quiet():
            model = LOADERS[path.suffix](path, device)
    except Exception as error:  # a wrong file fails in as many ways as there are files
        raise UserError(
            f"{path} does not load: expected a network saved by torch.jit.save as .pt or by "
            f"torch.export.save as .pt2 ({_reason(error)})"
        ) from error

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        if len(images) == 1:  # an exported network may take no batch of one
            return extract(images.expand(2, -1, -1, -1))[:1]
        parts = images.tensor_split(-(-len(images) // BATCH))
        return torch.cat([model(part) for part in parts]).float()

    return extract


def probe(path: Path, extract: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """D, once the network has shown with 2 and with 3 real images that it does what is asked."""
    batches = []
    for some in (images[:2], images[:3]):
        try:
            features = extract(some)
        except Exception as error:
            raise UserError(
                f"{path} fails on {len(some)} images, uint8 {tuple(some.shape)} "
                f"({_reason(error)}): {EXPECTED} for any B; export with a dynamic batch dimension"
            ) from error
        if features.ndim != 2 or len(features) != len(some):
            raise UserError(
                f"{path} made {tuple(features.shape)} of {len(some)} images: {EXPECTED} for any B"
            )
        if not features.isfinite().all():
            raise UserError(f"{path} makes features of real images that are not finite numbers")
        batches.append(features)
    two, three = batches
    if (two - three[:2]).abs().max() > 0.01 * three.abs().max():
        raise UserError(
            f"{path} makes other features of an image in another batch: "
            "save the network after network.eval()"
        )
    return two.shape[1]


@contextmanager
def _quiet() -> Generator[None]:
    """Without warnings that TorchScript is deprecated, or torch.export's log of what it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)


def _reason(error: Exception) -> str:
    """One line: of a TorchScript traceback the last, else the first."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if "Traceback" in str(error) else 0].strip()
