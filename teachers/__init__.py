"""Teachers: slow, good models to distil from."""

import diffusion  # noqa: F401  before torch
