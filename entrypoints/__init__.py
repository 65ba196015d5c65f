"""The commands: each resolves its configuration and its inputs, opens the tracked run and calls what does the work.

A module of a command imports nothing heavy at its head (tests/test_startup.py): torch and the rest are imported where
the work begins, so that help and refusals come at once.
"""

import os

# before torch is imported. Threads that sleep at once wake up late, which cost an idle machine 35%; those that spin as
# long as OpenMP lets them take the cores from whoever shares it: a short while is near the best on both
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
