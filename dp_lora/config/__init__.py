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
from dp_lora.config.paths import ROOT, relative
from dp_lora.config.schema import Config
from dp_lora.config.stages import PARAMETERS, STAGES

__all__ = [
    "PARAMETERS",
    "ROOT",
    "STAGES",
    "Config",
    "config_names",
    "filed",
    "flatten",
    "load",
    "read_resolved",
    "relative",
    "resolved_yaml",
    "write_resolved",
]
