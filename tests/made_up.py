"""Records that nothing measured."""

import hashlib
from dataclasses import replace

from eval.results.records import Record, Timing, Uncertainty

# of scikit-learn's digits, the training images: a report shows those that are the measured ones
DIGITS = "7e4a10b8ab64bd5e1e08f8815901758e7896368a221c648e7744cd1a16e4637a"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record(method="teacher", nfe=8, score=4.0, seconds=0.1, **changes) -> Record:
    """A row: a teacher's own, unless it is given a parent or own_plan=False."""
    steps = changes.get("steps", nfe)
    settings = {
        "run": f"runs/{method}/{nfe}", "method": method, "sha256": sha256(f"{method}-{nfe}"),
        "parent": None, "sampler": "ddim", "steps": nfe, "own_plan": True, "nfe": nfe,
        "angles": [1.5 * i / steps for i in range(steps + 1)], "parameters": 300_000,
        "training": {"iterations": 4321, "images": 276_544, "seconds": 98.6},
        "data": {"name": "digits", "split": "train", "images": 1438, "sha256": DIGITS},
        "metric": "fd-cnn-digits-0123abcd",
        "extractor": {"sha256": "0123abcd" * 8, "accuracy": 0.98},
        "num_images": 100, "seeds": [0, 1], "quality": [0.9 * score, 1.1 * score],
        "floor": [1.0, 3.0], "held_out": {}, "batch_size": 50,
        "environment": {"device": "a device", "precision": "fp32", "torch": "2.6", "threads": 1},
        "timings": [
            Timing(1, first=3 * seconds, seconds=(seconds, seconds, 2 * seconds)),
            Timing(50, seconds=(10 * seconds,) * 3),
        ],
        "conditions": {"date": "2025-01-02T03:04:05+00:00", "clock_mhz": 1234},
    }  # fmt: skip
    return Record(**settings | changes)


def sure(made: Record, variance: float, sign: float = 1.0) -> Record:
    """The record with that variance for each seed's figure, all of it of the noise that rows
    share: with the other sign, they move against each other."""
    blocks = [sign * (variance * 49 / 50) ** 0.5 * (-1) ** i for i in range(50)]
    known = Uncertainty(bias=0.1, first=variance, second=0.0, growth=0.1, influence=blocks)
    return replace(made, uncertainty=[known] * len(made.seeds), floor_error=0.01)
