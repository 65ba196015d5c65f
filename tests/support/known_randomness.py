"""Randomness that a test knows."""

import hashlib

from dp_lora.privacy.randomness import Randomness


class Known(Randomness):
    """Fresh to the step, known to the test, which counts what is drawn."""

    def __init__(self):
        super().__init__("run")
        object.__setattr__(self, "asked", [])

    def _bits(self, stream, step):
        self.asked.append(stream)
        return hashlib.sha256(f"{stream}|{step}".encode()).digest()
