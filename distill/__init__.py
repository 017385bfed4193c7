"""Distillation methods: one file each, an objective and a command.

From Python, the type of the options says the method:

    student = distill.train(distill.preset(cd.Options, "runs/digits/teacher"))
"""

import sys
from dataclasses import replace
from pathlib import Path

import diffusion  # noqa: F401  before torch
from diffusion.model import Model
from students.start import Options, StudentOptions, preset_for

__all__ = ["preset", "train"]


def preset(method: type[Options], teacher: str | Path, data: str | None = None) -> Options:
    """The options that a method's command takes for that teacher where none is given.

    method: the Options of a module of this package. teacher: a run's folder, a checkpoint, or
    another maker's model as diffusers:PATH, whose training images are then `data`.
    """
    presets = sys.modules[method.__module__].PRESETS
    chosen = preset_for(presets, Path(teacher), data or "")
    return replace(chosen, teacher=Path(teacher), data=data)


def train(options: StudentOptions) -> Model:
    """The student of these options: loaded where it is finished, else trained, as by the method's
    command. Of progressive distillation, which makes one for each round, the last.

    options: the Options of a module of this package.
    """
    students = sys.modules[type(options).__module__].distill(options)
    return students[-1] if isinstance(students, list) else students
