"""Code that the commands share: parameters, one-line errors, pipelines, the tracked run and its record."""

import os

# Set before torch is imported. OpenMP threads that sleep at once wake up late: 35% slower on an idle machine. Threads
# that spin without a limit take cores from other programs. A short spin is near the best on an idle and a busy machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
