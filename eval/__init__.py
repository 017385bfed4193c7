"""The harness: quality and wall-clock against step count, with floors, spreads and provenance."""

import diffusion  # noqa: F401  before torch
