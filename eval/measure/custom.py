"""A network of the user's own as a feature extractor: from a file, or by the name of a function.

An ONNX file runs no code of its maker. TorchScript and torch.export files can, and are loaded only
where the user trusts them.
"""

import hashlib
import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffusion.checkpoint import weights_sha256
from diffusion.console import UserError
from eval.measure.inception import file_sha256
from students.exported import onnx_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

BATCH = 128  # images that the network sees at once, at most
EXPECTED = "expected uint8 (B, C, H, W) of 0..255 -> float (B, D)"


def _torchscript(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    return torch.jit.load(path, map_location=device).eval()


def _exported(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    from torch.export.passes import move_to_device_pass  # slow to import

    return move_to_device_pass(torch.export.load(path), str(device)).module()


def session(path: Path, what: str = "a network") -> "InferenceSession":
    """An ONNX file, on the CPU. UserError where onnxruntime is missing or the file is none."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: expected {what} as .onnx")
    return onnx_session(path, f"does not load: expected {what} as .onnx")


def _onnx(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    network = session(path)
    (name,) = (each.name for each in network.get_inputs())

    def extract(images: Tensor) -> Tensor:
        features, *_ = network.run(None, {name: images.cpu().numpy()})
        return torch.from_numpy(features).to(images.device)

    return extract


LOADERS = {".onnx": _onnx, ".pt": _torchscript, ".pt2": _exported}
RUN_CODE = {".pt", ".pt2"}  # TorchScript may write files; an exported program's constants unpickle
MODULE = "module:"  # before the name of the user's own function


def is_named(choice: str) -> bool:
    """Whether it names an extractor of one's own: by its file, or by its place in a module."""
    return choice.startswith(MODULE) or Path(choice).suffix in LOADERS


def load(choice: str, device: torch.device, trust: bool) -> tuple[Callable[[Tensor], Tensor], str]:
    """The extractor that was named, and its sha256. It is called with uint8 images (B, C, H, W) of
    0..255 at the dataset's size, for any B from 2 to 128, and returns float features (B, D), each
    row of its own image alone. Scaling and resizing are up to it.

    trust: whether a file may be loaded that may run code.
    """
    if choice.startswith(MODULE):
        model, sha256 = _function(choice, device)
    else:
        model, sha256 = _file(Path(choice), device, trust), file_sha256(Path(choice))

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        if len(images) == 1:  # an exported network may take no batch of one
            return extract(images.expand(2, -1, -1, -1))[:1]
        parts = images.tensor_split(-(-len(images) // BATCH))
        return torch.cat([model(part) for part in parts]).float()

    return extract, sha256


def _file(path: Path, device: torch.device, trust: bool) -> Callable[[Tensor], Tensor]:
    """The network in an ONNX file, or one saved by torch.jit.save (.pt) or torch.export.save."""
    if not path.is_file():
        raise UserError(f"--features: there is no file {path}")
    if path.suffix in RUN_CODE and not trust:
        raise UserError(
            f"{path} can run code of its maker when it is loaded: give an .onnx file or "
            "--features module:PACKAGE.MODULE:FUNCTION, or add --trust if you know its maker"
        )
    try:
        with _quiet():
            return LOADERS[path.suffix](path, device)
    except UserError:
        raise
    except Exception as error:  # a wrong file fails in as many ways as there are files
        raise UserError(
            f"{path} does not load: expected a network as .onnx, or saved by torch.jit.save as .pt "
            f"or by torch.export.save as .pt2 ({_reason(error)})"
        ) from error


def _function(choice: str, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str]:
    """The user's own function, or torch module, by its name; and the sha256 of the file that it
    is in, with that of the module's weights."""
    place, _, name = choice.removeprefix(MODULE).rpartition(":")
    try:
        module = import_module(place)
        function = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--features {choice}: expected module:PACKAGE.MODULE:FUNCTION, of a module that "
            f"python can import from here ({_reason(error)})"
        ) from error
    source = Path(getattr(module, "__file__", None) or "")
    sha256 = file_sha256(source) if source.is_file() else ""
    if isinstance(function, nn.Module):
        function = function.to(device).eval()
        sha256 += weights_sha256(function.state_dict())
    if not callable(function):
        raise UserError(f"--features {choice}: {name} is no function: {EXPECTED}")
    return function, hashlib.sha256(f"{sha256} {name}".encode()).hexdigest()


def probe(name: str, extract: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """D, once the network has shown with 2 and with 3 real images that it does what is asked."""
    batches = []
    for some in (images[:2], images[:3]):
        try:
            features = extract(some)
        except Exception as error:
            raise UserError(
                f"{name} fails on {len(some)} images, uint8 {tuple(some.shape)} "
                f"({_reason(error)}): {EXPECTED} for any B; export with a dynamic batch dimension"
            ) from error
        if features.ndim != 2 or len(features) != len(some):
            raise UserError(
                f"{name} made {tuple(features.shape)} of {len(some)} images: {EXPECTED} for any B"
            )
        if not features.isfinite().all():
            raise UserError(f"{name} makes features of real images that are not finite numbers")
        batches.append(features)
    two, three = batches
    if (two - three[:2]).abs().max() > 0.01 * three.abs().max():
        raise UserError(
            f"{name} makes other features of an image in another batch: "
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
