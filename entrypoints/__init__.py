"""The commands: each resolves its configuration and its inputs, opens the tracked run and calls what does the work.

`finetune` also encodes the latents and chooses between a private fine-tuning and one without privacy.
"""

import os

# before torch is imported. Threads that sleep at once wake up late, which cost an idle machine 35%; those that spin as
# long as OpenMP lets them take the cores from whoever shares it: a short while is near the best on both
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
