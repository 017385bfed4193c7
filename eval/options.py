"""What eval.compare can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from diffusion.config import check_compiler
from diffusion.console import UserError, at_least
from diffusion.folders import check_file
from diffusion.noise import check_seed
from diffusion.plan import MOST_STEPS
from diffusion.samplers import SOLVERS
from diffusion.schedules import check_shift
from eval.measure.search import SEED


@dataclass(frozen=True)
class Options:
    """Say in one table what each student, and the teacher by each solver, costs in quality and in
    time.

    What is measured stays in results.jsonl and is not measured again. Under `accelerate launch` the
    processes share the images out.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/digits"),)
    """What to compare: runs, checkpoints, folders that hold runs, or another maker's model, as
    diffusers:PATH. What others made joins the table: the rows of results.jsonl files, a folder of
    images, an .npz (uint8 `images` or `arr_0`, N x H x W x C), or an .onnx file that makes images
    from normal noise."""
    onnx_range: tuple[float, float] = (-1.0, 1.0)
    """Black and white in the floats of an .onnx generator; one that makes uint8 needs none."""
    steps: str | None = None
    """Network calls for each image to compare at, such as 1,2,4,8. The teacher's own steps are
    measured as well. If left out: each student's own, and for the teacher's solvers 1 to 32."""
    long: bool = True
    """Measure the teacher at its own 1000 steps too, by far the slowest row, over which the
    speed-ups of the others are. If no solver's row can stand in for it in the ratios, a row of the
    last solver at 32 calls is added."""
    solvers: tuple[str, ...] = ("ddim", "dpm-solver++", "unipc")
    """Samplers that need no training, by which the teacher is compared. Others are heun, truncated,
    ancestral, stochastic and predictor-corrector."""
    shifts: tuple[float, ...] = ()
    """Shifts to compare, which say where the solvers' steps are, in place of the teacher's own (see
    teachers.ddpm --shift)."""
    guidance: tuple[float, ...] = ()
    """Guidance weights to compare, in place of each checkpoint's own; 1 is none. Models keep their
    own that have no classes or were not trained for any of these, and so does the row of a
    teacher's own 1000 steps."""
    num_images: int | None = None
    """Images that each row's quality is measured on, for each seed. It must be above the number of
    features. If left out: as many as in this folder so far, else 10,000, or 50,000 on a GPU; where
    the rows then took more than a minute each, 5,000, 2,000 or 1,000."""
    long_images: int | None = None
    """Images for each seed of a teacher's own plan of more than 100 steps, which takes by far the
    longest. If they are fewer than --num-images, the others' ratios are to the teacher's best other
    row of 16 steps or more. If left out, in whole batches: a twentieth of --num-images, but at
    least 512 and more than the features."""
    likelihood: int = 64
    """Held-out images on which a teacher's bits per dimension are measured. Each costs about 200
    network calls. 0: none."""
    search_steps: tuple[int, ...] = ()
    """Step counts at which to search where consistency students should restart. The table's figures
    come from other noise than the search's."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the noise. With several, the table shows the spread over them."""
    batch_size: int = 256
    """Images that a network makes at a time, for quality and for images/s."""
    features: str | None = None
    """The features that quality is measured on: classifier (one of the data, trained once), random
    (an untrained network), inception (fid), efficientnet-lite0 (trained on ImageNet, from a Python
    package), dinov2:FOLDER or clip:FOLDER (a network that transformers' save_pretrained wrote), or
    your own network: an .onnx file, your own function as module:PACKAGE.MODULE:FUNCTION, or with
    --trust a TorchScript .pt or torch.export .pt2 file. Of several, such as
    classifier,efficientnet-lite0, the first makes the table's metric; the distances by the others
    are further figures, with one ratio over all. If left out: classifier for digits and
    fashion-mnist; for other data inception where its weights are on this machine, else
    efficientnet-lite0."""
    trust: bool = False
    """Load a .pt or .pt2 file of --features, or a model as edm:FILE.pt2. Such a file can run any
    code of its maker on this machine, as a program can: trust one only if you made it or know who
    did."""
    inception: Path | None = None
    """Where clean-fid's weights are: the file inception-2015-12-05.pt or its folder. If left out:
    the cache, or downloaded to it."""
    reference: Path | None = None
    """An .npz of saved statistics (mu, sigma), as clean-fid, EDM and pytorch-fid write them: what
    the metric is a distance to, in place of the real images' own. Without a run and without --data
    they are all that is known of the real images, and there are no further figures."""
    write_reference: Path | None = None
    """Write such statistics of the real images to this .npz, by the first of --features."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the networks, for all rows. auto: the faster one on this machine."""
    compile: bool = False
    """Compile the networks by torch.compile. The table shows the first call's time apart."""
    sweep: bool = False
    """Time every row at larger and larger batches too, up to its best images/s or out of memory."""
    times: bool = True
    """Time the rows. Without times, rows of several machines may share a table."""
    tried: tuple[str, ...] = ()
    """How many settings each method was tuned over before this comparison, its final ones among
    them, as METHOD=N: `teacher=11 consistency-cd=11 progressive=12`. The table of trainings shows
    it, for a method that was tuned longer has had more chances. results.jsonl keeps it."""
    table: Literal["rich", "markdown", "csv", "latex", "jsonl"] = "rich"
    """How to print the table. With any but rich, all else goes to stderr."""
    data: str | None = None
    """The folder that the models' images are in now, if it has moved. Without a run among what is
    compared: the dataset or the folder of real images that all is measured against."""
    data_dir: Path | None = None
    """The folder that holds a named dataset's files."""
    text_encoder: Path | None = None
    """The folder that the encoder of the images' captions is in now, if it has moved."""
    autoencoder: Path | None = None
    """Where the autoencoder of models in latents is now, if it has moved."""
    out: Path | None = None
    """The folder for the results. If left out: compare/ beside the runs."""


