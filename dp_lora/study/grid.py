"""A study's YAML as its members: one experiment with one seed each, in the order of the file, each once."""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dp_lora.config import PARAMETERS, ROOT, Config, flatten, load
from dp_lora.config.words import did_you_mean, split_overrides
from dp_lora.errors import InputError
from dp_lora.files import PACKAGE, digest_value
from dp_lora.study.result import Member
from dp_lora.tracking.provenance import override_text, param_text

FOLDER = "configs/studies"
OWN = ROOT / FOLDER
SHIPPED = PACKAGE / FOLDER  # in a clone the same folder
SEED = "experiment.seed"
SHORT = {name: key for name, key in PARAMETERS.items() if key != SEED}  # `seeds` sets the seed
KEYS = ("title", "config", "seeds", "settings", "groups", "audit")
GROUP_KEYS = ("name", "config", "seeds", "settings", "grid")
# sections that make base and pictures: members share both, so no member may set its own
UPSTREAM = ("public", "checkpoint", "autoencoder", "ldm", "model", "data", "huggingface")
OF_THE_PLAN = ("data.n_public",)  # a number that is stated: no picture depends on it
IN_NAMES = ("experiment.name", "experiment.description")  # of a config: no result depends on them


@dataclass(frozen=True)
class Grid:
    """What a study asks for."""

    name: str
    title: str
    members: tuple[Member, ...]
    audit: tuple[float, ...] = ()  # target epsilons whose plans are audited, once each
    overrides: str = ""  # what the user typed for all members


def study_names() -> list[str]:
    """Names of the studies that can be run: the shipped ones, and those in configs/studies/ of the present project."""
    return sorted({path.stem for folder in (SHIPPED, OWN) for path in folder.glob("*.yaml")})


def read_study(name: str, overrides: str = "") -> Grid:
    """The members of a study; `overrides` (section.key=value, blanks between) hold for all of them.

    Raises InputError, one line, for an unknown study or key and for settings that no config takes.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or ".." in name:
        raise InputError(f"study={name!r}: must be the name of a study in {FOLDER}/, such as mnist5k")
    if name not in study_names():
        there = f"; there are {', '.join(study_names())}"
        raise InputError(f"study={name}: no such study{did_you_mean(name, study_names()) or there}")
    shown = f"{FOLDER}/{name}.yaml"
    path = OWN / f"{name}.yaml"
    try:
        text = (path if path.exists() else SHIPPED / path.name).read_text(encoding="utf-8")
        loaded = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{shown}: cannot be read: {' '.join(str(error).split())}") from None
    return _grid(name, shown, _mapping(loaded, shown, KEYS), overrides)


def config_of(member: Member) -> Config:
    """The resolved configuration of a member, resolved once in a process. Raises InputError as `load`."""
    return _resolved(member.config, overrides_of(member))


@functools.cache  # plan, costs and report of a study each ask for it
def _resolved(config: str, overrides: str) -> Config:
    return load(config, {}, overrides, stage="main")


def overrides_of(member: Member) -> str:
    """A member's settings, its seed among them, as overrides."""
    settings = dict(member.settings) | {SEED: str(member.seed)}
    return " ".join(f"{key}={value}" for key, value in settings.items())


def identity(config: Config) -> str:
    """Digest of all settings that decide the result; names and descriptions of experiments do not."""
    return digest_value({key: param_text(value) for key, value in flatten(config).items() if key not in IN_NAMES})


def _grid(name: str, shown: str, content: Mapping[str, Any], overrides: str) -> Grid:
    groups = content.get("groups")
    if not isinstance(groups, list) or not groups:
        raise InputError(f"{shown}: groups: must be a list of groups of settings")
    common = _settings(content.get("settings", {}), f"{shown}: settings")
    common |= _typed(overrides)
    seeds = _seeds(content.get("seeds", [0]), f"{shown}: seeds")
    found: dict[str, Member] = {}
    parsed = [_mapping(group, f"{shown}: groups[{n}]", GROUP_KEYS) for n, group in enumerate(groups, 1)]
    several = len({config for group in parsed for config in _configs(group, content)}) > 1
    for number, group in enumerate(parsed, 1):
        where = f"{shown}: groups[{number}]"
        for member in _members(group, content, common, seeds, several, where):
            try:
                config = config_of(member)
            except InputError as error:
                raise InputError(f"{where}: {member.name}: {error}") from None
            # experiments that differ in their names alone are one
            found.setdefault(identity(config), member)
    title = content.get("title", name)
    if not isinstance(title, str):
        raise InputError(f"{shown}: title: must be a text")
    return Grid(name, title, tuple(found.values()), _epsilons(content.get("audit", []), f"{shown}: audit"), overrides)


