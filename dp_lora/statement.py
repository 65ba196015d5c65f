"""The privacy statement that lies in every adapter folder, read back; light, so that commands print it at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_lora.errors import InputError
from dp_lora.files import read_json
from dp_lora.privacy.plan import PUBLISHED

# names under which a run with the published accounting reports its numbers in place of epsilon
EPSILONS = ("claimed_epsilon", "bounded_epsilon")


def privacy_tag(statement: Mapping[str, Any]) -> str:
    """Tag of a run that made or used an adapter with this statement: private-dp, none or published-no-guarantee."""
    if statement["private"]:
        return "private-dp"
    return "published-no-guarantee" if statement.get("accounting") == PUBLISHED else "none"


def read_privacy(folder: Path) -> dict[str, Any]:
    """privacy.json of an adapter folder."""
    try:
        return read_json(folder / "privacy.json")
    except (OSError, ValueError):
        raise InputError(f"{folder}: has no readable privacy.json; name a release/ or not-private/ folder") from None
