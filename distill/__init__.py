"""Distillation methods: one file each, an objective and a command."""

import diffusion  # noqa: F401  before torch
