"""The harness's figures, by its command: students import nothing of eval."""

import csv
import subprocess
import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from diffusion.console import UserError
from students.exported import Exported

Row = Mapping[str, str]  # a line of the table, by the columns of --table csv


def figures(arguments: Sequence[str]) -> list[Row]:
    """The rows of `python -m eval.compare` with these arguments. UserError where it fails."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "eval.compare", *arguments]
        command += ["--no-times", "--table", "csv", "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"the quality was not measured: {lines[-1].removeprefix('error: ')}")
    return [*csv.DictReader(StringIO(done.stdout))]


def measured(results: Path, sha256: str) -> list[Row]:
    """The rows of these weights in a results.jsonl."""
    return [row for row in figures([str(results)]) if row["sha256"] == sha256]


def judge(
    checkpoint: Path, made: Exported, num_images: int, places: Sequence[str]
) -> tuple[Row, Row]:
    """The rows of the checkpoint, sampled by the export's plan, and of the export, by so many
    images of the same noise.

    places: where its data is, as arguments of eval.compare.
    """
    about, plan = made.about, made.about.plan
    arguments = ["--steps", str(plan.num_steps), "--solvers", plan.sampler, "--no-long", *places]
    arguments += ["--num-images", str(num_images), "--likelihood", "0", "--precision", "fp32"]
    if plan.guidance is not None:
        arguments += ["--guidance", str(plan.guidance)]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "export.npz"
        np.savez(file, images=made(num_images))
        rows = figures([str(checkpoint), str(file), *arguments])
    key = (about.sha256, str(plan.num_steps), plan.sampler)
    whole = [row for row in rows if (row["sha256"], row["steps"], row["sampler"]) == key]
    exported = [row for row in rows if row["run"] == str(file)]
    if not (whole and exported):
        raise UserError(
            f"the quality was not measured: eval.compare has no row of {plan.sampler} in "
            f"{plan.num_steps} steps"
        )
    return whole[0], exported[0]


def interval(row: Row) -> str:
    """The distance, with its 95 % interval where one is known."""
    text = f"{float(row['quality']):.3g}"
    if not row["quality low"]:
        return text
    return f"{text} ({float(row['quality low']):.3g}–{float(row['quality high']):.3g})"
