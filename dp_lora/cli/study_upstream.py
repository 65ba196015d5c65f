"""What the members of a study begin with: base and pictures, made once for all, and their digests."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp_lora.cli.common import relative
from dp_lora.cli.finetuning import resolve
from dp_lora.cli.pipeline import absent, are_up_to_date, bring_up_to_date
from dp_lora.cli.pipelines import (
    RUNS,
    base_folder,
    from_outside,
    pipeline_of,
    private_data,
    public_data,
    require,
)
from dp_lora.config import IN_CLONE, Config, flatten
from dp_lora.errors import InputError
from dp_lora.files import digest_file, digest_value
from dp_lora.study.grid import Grid
from dp_lora.study.place import Place
from dp_lora.tracking.provenance import param_text

if TYPE_CHECKING:
    from dp_lora.study.costs import Starts

SHARED = ("public", "checkpoint", "autoencoder", "ldm")  # sections that a base of ours is made of


def starts_of(found: Sequence[Place]) -> "Starts":
    """What each member's fine-tuning begins with, by the member's number."""
    return {place.number: resolve(place.config, remade=True) for place in found}


def distinct(found: Iterable[Place]) -> list[Config]:
    """One configuration for each experiment of the members."""
    first: dict[str, Config] = {}
    for place in found:
        first.setdefault(place.member.config, place.config)
    return list(first.values())


def needed(config: Config) -> list[Path]:
    """Folders that a member's stages read: base, private pictures, and public pictures unless the base is imported."""
    public = [] if config.checkpoint.folder else [public_data(config)]
    return [*public, base_folder(config), private_data(config)]


def inputs_of(found: Sequence[Place]) -> dict[str, dict[str, str]]:
    """Digests of base and private pictures by experiment, for the members' records. InputError where one is missing."""
    return {config.experiment.name: _inputs(config) for config in distinct(found)}


def _inputs(config: Config) -> dict[str, str]:
    """Digests of a member's base and private pictures, for its record; they tell nobody else which pictures."""
    from dp_lora.models.info import model_digest
    from dp_lora.operator_key import keyed_digest

    base, data = base_folder(config), private_data(config)
    if missing := absent(*needed(config)):
        raise InputError(
            f"{', '.join(map(relative, missing))}: missing; the study itself makes them, before its members"
        )
    pictures = keyed_digest(RUNS, ["study", digest_file(data / "metadata.parquet")])
    return {"base": model_digest(base), "pictures": pictures}


def is_made_of(place: Place, inputs: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether the member is done, with these base and pictures."""
    record = place.read()
    return record.inputs == inputs[place.member.config] and place.is_done(record)


def make_upstream(grid: Grid, found: Sequence[Place], environment: Mapping[str, str]) -> None:
    """Make base and pictures of all members once, by DVC: several members must not make them at once."""
    for config, folders in _upstream(found):
        bring_up_to_date(config, _common(grid), environment, *folders, tied=True)


def is_upstream_made(grid: Grid, found: Sequence[Place]) -> bool:
    """Whether base and pictures of all members are up to date."""
    return all(are_up_to_date(config, _common(grid), *folders) for config, folders in _upstream(found))


def _upstream(found: Sequence[Place]) -> Iterator[tuple[Config, list[Path]]]:
    """The folders that DVC makes for all members, each once, with the configuration that makes them."""
    made: dict[Path, tuple[str, str]] = {}
    for config in distinct(found):
        wanted = [path for path in needed(config) if path not in from_outside(config)]
        if not IN_CLONE:
            require(config, wanted)
            continue
        own = pipeline_of(config).made
        values = {key: param_text(value) for key, value in flatten(config).items() if key.split(".")[0] in SHARED}
        settings = digest_value(values)
        todo = []
        for path in wanted:
            shared = relative(path) in own
            if shared and path in made:
                if made[path][1] != settings:
                    raise InputError(
                        f"{made[path][0]} and {config.experiment.name}: need different bases in {relative(path)}; "
                        "make a study of each"
                    )
                continue
            if shared or path == private_data(config):
                todo.append(path)
                made[path] = (config.experiment.name, settings)
        if todo:
            yield config, todo


def _common(grid: Grid) -> dict[str, str]:
    """Settings that all members have in common, as they would be typed."""
    first, *others = (member.settings for member in grid.members)
    same = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
    return {"overrides": " ".join(f"{key}={text}" for key, text in same.items())} if same else {}
