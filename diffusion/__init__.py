"""What every part of the suite shares: the circle, schedules, networks, data, training.

Every package of the suite imports this one first, for what must be set before torch is loaded.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("diffusion", "teachers", "students", "distill", "eval")


class Beside:
    """Finds the suite's parts beside this one: `python -m` would look in the current folder first,
    and run a user's students.py there in the part's place."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in PARTS else None


sys.meta_path.insert(0, Beside)

# Where a standard stream is closed, the next file that is opened would take its number, and what a
# library prints would be written into it.
for number in range(3):
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the least free number, which is this one
os.environ.pop("MPLBACKEND", None)  # no window is opened, and Jupyter's backend is not everywhere

# How long an idle OpenMP thread spins before it sleeps, in turns of libgomp's loop. Its own default
# is for minutes: where another program wants a core, each of a layer's threads then waits for the
# one that was put aside. A user's own setting of either name stands.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"
