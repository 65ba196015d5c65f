"""Write the datasets that a config names: public pictures to pretrain on, private ones to fine-tune on."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from dp_lora.config import Config
from dp_lora.config.picture_sources import PRIVATE_SOURCES
from dp_lora.config.schema import Data, Public
from dp_lora.data import emoji, mnist5k, torchvision_sets
from dp_lora.data import folder as own_folder
from dp_lora.data.copies import check_copies
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.metadata_table import Stated
from dp_lora.data.versioned import read_source, unfinished, write_source
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.events import Events
from dp_lora.files import digest_file, digest_value, publish, read_json
from dp_lora.progress import progress

VERSIONED = {**torchvision_sets.SOURCES, **emoji.SOURCES}  # sources that fill a folder below data/


def prepare_public(config: Config, folder: Path, events: Events) -> None:
    """Write the public dataset (config.public) to `folder`, whole or not at all; drawn from experiment.seed."""
    public = config.public
    if public.source in VERSIONED:
        _prepare_versioned(public, folder, events)
        return
    from dp_lora.data import letters  # imports torch: other sources need not wait for it

    pictures = letters.letter_pictures(public.n, public.classes, config.experiment.seed, public.size, public.channels)
    shown = progress(pictures, desc="letters", total=public.n)
    source = {"name": "letters", "seed": config.experiment.seed, **letters.FONTS_SOURCE}
    write_dataset(folder, shown, source, public.size, public.channels, packed=True)
    events.message(f"letters: written to {folder}")


def prepare_private(config: Config, folder: Path, events: Events) -> None:
    """Write the private dataset (config.data) to `folder`, whole or not at all.

    Pictures of a user's folder or a Hugging Face dataset become PNG files, others one packed file. Identical pictures
    are named to the operator or refused, as data.duplicates says. Raises InputError that names the bad picture, or the
    key of the config that the source cannot serve.
    """
    data = config.data
    by_person = config.privacy.unit == "person"
    if by_person and not PRIVATE_SOURCES[data.source].persons:
        raise InputError(f"privacy.unit=person: the source {data.source} knows no persons; set privacy.unit=picture")
    if data.source in VERSIONED:
        _prepare_versioned(data, folder, events)
        return
    if data.source == "huggingface":
        from dp_lora.data.hub import prepare_huggingface

        prepare_huggingface(config, folder, events)
        return
    pictures, source = _private_source(config, events)
    packed = data.source != "folder"  # must not depend on the number of pictures, which is private
    facts = {"name": data.source, **source, "settings": _settings(config)}
    check = partial(check_copies, duplicates=data.duplicates, events=events)
    with private_names(PRIVATE_PICTURE):
        write_dataset(folder, pictures, facts, data.size, data.channels, packed, check, private=True)
    events.message(f"{data.source}: written to {folder}")


def _settings(config: Config) -> str:
    data = config.data
    by_person = config.privacy.unit == "person"  # then the split assigns whole persons
    captions = [data.caption_column] if data.captions else []
    return digest_value([data.source, data.path, list(data.classes), data.size, data.channels, by_person, *captions])


def _stated(config: Config, folder: Path) -> tuple[str | None, str | None, str]:
    """Digest of the settings that the dataset in `folder` was made with, that of the config's own, and their keys."""
    if config.data.source == "huggingface":
        from dp_lora.data.hub import settings_of

        stated, keys = read_source(folder) or {}, "huggingface section, data.classes, data.captions or data.size"
        return stated.get("settings"), settings_of(config), keys
    if config.data.folder is not None:
        return None, None, ""
    keys = "data.source, data.path, data.classes, data.captions, data.size, data.channels or privacy.unit"
    return read_json(folder / "dataset.json")["source"].get("settings"), _settings(config), keys


def check_prepared(config: Config, folder: Path) -> None:
    """Raise InputError where the private dataset in `folder` was made with other settings than `config` has.

    Else a run could be recorded with one data.path and trained on another. A dataset without a record of its settings
    passes. Raises InputError also where the dataset holds identical pictures and `config` refuses them.
    """
    stated, settings, keys = _stated(config, folder) if folder.exists() else (None, None, "")
    if stated is not None and stated != settings:
        raise InputError(
            f"{folder}: was prepared with another {keys}; type the same command with the entry point prepare in its "
            "place, then this one"
        )
    # the dataset may have been prepared with data.duplicates=warn
    if folder.exists() and config.data.duplicates == "refuse":
        check_copies(folder, "refuse", Events())


def _private_source(config: Config, events: Events) -> tuple[Iterator[Picture], dict]:
    data = config.data
    if data.source == "mnist5k":
        return mnist5k.mnist_pictures(data.classes, data.size, data.channels), mnist5k.SOURCE
    if data.source == "digits":
        from dp_lora.data import letters

        return letters.digit_pictures(data.classes, data.size, data.channels), letters.FONTS_SOURCE
    if data.source == "folder" and data.path:
        path, stated = Path(data.path), Stated.of(config)
        return own_folder.folder_pictures(path, stated, data.size, data.channels, events), own_folder.SOURCE
    raise InputError(f"data.source={data.source}: has no private pictures to prepare")


def _prepare_versioned(section: Public | Data, folder: Path, events: Events) -> None:
    """Fill a folder below data/, source.json included, from a source of VERSIONED; keeps an existing folder."""
    name, source = section.source, VERSIONED[section.source]
    key = digest_value([name, list(section.classes), section.size, section.channels, section.mirror_md5])
    private = isinstance(section, Data)
    with unfinished(folder) as part:
        recorded, images = read_source(folder), folder / "images.parquet"
        there = recorded is not None and recorded.get("settings") == key and images.is_file()
        if there and recorded is not None and recorded.get("sha256") == digest_file(images):
            _check_private(section, folder, events)
            events.message(f"{folder}: exists, {source['origin']}")
            return
        counts = {"train": 0, "test": 0}

        def counted(pictures: Iterator[Picture]) -> Iterator[Picture]:
            for picture in pictures:
                counts[picture.split] += 1
                yield picture

        if name in emoji.SOURCES:
            pictures = emoji.emoji_pictures(section)
        else:
            pictures = torchvision_sets.digit_pictures(section, part / "raw", events)
        shown = progress(counted(pictures), desc=name, unit=" images")
        built = part / "dataset"
        with private_names(PRIVATE_PICTURE) if private else nullcontext():
            write_dataset(built, shown, {"name": name, **source}, section.size, section.channels, packed=True)
        if isinstance(section, Public) and counts["train"] != section.n:
            raise InputError(f"public.n={section.n}: {name} has {counts['train']} training pictures of these classes")
        _check_private(section, built, events)
        images = built / "images.parquet"
        facts: dict[str, Any] = {**source}
        if name in torchvision_sets.SOURCES:
            facts["url"] = torchvision_sets.addresses(name, section.mirror)[0]
        facts |= {"counts": counts, "size": images.stat().st_size, "sha256": digest_file(images), "settings": key}
        write_source(built, facts)
        publish(built, folder, private=private)
    events.terminal(f"{folder}: {counts['train']} pictures for training, {counts['test']} for testing")


def _check_private(section: Public | Data, folder: Path, events: Events) -> None:
    if isinstance(section, Data):
        check_copies(folder, section.duplicates, events)
