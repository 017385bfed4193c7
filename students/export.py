"""Take a model elsewhere: `python -m students.export CHECKPOINT --to onnx --steps 2`."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Literal

import tyro

from diffusion.console import UserError, at_least, check_limits, doing, run, say
from diffusion.files import write_atomic
from diffusion.folders import check_claim, claim, strangers
from diffusion.model import Model, load
from diffusion.owner import owned
from diffusion.plan import MOST_STEPS
from diffusion.samplers import SOLVERS
from students import formats, judging, pipeline
from students.card import Written, write_pages
from students.exported import FILES, About, Format, Precision
from students.formats import AOT, Parity
from students.graph import MOST_CALLS, Sampling


@dataclass(frozen=True)
class Options:
    """Take a model elsewhere: as one graph from noise to images, or as its weights, in a folder
    with a README, a model card and an example.

    Every graph is run on the same noise as the checkpoint before it is kept, at batches of 1, 7 and
    64. One whose images differ is refused.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The model: a run's folder, a .safetensors file, or another maker's, as diffusers:PATH."""
    to: Format = "onnx"
    """onnx: a graph for onnxruntime and many others. torch: a .pt2 program of torch.export.
    diffusers: a folder that diffusers loads. safetensors: the weights and a JSON of the plan."""
    steps: int | None = None
    """Network calls for each image, as of students.generate. If left out: the checkpoint's own
    number."""
    # the choices are whatever solvers are registered, which a type cannot say
    sampler: Literal[tuple(SOLVERS)] | None = None  # ty: ignore[invalid-type-form]
    """How to go from noise to an image. If left out: the checkpoint's own way, or ddim at other
    --steps."""
    guidance: float | None = None
    """How strongly images are pushed towards their class. A graph then takes the weight as an
    input. If left out: the checkpoint's own weight."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the network's weights. In a graph it calculates in this format as well."""
    int8: bool = False
    """With --to onnx: weights and activations in 8 bits, whose scales are measured on images that
    the model makes."""
    aot: bool = False
    """With --to torch: machine code as well, by AOTInductor, which needs a C++ compiler."""
    band: float = 1.25
    """A graph of less than fp32 is refused where its distance from real images, over that of the
    checkpoint, is above this, or below 1 / this."""
    num_images: int = 2000
    """Images that such a graph is judged on."""
    data: str | None = None
    """For that judgement: the folder that the model's images are in now, if it has moved."""
    data_dir: Path | None = None
    """For that judgement: the folder that holds a named dataset's files."""
    license: str = "unknown"
    """What the model card names as the licence, such as apache-2.0."""
    results: Path | None = None
    """A results.jsonl of eval.compare whose figures of these weights go on the model card. If left
    out: that of compare/ beside the run, where there is one."""
    out: Path | None = None
    """The folder. If left out: export/FORMAT-STEPS in the run's folder."""


def check(options: Options) -> None:
    at_least(1, options, "steps", most=MOST_STEPS)
    at_least(65, options, "num_images")
    check_limits(options, {"band": ("from above 1 to 100", lambda band: 1 < band <= 100)})
    if options.int8 and (options.to != "onnx" or options.dtype != "fp32"):
        raise UserError("--int8 goes with --to onnx and --dtype fp32: leave the others out")
    if options.aot and options.to != "torch":
        raise UserError(f"--aot goes with --to torch, got --to {options.to}")
    if options.to == "onnx" and options.dtype == "bf16":
        raise UserError(
            "--dtype bf16 does not go with --to onnx, whose convolutions take none (opset 18): "
            "take fp16, or --to torch"
        )
    if options.to == "diffusers" and options.dtype != "fp32":
        raise UserError(
            "--to diffusers writes fp32, which diffusers narrows as it loads (torch_dtype=…): "
            "leave --dtype out"
        )


