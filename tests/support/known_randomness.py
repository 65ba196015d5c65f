"""Randomness that a test can compute."""

import hashlib

from dp_lora.privacy.randomness import Randomness


class Known(Randomness):
    """Randomness that is fresh to the step and known to the test; `asked` lists the streams that were drawn."""

    def __init__(self):
        super().__init__("run")
        object.__setattr__(self, "asked", [])

    def _bits(self, stream, step):
        self.asked.append(stream)
        return hashlib.sha256(f"{stream}|{step}".encode()).digest()
