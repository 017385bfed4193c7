"""What the benchmarks against diffusers have from it: one line where it is not installed."""

import sys

from diffusion.console import err

try:
    import diffusers
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
except ModuleNotFoundError as missing:
    err.print(f"error: {missing.name} is not installed: pip install -e '.[bench]'", markup=False)
    sys.exit(2)

__all__ = ["EMAModel", "diffusers", "get_scheduler"]
