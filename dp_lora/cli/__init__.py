"""What the commands share: their parameters, one-line errors, pipelines, the tracked run and what it keeps."""

import os

# Set before torch is imported. OpenMP's threads that sleep at once wake up late: 35% slower on an idle machine. Threads
# that spin without a limit take the cores from other programs. A short spin is near the best on both.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
