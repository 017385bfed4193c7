"""Every way out of one model in a table: `python -m benchmarks.export runs/digits/consistency`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from diffusion.console import UserError, run, say, write
from diffusion.model import load
from students import formats
from students.export import Options as Export
from students.export import export
from students.formats import Parity

WAYS: dict[str, dict] = {
    "onnx": {"to": "onnx"},
    "onnx fp16": {"to": "onnx", "dtype": "fp16"},
    "onnx int8": {"to": "onnx", "int8": True},
    "torch": {"to": "torch"},
    "torch bf16": {"to": "torch", "dtype": "bf16"},
    "torch, AOTInductor": {"to": "torch", "aot": True},
    "diffusers": {"to": "diffusers"},
}
HEADS = "| | x0 differ by | grey levels by | MB | ms for one image | images/s at 64 | quality |"


@dataclass(frozen=True)
class Options:
    """Export a model in every way, and compare each with PyTorch in a Markdown table.

    A way that is refused or that this machine lacks has its reason in the table.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The run or checkpoint."""
    steps: int | None = None
    """Network calls for each image. If left out: the checkpoint's own number."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Which ways, by their names in the table."""
    num_images: int = 2000
    """Images on which a graph of fewer bits is judged."""
    out: Path = Path("runs/exports")
    """The folder for the exports, one folder each."""


def row(parity: Parity, quality: str) -> str:
    difference = "" if parity.difference is None else f"{parity.difference:.2g}"
    levels = "" if parity.levels is None else str(parity.levels)
    cells = [parity.name, difference, levels, f"{parity.bytes / 1e6:.2f}", f"{parity.single:.3g}"]
    return f"| {' | '.join([*cells, f'{parity.rate:,.0f}', quality])} |\n"


def rows(options: Options, way: str) -> str:
    """The lines of one way, with PyTorch's own of the same minutes above them."""
    asked = Export(
        options.checkpoint,
        steps=options.steps,
        num_images=options.num_images,
        out=options.out / way.replace(", ", "-").replace(" ", "-"),
        **WAYS[way],
    )
    try:
        folder, parities = export(asked)
    except UserError as error:
        return f"| {way} | {str(error).replace('|', '/')} | | | | | |\n"
    readme = (folder / "README.md").read_text()
    quality = readme.partition("\nQuality: ")[2].strip()
    if not parities:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return f"| {way} | | 0 | {size / 1e6:.2f} | | | |\n"
    return "".join(row(each, quality if i else "") for i, each in enumerate(parities))


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(Options, prog="python -m benchmarks.export", config=config)
    if unknown := [way for way in options.ways if way not in WAYS]:
        raise UserError(f"--ways must be of {', '.join(WAYS)}, got {unknown[0]!r}")
    load(options.checkpoint)  # what is wrong with it is said before the table begins
    say(f"times: medians of up to {formats.SECONDS:g} s of repeats, each beside PyTorch's own")
    write(f"{HEADS}\n|{' --- |' + ' --: |' * 6}\n")
    for way in options.ways:
        write(rows(options, way))


if __name__ == "__main__":
    run(main)
