"""The operator's secret key: names made with it from private data tell nobody else anything of the data."""

import hmac
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from dp_lora.files import digest_value, fsync, naming_full_disk

KEY = ".key"  # in runs/: 32 random bytes, mode 0600


def keyed_digest(runs: Path, value: Any) -> str:
    """HMAC-SHA-256 of a JSON-able value under the key in `runs`, made where there is none; 64 hex digits.

    A bare digest of private data would tell whoever has a candidate for them whether it is right.
    """
    return hmac.new(_key(runs), digest_value(value).encode(), "sha256").hexdigest()


def _key(runs: Path) -> bytes:
    key = runs / KEY
    if not key.exists():
        runs.mkdir(parents=True, exist_ok=True)
        own = runs / f"{KEY}.{uuid.uuid4().hex}"
        own.touch(0o600)
        with naming_full_disk(key):
            own.write_bytes(os.urandom(32))
        fsync(own)  # another key would be another folder, with an empty ledger
        with suppress(FileExistsError):
            os.link(own, key)  # of two processes one is first, and both read its key
        own.unlink()
        fsync(runs)
    return key.read_bytes()
