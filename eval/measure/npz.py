"""Arrays of .npz files that others wrote."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion.console import UserError
from diffusion.machine import free_memory, in_bytes


def read_npz(path: Path, names: Sequence[str], expected: str) -> dict[str, np.ndarray]:
    """The arrays of these names that the file holds.

    UserError with what was `expected` where it holds none of them or is no whole .npz, and where
    they would not fit into the memory. No pickle is read.
    """
    arrays, reason = {}, f"it holds none of {', '.join(names)}"
    try:
        with zipfile.ZipFile(path) as archive:
            size = max((info.file_size for info in archive.infolist()), default=0)
        if 2 * size > free_memory():
            raise UserError(f"{path}: unpacked it has {in_bytes(size)}, for which memory is short")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: _array(file, name) for name in names if name in file}
    except UserError:
        raise
    except Exception as error:  # damaged archives and headers raise anything
        reason = f"{error!s:.200}" or type(error).__name__
    if not arrays:
        raise UserError(f"{path}: expected {expected} ({reason})")
    return arrays


def _array(file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    array = file[name]
    if not isinstance(array, np.ndarray):  # numpy gives what has no .npy's first bytes as bytes
        raise ValueError(f"{name} is no array")
    return array
