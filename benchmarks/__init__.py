"""The workshop: how fast our parts are, alone and beside their peers."""

import diffusion  # noqa: F401  before torch
