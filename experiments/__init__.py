"""Whole comparisons, from data to figures, each by one command."""

import diffusion  # noqa: F401  before torch
