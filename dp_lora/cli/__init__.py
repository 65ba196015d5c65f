"""What the commands share: their parameters, one-line errors, pipelines, the tracked run and what it keeps."""

import os

# before torch is imported. Threads that sleep at once wake up late, which cost an idle machine 35%; those that spin as
# long as OpenMP lets them take the cores from whoever shares it: a short while is near the best on both
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
