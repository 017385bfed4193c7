"""clean-fid's Inception in mode clean (Parmar et al. 2022): its weights' file, its own resize."""

import hashlib
import logging
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pooch
import torch
import torch.nn.functional as F
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torch import Tensor

from diffusion.console import UserError, first_line, say

FILE = "inception-2015-12-05.pt"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE}"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
DIM = 2048
BATCH = 64  # 299 x 299 in colour: about a gigabyte of activations
PATIENCE = 10.0  # seconds until the host must have answered, and between two of its bytes
resizer = build_resizer("clean")


def weights(named: Path | None, cache: Path) -> Path:
    """The file of the published weights: the one named, else the cache's, else downloaded to it.

    named: the file, or the folder that holds it.
    """
    if named is None:
        file = cache / FILE
        if not file.exists():
            _download(file)
    else:
        file = named / FILE if named.is_dir() else named
        if not file.is_file():
            raise UserError(f"there is no file {file}: {_mend()}")
    sha256 = file_sha256(file)
    if sha256 != SHA256:
        raise UserError(
            f"{file} has sha256 {sha256} and is not the Inception that fid is named for: {_mend()}"
        )
    return file


def file_sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def network(file: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 (B, C, H, W) of 0..255, C 1 or 3 -> float32 (B, 2048): the features that make `fid`."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that TorchScript is deprecated
        os.symlink(file.resolve(), Path(folder) / FILE)  # clean-fid takes a folder, not a file
        model = InceptionV3W(folder, download=False, resize_inside=False).to(device).eval()

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.cat([model(resize(part, pool)) for part in images.split(BATCH)])

    return extract


def resize(images: Tensor, pool: ThreadPoolExecutor) -> Tensor:
    """uint8 (B, C, H, W), C 1 or 3 -> float32 (B, 3, 299, 299) of 0..255, by clean-fid's resizer.

    It takes three planes and resizes each alone, so three grey images pass as one in colour.
    """
    planes = images.cpu().flatten(0, 1)
    planes = F.pad(planes, (0, 0, 0, 0, 0, -len(planes) % 3))
    threes = planes.unflatten(0, (-1, 3)).permute(0, 2, 3, 1).numpy()
    resized = torch.from_numpy(np.stack(list(pool.map(resizer, threes)))).permute(0, 3, 1, 2)
    resized = resized.flatten(0, 1)[: images.shape[0] * images.shape[1]].to(images.device)
    return resized.unflatten(0, images.shape[:2]).expand(-1, 3, -1, -1).contiguous()


def _mend() -> str:
    return (
        f"get {FILE} (sha256 {SHA256}) from {URL} and name it with --inception PATH, "
        "or choose --features classifier, random or a file of your own"
    )


def _download(file: Path) -> None:
    """Put the published file there, whole and checked, or raise a UserError."""
    say(f"features: downloading {URL} to {file}")
    logging.getLogger("pooch").setLevel(logging.ERROR)  # that line is enough
    ask = pooch.HTTPDownloader(timeout=PATIENCE)
    try:
        # pooch's protocol of a downloader names the arguments otherwise than its own class does
        known = f"sha256:{SHA256}"
        pooch.retrieve(URL, known, file.name, file.parent, downloader=ask)  # ty: ignore
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is missing and was not downloaded ({first_line(error)}): {_mend()}"
        ) from None
