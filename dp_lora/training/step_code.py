"""The digest of the code of a private step. No network is imported for it: a study asks for it and runs no step."""

from dp_lora.sources import digest_code

# entry modules of a private step and of its inputs; these and all their imports are its code
PRIVATE_STEP = ("training/finetune.py", "data/latents.py", "models/folder.py")


def code_digest() -> str:
    """SHA-256 over the sources that a private step runs: a repaired step must not vouch for an older one's results."""
    return digest_code(*PRIVATE_STEP)
