"""Base file <- experiment's file <- parameters that the user typed <- overrides; then typed, checked and frozen."""

import copy
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dp_lora.config.paths import ROOT
from dp_lora.config.rules import check
from dp_lora.config.schema import Config
from dp_lora.config.stages import PARAMETERS, STAGES
from dp_lora.config.words import did_you_mean, split_overrides
from dp_lora.errors import InputError
from dp_lora.files import PACKAGE, whole_file

CONFIGS = ROOT / "configs"
SHIPPED = PACKAGE / "configs"  # in a clone the same folder as CONFIGS

WHOLE_NUMBERS = ("rank", "k", "batch_size", "seed")


def config_names() -> list[str]:
    """Names of the experiments that can be run: the shipped ones, and those in configs/ of the present project."""
    return sorted({path.stem for folder in (SHIPPED, CONFIGS) for path in folder.glob("*.yaml")} - {"base"})


def _file(name: str) -> Path:
    own = CONFIGS / f"{name}.yaml"
    return own if own.exists() else SHIPPED / own.name


def _read(name: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or ".." in name:
        raise InputError(f"config={name!r}: must be the name of an experiment in configs/, such as mnist5k")
    if name != "base" and name not in config_names():
        there = f"; there are {', '.join(config_names())}"
        raise InputError(f"config={name}: no such experiment{did_you_mean(name, config_names()) or there}")
    try:
        text = _file(name).read_text(encoding="utf-8")
        _parsed(text, f"configs/{name}.yaml")
        return text
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"configs/{name}.yaml: cannot be read: {' '.join(str(error).split())}") from None


@functools.lru_cache(maxsize=64)  # most experiments share the layers below them
def _parsed(text: str, shown: str) -> DictConfig:
    loaded = yaml.safe_load(text)
    if not isinstance(loaded, dict):
        raise InputError(f"{shown}: must be a mapping of sections")
    _refuse_resolvers(loaded, shown)
    for section, keys in loaded.items():
        if section != "extends" and not isinstance(keys, dict):
            raise InputError(f"{shown}: {section}: must be a section of keys")
    # YAML 1.1 reads 1.0e-5 as a number but 1e-5 as a word; OmegaConf's own parser, used here, reads both as numbers
    return cast(DictConfig, OmegaConf.create(text))


