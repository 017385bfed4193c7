"""The workshop: what the suite's parts cost, alone and beside their peers."""

import diffusion  # noqa: F401  before torch