def export(options: Options) -> tuple[Path, list[Parity]]:
    """The folder, and how what was written compares with PyTorch, PyTorch's own row first."""
    check(options)
    precision: Precision = "int8" if options.int8 else options.dtype
    model = load(options.checkpoint)
    plan = model.plan(options.steps, options.sampler, None, options.guidance)
    calls = model.calls(plan)
    if options.to in ("onnx", "torch") and calls > MOST_CALLS:
        raise UserError(
            f"a graph of {calls} network calls would hold the network as often, and at most "
            f"{MOST_CALLS} are taken: give fewer --steps"
        )
    name = f"{options.to}-{plan.num_steps}" + (f"-{precision}" if precision != "fp32" else "")
    out = options.out or _home(options.checkpoint) / "export" / name
    check_claim(out, "export")
    sampling = Sampling(model, plan)
    about = About(
        options.to, precision, plan, sampling.names, sampling.draws, model.sha256, model.card
    )
    with TemporaryDirectory(prefix=".fewstep-", dir=_made(out.parent)) as place:
        folder = Path(place)
        with doing(f"exporting {options.checkpoint}"):
            parity, holds = _write(options, model, about, folder)
        judged = _judged(options, about, folder) if parity else ""
        write_atomic(folder / "fewstep.json", about.to_json())
        measured = _figures(options, model)
        write_pages(Written(about, model, options.license, holds, parity, judged, measured), folder)
        names = {path.name for path in folder.iterdir()}
        if others := strangers(out, names):
            raise UserError(
                f"{out} holds {others[0]}, which this export is not: give another --out"
            )
        with owned(out):
            claim(out, "export")
            for path in folder.iterdir():
                if path.is_dir():
                    copytree(path, out / path.name, dirs_exist_ok=True)
                else:
                    os.replace(path, out / path.name)
    for row in parity[1:]:
        say(
            f"{row.name}: x0 differ by up to {row.difference:.2g}, images by {row.levels} grey "
            f"levels; {row.bytes / 1e6:.2f} MB; {row.single:.3g} ms for one image (PyTorch "
            f"{parity[0].single:.3g}), {row.rate:,.0f} images/s at 64 (PyTorch "
            f"{parity[0].rate:,.0f})"
        )
    if judged:
        say(judged)
    say(f"{plan.sampler} in {plan.num_steps} steps: {out}")
    return out, parity


def _write(
    options: Options, model: Model, about: About, folder: Path
) -> tuple[list[Parity], dict[str, str]]:
    """Write the model itself. How it compares, and what is in each file."""
    file, device = folder / FILES.get(options.to, ""), model.device
    exact = load(options.checkpoint)  # whose weights are not narrowed
    narrow = formats.narrowed(model, about.precision)
    if options.to == "safetensors":
        formats.write_weights(model, about, file)
        return [], {file.name: f"the weights, {about.precision}, and the plan in its metadata"}
    if options.to == "diffusers":
        return [], pipeline.write(model, about, folder)
    writers = {"onnx": formats.write_onnx, "torch": formats.write_torch}
    if about.precision == "int8":
        whole = folder / "fp32.onnx"
        formats.write_onnx(narrow, replace(about, precision="fp32"), whole)
        formats.write_int8(whole, about, file)
        whole.unlink()
    else:
        writers[options.to](narrow, about, file)
    files = {file.name: f"the graph, {about.precision}"}
    if options.aot:
        formats.write_aot(file, folder / AOT)
        files[AOT] = "the same as machine code for this machine's kind, by AOTInductor"
    parity = [formats.itself(exact, about)]
    for name in files:
        made = formats.load_graph(folder / name)
        title = {AOT: "AOTInductor"}.get(name, options.to) + f" {about.precision}"
        size = (folder / name).stat().st_size
        row = formats.compared(
            title, formats.graph(made), formats.pytorch(exact, about), size, device
        )
        formats.check(row, about.precision)
        parity.append(row)
    return parity, files


def _judged(options: Options, about: About, folder: Path) -> str:
    """What fewer bits cost in distance from real images, in words; nothing for fp32. UserError
    beyond the band on either side: to be better by much is no sign of the same model either."""
    if about.precision == "fp32":
        return ""
    given = (("--data", options.data), ("--data-dir", options.data_dir))
    places = [word for flag, value in given if value for word in (flag, str(value))]
    graph, count = formats.load_graph(folder / FILES[about.format]), options.num_images
    whole, made = judging.judge(options.checkpoint, graph, count, places)
    ratio = float(made["quality"]) / float(whole["quality"])
    words = (
        f"distance {judging.interval(made)} in {about.precision}, {judging.interval(whole)} in "
        f"PyTorch's fp32 ({made['metric']}, {count:,} images of the same noise, 95 %): {ratio:.3f}×"
    )
    if not 1 / options.band <= ratio <= options.band:
        raise UserError(
            f"the export is refused: {words}, expected {1 / options.band:.2f}× to "
            f"{options.band:.2f}× (--band); nothing is left of it"
        )
    return words


def _figures(options: Options, model: Model) -> list[judging.Row]:
    """The rows of these weights in the results that are given, or lie beside the run."""
    beside = _home(options.checkpoint).parent / "compare" / "results.jsonl"
    if options.results and not options.results.is_file():
        raise UserError(f"there is no file {options.results}: expected one of eval.compare's")
    file = options.results or beside
    return judging.measured(file, model.sha256) if file.is_file() else []


def _home(checkpoint: Path) -> Path:
    """The run's folder; of another maker's model, one of its name in runs/."""
    prefix, colon, place = str(checkpoint).partition(":")
    if colon and prefix.isalpha():
        return Path("runs") / Path(place).name
    return checkpoint.parent if checkpoint.is_file() else checkpoint


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    config = (tyro.conf.OmitArgPrefixes,)
    export(tyro.cli(Options, prog="python -m students.export", config=config))


if __name__ == "__main__":
    run(main)
