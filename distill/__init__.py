"""Distillation methods: one file each, an objective and a command."""
