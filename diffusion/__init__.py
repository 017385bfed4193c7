"""What every part of the suite shares: the circle, schedules, networks, data, training.

Every package of the suite imports this one first, for what must be set before torch is loaded.
"""

import os

# How long an idle OpenMP thread spins before it sleeps, in turns of libgomp's loop. Its own default
# is for minutes: where another program wants a core, each of a layer's threads then waits for the
# one that was put aside. A user's own setting of either name stands.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"
