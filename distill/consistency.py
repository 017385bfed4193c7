"""Consistency models: `python -m distill.consistency --mode cd|ct|ict|ect|scm`.

A mode is a module of this folder: its `Options` with the settings of its `Loss`, its `PRESETS` for
each dataset, and `distill(options)`.
"""

import argparse
import sys
from dataclasses import fields
from types import ModuleType

from diffusion.console import UserError, run
from distill import cd, ct, ect, ict, scm
from students.start import StudentOptions, parse

PROG = "python -m distill.consistency"
MODES = {"cd": cd, "ct": ct, "ict": ict, "ect": ect, "scm": scm}

DESCRIPTION = """Make a student that goes from any noise level straight to an image, in one call or
a few. --mode NAME says how it learns, and --mode NAME --help shows the mode's options. These are
the default mode's, cd's."""


def read_command() -> tuple[ModuleType, StudentOptions]:
    """The mode that the command line names, and its options. UserError for those of another."""
    parser = argparse.ArgumentParser(PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--mode")
    given, arguments = parser.parse_known_args(sys.argv[1:])
    mode = given.mode or "cd"
    if mode not in MODES:
        raise UserError(f"--mode must be one of {', '.join(MODES)}, got {mode}")
    words = (word.split("=")[0].replace("_", "-") for word in arguments)
    for flag in sorted(word for word in words if word.startswith("--")):
        modes = [name for name in MODES if flag in flags(name)]
        if modes and mode not in modes:
            raise UserError(
                f"--mode {mode} has no {flag}: it goes with --mode {' or '.join(modes)}"
            )
    prog, description = PROG, None
    if given.mode:
        prog += f" --mode {mode}"
    else:
        sentences = (" ".join((module.Options.__doc__ or "").split()) for module in MODES.values())
        description = "\n\n".join([DESCRIPTION, *sentences])
    return MODES[mode], parse(MODES[mode].PRESETS, prog, arguments, description)


def flags(mode: str) -> set[str]:
    """The options of a mode's loss."""
    return {f"--{field.name.replace('_', '-')}" for field in fields(MODES[mode].Loss)}


def main() -> None:
    mode, options = read_command()
    mode.distill(options)


if __name__ == "__main__":
    run(main)
