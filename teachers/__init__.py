"""Teachers: slow, good models to distil from.

From Python: `teachers.train(teachers.Options.default("digits"))` (docs/api.md).
"""

from typing import TYPE_CHECKING, Any

import diffusion  # noqa: F401  before torch

if TYPE_CHECKING:
    from teachers.ddpm import Options
    from teachers.ddpm import train_teacher as train

__all__ = ["Options", "train"]


def __getattr__(name: str) -> Any:
    """Options and train are imported when they are asked for: `python -m teachers.ddpm` imports
    this package before it runs that module, which must not be run twice."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from teachers.ddpm import Options, train_teacher

    return {"Options": Options, "train": train_teacher}[name]
