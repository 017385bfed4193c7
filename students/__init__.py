"""Students: how they begin, and how any model makes images.

From Python: `from students import load` (docs/api.md).
"""

import diffusion  # noqa: F401  before torch
from diffusion.console import UserError
from students.api import ImageModel, Images, load, to_pil, to_tensor

__all__ = ["ImageModel", "Images", "UserError", "load", "to_pil", "to_tensor"]
