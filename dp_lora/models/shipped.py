"""Names, shapes and operations of the networks that the shipped configs make, counted beforehand.

A dry run without a base would build the networks to count them, which takes torch, diffusers and ten seconds. A test
counts all of these files anew.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dp_lora.config.schema import Config
from dp_lora.files import digest_value, read_json
from dp_lora.models.operations import Operations

FOLDER = Path(__file__).parent / "counted"
LENGTH = {"batch_size", "epochs", "lr"}  # of a training: they change no network


@dataclass(frozen=True)
class Counted:
    """A base before it is made."""

    denoiser: dict[str, tuple[int, ...]]  # shapes by tensor, such as "conv_in.weight"
    vae: dict[str, tuple[int, ...]]
    operations: Operations


def file_of(config: Config) -> Path:
    """The file with the counts of the config's networks, named by all that these are built from."""
    trained = (asdict(config.autoencoder), asdict(config.ldm))
    networks = [{key: value for key, value in section.items() if key not in LENGTH} for section in trained]
    parts = [*networks, config.public.channels, config.public.size]
    return FOLDER / f"{digest_value(parts)[:16]}.json"


def counted_before(config: Config) -> Counted | None:
    """The counts of the config's networks; None where no shipped config has these."""
    path = file_of(config)
    if not path.exists():
        return None
    found: dict[str, Any] = read_json(path)
    shapes = [{name: tuple(shape) for name, shape in found[part].items()} for part in ("denoiser", "vae")]
    return Counted(shapes[0], shapes[1], Operations(**found["operations"]))