def _members(
    group: Mapping[str, Any],
    content: Mapping[str, Any],
    common: Mapping[str, str],
    seeds: Sequence[int],
    several: bool,
    where: str,
) -> Iterator[Member]:
    name = group.get("name", "")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: name: must name the comparison, such as epsilon")
    fixed = _written(group.get("settings", {}), f"{where}: settings")
    grid = group.get("grid", {})
    if not isinstance(grid, dict):
        raise InputError(f"{where}: grid: must be keys, each with a list of values")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: grid: {key}: must be a list of values")
    own = _seeds(group["seeds"], f"{where}: seeds") if "seeds" in group else seeds
    configs = _configs(group, content)
    if not configs:
        raise InputError(f"{where}: config: must name an experiment in configs/, here or at the head of the study")
    for config, *values in itertools.product(configs, *grid.values()):
        point = fixed | _written(dict(zip(grid, values, strict=True)), f"{where}: grid")
        chosen = {SHORT.get(key, key): text for key, text in point.items()}
        _refuse_upstream(chosen, where)
        for seed in own:
            words = [config] if several else []
            words += [f"{key}={text}" for key, text in point.items()]
            yield Member(" ".join([*words, f"seed={seed}"]), config, dict(common) | chosen, seed, name)


def _refuse_upstream(chosen: Mapping[str, str], where: str) -> None:
    for key in chosen:
        if key.split(".")[0] in UPSTREAM and key not in OF_THE_PLAN:
            raise InputError(
                f"{where}: {key}: all members share one base model and its pictures; set it in settings at the head of "
                "the study"
            )


def _configs(group: Mapping[str, Any], content: Mapping[str, Any]) -> list[str]:
    named = group.get("config", content.get("config", []))
    return [str(name) for name in (named if isinstance(named, list) else [named])]


def _mapping(value: Any, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be keys with values: {', '.join(known)}")
    for key in value:
        if key not in known:
            guess = did_you_mean(str(key), known)
            raise InputError(f"{where}: {key}: unknown key{guess or '; there are ' + ', '.join(known)}")
    return value


def _settings(value: Any, where: str) -> dict[str, str]:
    return {SHORT.get(key, key): text for key, text in _written(value, where).items()}


def _written(value: Any, where: str) -> dict[str, str]:
    """Settings under the names that the file has, each value as an override takes it."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be keys with values")
    for key in value:
        if str(key) in ("seed", SEED):
            raise InputError(f"{where}: {key}: is set by seeds")
        if "." not in str(key) and key not in SHORT:
            guess = did_you_mean(str(key), SHORT) or f"; there are {', '.join(SHORT)}, and section.key of any key"
            raise InputError(f"{where}: {key}: unknown key{guess}")
    # YAML's .inf and the word inf are one
    return {str(key): "inf" if item == math.inf else override_text(item) for key, item in value.items()}


def _typed(overrides: str) -> dict[str, str]:
    found = {}
    for item in split_overrides(overrides):
        key, separator, value = item.partition("=")
        if not separator:
            raise InputError(f"overrides: {item!r}: must be section.key=value, blanks between, such as train.lr=0.02")
        if key == SEED:
            raise InputError(f"overrides: {item}: the study's own file says which seeds")
        found[key] = value
    return found


def _seeds(value: Any, where: str) -> list[int]:
    if (
        not isinstance(value, list)
        or not value
        or any(isinstance(one, bool) or not isinstance(one, int) for one in value)
    ):
        raise InputError(f"{where}: must be a list of whole numbers, such as [0, 1, 2]")
    return value


def _epsilons(value: Any, where: str) -> tuple[float, ...]:
    try:
        found = tuple(float(one) for one in value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: must be a list of target epsilons, such as [1, 10]") from None
    if any(not 0 < eps < math.inf for eps in found):
        raise InputError(f"{where}: must be epsilons above 0 and below inf, which claims nothing to refute")
    return found
