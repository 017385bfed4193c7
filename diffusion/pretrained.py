"""Networks of Hugging Face's transformers, from folders that their save_pretrained wrote.

No code of a folder's runs, nothing is unpickled, nothing is downloaded.
"""

from pathlib import Path
from typing import Any

import torch

from diffusion.console import UserError, first_line

SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def transformers(purpose: str) -> Any:
    """The library. UserError where it is not installed; purpose: what it is needed for."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{purpose} need transformers, which is not here: pip install -e '.[text]', or "
            "pip install transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def network(folder: Path, architecture: str, purpose: str, unused: str = "\0") -> Any:
    """The float32 network in a folder, frozen, from safetensors alone.

    architecture: its class in transformers. unused: a part of the names of weights that may be
    missing, as nothing reads them. UserError where it is none or not whole.
    """
    library = transformers(purpose)
    expected = f"expected a {architecture} as save_pretrained writes it, with safetensors"
    if not (folder / "config.json").is_file():
        raise UserError(f"there is no {folder / 'config.json'}: {expected}")
    try:
        model, report = getattr(library, architecture).from_pretrained(
            folder, **SAFE, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # a wrong file fails in as many ways as there are files
        raise UserError(f"{folder} does not load: {expected} ({first_line(error):.200})") from error
    lacking = sorted(name for name in report["missing_keys"] if unused not in name)
    if lacking:  # which transformers would leave at random
        raise UserError(f"{folder} lacks weights such as {lacking[0]}: {expected}")
    return model.eval().requires_grad_(False)
