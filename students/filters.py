"""A content filter: a classifier or a function that scores every image before anyone sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.console import UserError, first_line

GREY = 128  # a blocked image's only level
MODULE = "module:"


@dataclass(frozen=True)
class Filter:
    """What is blocked is replaced by a plain grey image, so that numbers and shapes stay."""

    score: Callable[[np.ndarray], Any]
    """Images N x H x W x C uint8 -> one number each, the higher the worse."""
    threshold: float
    """Images of this score and above are blocked."""
    name: str

    def __call__(self, images: Tensor) -> tuple[Tensor, np.ndarray]:
        """(images (B, C, H, W) uint8 with those that are blocked in grey, which are (B,) bool)."""
        pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
        scores = np.asarray(self.score(pixels), dtype=np.float64)
        if scores.shape != (len(images),) or np.isnan(scores).any():
            raise UserError(
                f"--filter {self.name}: expected one number for each of {len(images)} images, got "
                f"an array of shape {scores.shape}" + " with NaN" * bool(np.isnan(scores).any())
            )
        blocked = scores >= self.threshold
        rows = torch.from_numpy(blocked).to(images.device)[:, None, None, None]
        return torch.where(rows, torch.full_like(images, GREY), images), blocked


def load(named: str | Callable[[np.ndarray], Any], threshold: float) -> Filter:
    """The filter of an ONNX file, of module:package.module:function, or of a function.

    An ONNX classifier takes images (N, C, H, W), uint8 levels or float32 from 0 to 1. Its first
    output has (N,) or (N, 1) scores, or (N, 2): of fine images and of those to block.
    """
    if callable(named):
        return Filter(named, threshold, getattr(named, "__name__", "of a function"))
    if named.startswith(MODULE):
        return Filter(_function(named), threshold, named)
    return Filter(_classifier(named), threshold, named)


def _function(named: str) -> Callable[[np.ndarray], Any]:
    module, _, name = named.removeprefix(MODULE).partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--filter {named}: expected module:package.module:function ({error})"
        ) from error
    if not callable(function):
        raise UserError(f"--filter {named}: {name} is no function")
    return function


def _classifier(path: str) -> Callable[[np.ndarray], np.ndarray]:
    try:
        import onnxruntime
    except ImportError:
        raise UserError("--filter FILE.onnx needs onnxruntime: pip install fewstep[onnx]") from None
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common error
        raise UserError(
            f"--filter {path}: expected an ONNX classifier ({first_line(error)})"
        ) from error
    (given, *others), first = session.get_inputs(), session.get_outputs()[0].name
    if others or given.type not in ("tensor(uint8)", "tensor(float)"):
        raise UserError(f"--filter {path}: expected one input, images as uint8 or float32")

    def score(images: np.ndarray) -> np.ndarray:
        x = images.transpose(0, 3, 1, 2)
        if given.type == "tensor(float)":
            x = x.astype(np.float32) / 255
        output = np.asarray(session.run([first], {given.name: np.ascontiguousarray(x)})[0])
        return output[:, -1] if output.ndim == 2 and output.shape[1] in (1, 2) else output

    return score
