"""The formats that students.export writes, each by its own library, and how far each agrees."""

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.console import UserError
from diffusion.denoiser import HALF
from diffusion.files import save_tensors
from diffusion.machine import this_device
from diffusion.model import Model
from students.exported import KEY, About, Exported, load_onnx, load_torch, of_aot
from students.graph import OUTPUTS, Sampling, trace

BATCHES = (1, 7, 64)  # at which a graph is checked
TOLERANCE = 1e-4  # between x0 of a graph in fp32 and PyTorch's
CALIBRATION = 8  # batches of 32 images
SECONDS = 1.0  # of repeats of a batch that is timed


def narrowed(model: Model, precision: str) -> Model:
    """The model with the convolutions and products of its network in fp16 or bf16, weights
    included; as it is for any other precision. Angles, norms and sums stay float32."""
    dtype = HALF.get(precision)
    if dtype:
        model.denoiser.precision = precision
        for module in model.denoiser.net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
    return model


def write_onnx(model: Model, about: About, path: Path) -> None:
    """The plan as one graph, by torch's own exporter. Opset 18."""
    need("onnxscript", "to write .onnx files")
    sampling = Sampling(model, about.plan)
    example = sampling.inputs(model, 0, torch.arange(2, device=model.device))
    program = trace(sampling, example)
    # an angle of 0 has an infinite log-tangent, which no step uses
    with quiet(), np.errstate(divide="ignore"):
        made = torch.onnx.export(
            program,
            (),
            input_names=list(sampling.names),
            output_names=list(OUTPUTS),
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    for node in made.model.graph:  # where in our source each is from: most of a small file
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    made.model.metadata_props[KEY] = about.to_json()
    made.save(path)


def write_int8(source: Path, about: About, path: Path) -> None:
    """The graph of another file with 8-bit weights and activations (QDQ), by onnxruntime.

    Its scales are measured on the images that the graph makes of noise, which no other seed has.
    """
    need("onnxruntime", "to quantise")
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    whole = load_onnx(source, torch.device("cpu"))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            numbers = torch.arange(32 * CALIBRATION).split(32)
            given = (whole.inputs(about.plan, 1 << 62, part, {}) for part in numbers)
            self.rows = ({name: each.numpy() for name, each in rows.items()} for rows in given)

        def get_next(self) -> dict[str, np.ndarray]:
            return next(self.rows, {})

    with quiet(), TemporaryDirectory(dir=path.parent) as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        )
    made = onnx.load(path)
    onnx.helper.set_model_props(made, {KEY: replace(about, precision="int8").to_json()})
    onnx.save(made, path)


def write_torch(model: Model, about: About, path: Path) -> None:
    """The plan as one program of torch.export."""
    sampling = Sampling(model, about.plan)
    numbers = torch.arange(2, device=model.device)
    program = trace(sampling, sampling.inputs(model, 0, numbers))
    with quiet():
        torch.export.save(program, path, extra_files={f"{KEY}.json": about.to_json()})


def write_aot(source: Path, path: Path) -> None:
    """The program of a .pt2 file, compiled ahead of time by AOTInductor."""
    from torch._inductor import aoti_compile_and_package

    with quiet(), torch.no_grad():
        aoti_compile_and_package(torch.export.load(source), package_path=str(path))


def write_weights(model: Model, about: About, path: Path) -> None:
    """The weights alone, and the plan in the file's metadata."""
    dtype = HALF.get(about.precision, torch.float32)
    weights = {
        name: (each.to(dtype) if each.is_floating_point() else each).contiguous().cpu()
        for name, each in model.denoiser.net.state_dict().items()
    }
    save_tensors(path, weights, {KEY: about.to_json()})


@dataclass(frozen=True)
class Parity:
    """How one way to make images compares with PyTorch's own."""

    name: str
    difference: float | None
    """The largest of x0's, over the images of all batches; None of PyTorch itself."""
    levels: int | None
    """The largest of the images', in grey levels."""
    bytes: int
    single: float
    """Milliseconds for one image: the median."""
    rate: float
    """Images a second at a batch of 64: the median."""


Make = Callable[[Tensor], tuple[Tensor, Tensor]]  # numbers -> images, x0


def pytorch(model: Model, about: About) -> Make:
    """The model itself, uncompiled, in float32."""

    def make(numbers: Tensor) -> tuple[Tensor, Tensor]:
        x0 = model.x0(about.plan, 0, numbers)
        return model.codec.decode(x0).permute(0, 2, 3, 1), x0

    return make


def graph(made: Exported) -> Make:
    return lambda numbers: made.run(made.inputs(made.about.plan, 0, numbers, {}))


def compared(name: str, make: Make, exact: Make, size: int, device: torch.device) -> Parity:
    """The parity of what makes images with what is exact. Both are called on the same noise, in
    batches of BATCHES."""
    difference, levels = 0.0, 0
    for batch in BATCHES:
        numbers = torch.arange(batch, device=device)
        (images, x0), (images_exact, x0_exact) = make(numbers), exact(numbers)
        difference = max(difference, float((x0 - x0_exact).abs().max()))
        levels = max(levels, int((images.int() - images_exact.int()).abs().max()))
    return Parity(name, difference, levels, size, *speed(make, device))


def itself(model: Model, about: About) -> Parity:
    """PyTorch's own row, to which the others compare."""
    make, size = pytorch(model, about), sum(p.nbytes for p in model.denoiser.parameters())
    return Parity("PyTorch", None, None, size, *speed(make, model.device))


def speed(make: Make, device: torch.device) -> tuple[float, float]:
    """Parity's `single` and `rate`."""
    single, many = (milliseconds(make, batch, device) for batch in (1, 64))
    return single, 64_000 / many


def milliseconds(make: Make, batch: int, device: torch.device) -> float:
    """The median of a batch's repeats, from noise to uint8, after two that warm up."""

    def once() -> float:
        begun = time.perf_counter()
        make(torch.arange(batch, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    first = min(once() for _ in range(2))
    return 1000 * statistics.median(once() for _ in range(max(3, min(100, int(SECONDS / first)))))


def load_graph(path: Path) -> Exported:
    """A file that was just written here, on this process's device."""
    device = this_device()
    if path.suffix == ".onnx":
        return load_onnx(path, device)
    if path.name == AOT:
        return of_aot(path, load_torch(path.with_name("model.pt2"), device, trust=True).about)
    return load_torch(path, device, trust=True)


AOT = "model-aot.pt2"


def check(row: Parity, precision: str) -> None:
    """UserError for a graph in fp32 that does not agree with PyTorch."""
    assert row.difference is not None
    if not row.difference <= (TOLERANCE if precision == "fp32" else float("inf")):
        raise UserError(
            f"the {row.name} export is refused: its x0 differ from PyTorch's by up to "
            f"{row.difference:.2g}, more than {TOLERANCE:g}; nothing is left of it"
        )


def need(package: str, why: str) -> None:
    """UserError where an extra's package is missing."""
    if not find_spec(package):
        raise UserError(f"{package} is needed {why}, and is not here: pip install {package}")


@contextmanager
def quiet() -> Generator[None]:
    """Without the libraries' own warnings of their insides."""
    with warnings.catch_warnings(action="ignore"):
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
