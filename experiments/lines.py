"""The comparisons of experiments.line: each command as it is typed, but for where it writes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    teacher: str
    students: dict[str, tuple[str, ...]]
    """Name -> its command, or several commands, each of which starts from the one before."""
    compare: str
    seeds: int = 1
    """How often each student is trained, by another seed each time."""


# Every method at a fifth of the teacher's images: 204,800 gradients of an image.
FROM_DATA = "--iterations 3200 --batch-size 64 --learning-rate 1e-3"
DIGITS = Line(
    teacher="teachers.ddpm --iterations 4000",
    students={
        "cd": (
            "distill.consistency --mode cd --iterations 800 --batch-size 256 --learning-rate 4e-3",
        ),
        "progressive": (
            "distill.progressive --solver euler --start-steps 64 --rounds 8 4 2 1 --batch-size 64 "
            "--round-iterations 500 600 900 1200",
        ),
        "ect": ("distill.consistency --mode ect --solver heun --iterations 800",),
        "midtraining-scm": (
            "distill.midtraining --iterations 650 --batch-size 256",
            "distill.consistency --mode scm --iterations 150 --learning-rate 1e-4",
        ),
        "ict": (f"distill.consistency --mode ict {FROM_DATA}",),
        "ct": (f"distill.consistency --mode ct {FROM_DATA}",),
    },
    compare="eval.compare --no-times --solvers ddim unipc --num-images 5000 --long-images 5000 "
    "--seeds 0 --likelihood 1024",
    seeds=3,
)

# A network of 0.7 M weights on patches of 2x2 pixels, for 2 CPU cores and a C++ compiler; every
# student at a fifth of the teacher's 1,280,000 images.
BATCHES_OF_128 = "--iterations 2000 --batch-size 128 --learning-rate 1e-3 --warmup 50"
BATCHES_OF_64 = "--iterations 4000 --batch-size 64 --learning-rate 1e-3 --warmup 50"
FASHION_CPU = Line(
    teacher="teachers.ddpm --data fashion-mnist --width 32 --multipliers 1 2 --blocks 1 "
    "--attention --patch 2 --iterations 10000 --batch-size 128 --learning-rate 1e-3 --warmup 200 "
    "--ema 0.999 --compile",
    students={
        "cd": (f"distill.consistency --mode cd {BATCHES_OF_128} --num-angles 32 --compile",),
        "cd-frechet": (
            f"distill.consistency --mode cd --frechet 3 {BATCHES_OF_128} --num-angles 32 --compile",
        ),
        "multistep": (
            f"distill.consistency --mode cd --segments 2 {BATCHES_OF_128} --num-angles 32 "
            "--compile",
        ),
        "progressive": (
            "distill.progressive --solver heun --start-steps 24 --rounds 4 2 1 --batch-size 64 "
            "--round-iterations 2400 700 900 --learning-rate 1e-3 --compile",
        ),
        "ect": (f"distill.consistency --mode ect --solver heun {BATCHES_OF_128} --compile",),
        "midtraining-scm": (
            "distill.midtraining --iterations 1640 --batch-size 128 --learning-rate 1e-3 --compile",
            "distill.consistency --mode scm --iterations 360 --batch-size 128 "
            "--learning-rate 1e-4 --warmup 20",
        ),
        "ict": (f"distill.consistency --mode ict {BATCHES_OF_64} --compile",),
        "ct": (f"distill.consistency --mode ct {BATCHES_OF_64} --compile",),
    },
    compare="eval.compare --steps 1,2,4,8,10,50 --solvers ddim unipc --batch-size 64 "
    "--num-images 1024 --long-images 1024 --seeds 0 1 --likelihood 128 --compile",
)

# Half of that budget, not compiled, for any two cores; more images a row.
HALF = "--iterations 1000 --batch-size 128 --learning-rate 1e-3 --warmup 50"
FASHION_HALF = Line(
    teacher="teachers.ddpm --data fashion-mnist --width 32 --multipliers 1 2 --blocks 1 "
    "--attention --patch 2 --iterations 5000 --batch-size 128 --learning-rate 1e-3 --warmup 200 "
    "--ema 0.999",
    students={
        "cd": (f"distill.consistency --mode cd {HALF} --num-angles 32",),
        "cd-frechet": (f"distill.consistency --mode cd --frechet 3 {HALF} --num-angles 32",),
        "progressive": (
            "distill.progressive --solver heun --start-steps 24 --rounds 4 2 1 --batch-size 64 "
            "--round-iterations 1200 350 450 --learning-rate 1e-3",
        ),
        "ect": (f"distill.consistency --mode ect --solver heun {HALF}",),
    },
    compare="eval.compare --no-times --steps 1,2,4,8,16 --solvers ddim unipc --num-images 3000 "
    "--no-long --likelihood 0",
)

# One GPU: meant for 20 minutes. Nothing here has been timed on a GPU yet.
FASHION_GPU = Line(
    teacher="teachers.ddpm --data fashion-mnist --iterations 20000 --learning-rate 1e-3 --compile",
    students={
        "cd": ("distill.consistency --iterations 4000 --learning-rate 1e-3",),
        "cd-frechet": ("distill.consistency --frechet 3 --iterations 4000 --learning-rate 1e-3",),
        "progressive": (
            "distill.progressive --rounds 8 4 2 1 --batch-size 128 --learning-rate 5e-4 "
            "--round-iterations 1200 1500 2300 3000",
        ),
        "ect": ("distill.consistency --mode ect --solver heun --iterations 4000",),
        "midtraining-scm": (
            "distill.midtraining --iterations 3200 --compile",
            "distill.consistency --mode scm --iterations 800",
        ),
    },
    compare="eval.compare --num-images 4096 --seeds 0 --compile --sweep",
)

# One GPU for a night, with three seeds of every student.
FASHION_NIGHT = Line(
    teacher="teachers.ddpm --data fashion-mnist --iterations 200000 --compile",
    students={
        "cd": ("distill.consistency --iterations 40000 --compile",),
        "cd-frechet": ("distill.consistency --frechet 3 --iterations 40000 --compile",),
        "progressive": (
            "distill.progressive --rounds 8 4 2 1 --batch-size 128 "
            "--round-iterations 12000 15000 23000 30000 --compile",
        ),
        "ect": ("distill.consistency --mode ect --solver heun --iterations 40000 --compile",),
        "ict": ("distill.consistency --mode ict --iterations 40000 --num-angles 1280 --compile",),
        "midtraining-scm": (
            "distill.midtraining --iterations 32000 --compile",
            "distill.consistency --mode scm --iterations 8000",
        ),
    },
    compare="eval.compare --seeds 0 1 --compile --sweep",
    seeds=3,
)

LINES = {
    "digits": DIGITS,
    "fashion-mnist-cpu": FASHION_CPU,
    "fashion-mnist-half": FASHION_HALF,
    "fashion-mnist-gpu": FASHION_GPU,
    "fashion-mnist-night": FASHION_NIGHT,
}