def _refuse_resolvers(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_resolvers(str(key), where)
            _refuse_resolvers(item, f"{where}: {key}")
    elif isinstance(value, list):
        for item in value:
            _refuse_resolvers(item, where)
    elif isinstance(value, str) and "${" in value:
        raise InputError(f"{where}={value}: interpolation and resolvers are not allowed; write the value itself")


def _refuse_unset(value: str, where: str) -> None:
    # OmegaConf marks a missing value "???": merging it would silently keep the earlier value
    if "???" in value:
        raise InputError(f"{where}: must be a value")


def _layers(name: str) -> tuple[tuple[str, str], ...]:
    """Name and text of each file that an experiment is made of, base.yaml first."""
    chain: list[tuple[str, str]] = []
    seen: list[str] = []
    current: str | None = name
    while current is not None:
        if current in seen:
            raise InputError(f"configs/{name}.yaml: extends itself ({' -> '.join([*seen, current])})")
        seen.append(current)
        text = _read(current)
        chain.append((current, text))
        current = _parsed(text, f"configs/{current}.yaml").get("extends", None if current == "base" else "base")
    return tuple(chain[::-1])


def _merge(config: DictConfig, layer: DictConfig, shown: str) -> DictConfig:
    try:
        config.merge_with(layer)  # in place: OmegaConf.merge copies the whole config, for each override
        return config
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        cause = str(error).splitlines()[0]
        inside = layer.get(key) if "." not in key else None  # for an unknown section OmegaConf names the section alone
        meant = ".".join([key, *map(str, list(inside)[:1])]) if isinstance(inside, DictConfig) else key
        rule = f"unknown key{did_you_mean(meant, _keys())}" if "not in" in cause else cause
        raise InputError(f"{shown}: {key}: {rule}; the keys and their types stand in configs/base.yaml") from None


@functools.cache
def _keys() -> tuple[str, ...]:
    return tuple(_leaves(OmegaConf.structured(Config)))


def _refuse_overflow(value: str, where: str) -> None:
    try:
        too_large = math.isinf(float(value)) and re.search(r"\d", value) is not None
    except ValueError:
        return  # no number
    if too_large:
        # Reject 1e999: it parses to inf, and eps=inf silently switches privacy off
        raise InputError(f"{where}: the number is too large; inf is written inf")


def _parse_overrides(text: str) -> list[str]:
    items = split_overrides(text)
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", key):
            # a key without its section, or a misspelt one
            guess = "" if "." in key else did_you_mean(f".{key}", {f".{known.partition('.')[2]}" for known in _keys()})
            if not separator and item is not items[0]:  # the rest of a value, probably
                guess = "; a value with blanks stands in quotes: data.prompt='a red apple'"
            raise InputError(
                f"overrides: {item!r}: must be section.key=value, blanks between, such as train.lr=0.02{guess}"
            )
        _refuse_resolvers(value, f"overrides: {key}")
        _refuse_unset(value, f"overrides: {item}")
        _refuse_overflow(value, f"overrides: {item}")
        if key == "experiment.name":
            raise InputError(f"overrides: {item}: an experiment is named by its file in configs/")
    return items


def _as_filed(name: str) -> DictConfig:
    """An experiment as its files say, not yet checked: values that they leave to the user are missing."""
    if name == "base":
        raise InputError(f"config=base: not an experiment; there are {', '.join(config_names())}")
    config = copy.deepcopy(_merged(name, _layers(name)))
    config.experiment.name = name
    return config


@functools.lru_cache(maxsize=64)  # a study resolves an experiment once for each of its members
def _merged(name: str, layers: tuple[tuple[str, str], ...]) -> DictConfig:
    config = OmegaConf.structured(Config)
    for file, text in layers:
        layer = copy.deepcopy(_parsed(text, f"configs/{file}.yaml"))
        layer.pop("extends", None)
        config = _merge(config, layer, f"configs/{name}.yaml")
        # to OmegaConf ??? in a layer says nothing; here it leaves to the user what a layer below has set
        for section, keys in layer.items():
            config[section].update({key: MISSING for key in keys if OmegaConf.is_missing(keys, key)})
    return config


def filed(name: str) -> dict[str, Any]:
    """Every leaf of an experiment under its dotted key, as its files say; '???' where these leave it to the user."""
    return _leaves(_as_filed(name))


def load(
    name: str, parameters: Mapping[str, str | None] | None = None, overrides: str = "", stage: str | None = None
) -> Config:
    """Resolve an experiment.

    `parameters` maps names of PARAMETERS to what the user typed; '' and None mean 'as the config says'. In
    `pretrain_ae` and `pretrain_ldm` batch_size, epochs and lr set that stage's keys. `overrides` is an OmegaConf
    dotlist, separated by blanks. Raises InputError, one line that names key, value and rule.
    """
    config = _as_filed(name)
    typed: dict[str, str] = {}
    keys = PARAMETERS | dict(STAGES[stage].keys if stage else {})
    for parameter, value in (parameters or {}).items():
        if value is None or str(value) == "":
            continue
        key = keys[parameter]
        _refuse_resolvers(str(value), parameter)
        _refuse_unset(str(value), f"{parameter}={value}")
        if not re.fullmatch(r"[A-Za-z0-9.+-]+", str(value), re.ASCII):
            # Python reads 1_0 and digits of other scripts as numbers too
            raise InputError(f"{parameter}={value} ({key}): must be written with plain digits")
        _refuse_overflow(str(value), f"{parameter}={value} ({key})")
        typed[key] = f"{parameter}={value}"
        layer = OmegaConf.create({})
        OmegaConf.update(layer, key, str(value))
        try:
            config = cast(DictConfig, OmegaConf.merge(config, layer))
        except OmegaConfBaseException:
            kind = "a whole number" if parameter in WHOLE_NUMBERS else "a number"
            raise InputError(f"{parameter}={value} ({key}): must be {kind}") from None
    for item in _parse_overrides(overrides):
        if (key := item.partition("=")[0]) in typed:
            raise InputError(f"overrides: {item}: {typed[key]} sets the same key; give one of the two")
        try:
            layer = OmegaConf.from_dotlist([item])
        except (OmegaConfBaseException, yaml.YAMLError):
            raise InputError(f"overrides: {item}: the value cannot be read") from None
        config = _merge(config, layer, f"overrides: {item}")
    if stage and STAGES[stage].needs_private and config.data.source == "none":
        raise InputError(
            f"config={name}: has no private pictures (data.source=none): it makes a base model; name an experiment "
            "that fine-tunes one"
        )
    return _frozen(config, typed)


def _frozen(config: DictConfig, typed: Mapping[str, str]) -> Config:
    check(config, typed)
    return cast(Config, OmegaConf.to_object(config))


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf under its dotted key, in the schema's order; lists as they are."""
    return _dotted(asdict(config))


def _leaves(config: DictConfig) -> dict[str, Any]:
    return _dotted(cast(dict, OmegaConf.to_container(config)))


def _dotted(nested: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, leaves in nested.items() for key, value in leaves.items()}


def resolved_yaml(config: Config) -> str:
    """The whole resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def write_resolved(config: Config, path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(resolved_yaml(config), encoding="utf-8")


def read_resolved(path: Path) -> Config:
    """Read what `write_resolved` wrote, checked again as if typed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded = yaml.safe_load(text)
        if not isinstance(loaded, dict):
            raise InputError(f"{path}: must be a mapping of sections")
        _refuse_resolvers(loaded, str(path))
        config = _merge(OmegaConf.structured(Config), cast(DictConfig, OmegaConf.create(text)), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    return _frozen(config, {})