def tried(options: Options) -> dict[str, int]:
    """--tried: how many settings each method was tuned over, by its name."""
    pairs = [word.rpartition("=") for word in options.tried]
    for (name, _, number), word in zip(pairs, options.tried, strict=True):
        if not (name and number.isdecimal() and int(number)):
            raise UserError(f"--tried takes METHOD=N, such as consistency-cd=11, got {word!r}")
    return {name: int(number) for name, _, number in pairs}


def check(options: Options) -> None:
    tried(options)
    check_compiler(options.compile)
    for shift in options.shifts:
        check_shift(shift)
    at_least(1, options, "batch_size", "num_images", "long_images")
    at_least(2, options, "search_steps", most=MOST_STEPS)
    at_least(0, options, "likelihood")
    if options.likelihood == 1:
        raise UserError(f"--likelihood must be 0 or at least 2, got {options.likelihood}")
    if unknown := [name for name in options.solvers if name not in SOLVERS]:
        raise UserError(f"--solvers must be of {', '.join(SOLVERS)}, got {unknown[0]}")
    for seed in options.seeds:
        check_seed(seed, "--seeds")
    if SEED in options.seeds:
        raise UserError(f"--seeds must not hold {SEED}, the seed of --search-steps: give another")
    if not options.seeds or len({*options.seeds}) < len(options.seeds):
        got = " ".join(map(str, options.seeds)) or "none"
        raise UserError(f"--seeds takes one or more numbers, each once, e.g. 0 1, got {got}")
    choices = (options.features or "").split(",")
    if len({*choices}) < len(choices) or (options.features and not all(choices)):
        raise UserError(f"--features takes names, each once, got {options.features!r}")
    if options.write_reference:
        check_file(options.write_reference)
    if options.onnx_range[0] >= options.onnx_range[1]:
        low, high = options.onnx_range
        raise UserError(f"--onnx-range takes black and white, such as -1 1, got {low:g} {high:g}")
    if missing := [path for path in options.runs if path.suffix == ".jsonl" and not path.exists()]:
        raise UserError(
            f"there is no file {missing[0]}: expected a results.jsonl that eval.compare wrote"
        )
