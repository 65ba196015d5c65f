"""The one configuration: a typed schema, one base file, small overrides, checks. Knows nothing else of the project."""

from dp_lora.config.load import (
    config_names,
    filed,
    flatten,
    load,
    read_resolved,
    resolved_yaml,
    write_resolved,
)
from dp_lora.config.paths import DP_LORA, IN_CLONE, PROJECT, ROOT, relative, require_clone, typed_command
from dp_lora.config.schema import Config
from dp_lora.config.stages import PARAMETERS, STAGES

__all__ = [
    "DP_LORA",
    "IN_CLONE",
    "PARAMETERS",
    "PROJECT",
    "ROOT",
    "STAGES",
    "Config",
    "config_names",
    "filed",
    "flatten",
    "load",
    "read_resolved",
    "relative",
    "require_clone",
    "resolved_yaml",
    "typed_command",
    "write_resolved",
]
