"""Students: how they begin, and what they make when they are trained."""

import diffusion  # noqa: F401  before torch
