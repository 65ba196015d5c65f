"""Write the datasets that a config names: public pictures to pretrain on, private ones to fine-tune on."""

from collections.abc import Iterator
from pathlib import Path

from dp_lora.config import Config
from dp_lora.data import folder as own_folder
from dp_lora.data import letters, mnist5k
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.progress import progress


def prepare_public(config: Config, folder: Path, events: Events) -> None:
    """Write the public dataset (config.public) to `folder`, whole or not at all; drawn from experiment.seed."""
    public = config.public
    if public.source != "letters":
        raise InputError(f"public.source={public.source}: must be letters")
    pictures = letters.letter_pictures(public.n, public.classes, config.experiment.seed, public.size, public.channels)
    shown = progress(pictures, desc="letters", total=public.n)
    source = {"name": "letters", "seed": config.experiment.seed, **letters.FONTS_SOURCE}
    write_dataset(folder, shown, source, public.size, public.channels, packed=True)
    events.message(f"letters: written to {folder}")


def prepare_private(config: Config, folder: Path, events: Events) -> None:
    """Write the private dataset (config.data) to `folder`, whole or not at all.

    A user's own pictures become PNG files, the others one packed file. Raises InputError that names the bad picture,
    or the part of the config that the source cannot serve.
    """
    data = config.data
    by_person = config.privacy.unit == "person"
    if by_person and data.source != "folder":
        raise InputError(f"privacy.unit=person: the source {data.source} knows no persons; set privacy.unit=picture")
    pictures, source = _private_source(config, by_person)
    packed = data.source != "folder"  # never by the number of pictures, which is private
    write_dataset(folder, pictures, {"name": data.source, **source}, data.size, data.channels, packed)
    events.message(f"{data.source}: written to {folder}")


def _private_source(config: Config, by_person: bool) -> tuple[Iterator[Picture], dict]:
    data = config.data
    if data.source == "mnist5k":
        return mnist5k.mnist_pictures(data.classes, data.size, data.channels), mnist5k.SOURCE
    if data.source == "digits":
        seed = config.experiment.seed
        source = {"seed": seed, **letters.FONTS_SOURCE}
        return letters.digit_pictures(data.classes, seed, data.size, data.channels), source
    if data.source == "folder" and data.path:
        path = Path(data.path)
        return own_folder.folder_pictures(path, data.classes, data.size, data.channels, by_person), own_folder.SOURCE
    raise InputError(f"data.source={data.source}: must be mnist5k, digits, or folder with data.path")
