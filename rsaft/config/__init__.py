"""A run's settings: YAML files, overlays and `key=value` become frozen dataclasses, and those become a Trainer."""

from rsaft.config.sections import Custom, Model, Plain, Prompts, TestbedReward
from rsaft.config.settings import (
    TYPES,
    RunConfig,
    build_trainer,
    json_schema,
    load_config,
    to_dict,
    validate,
)

__all__ = [
    "TYPES",
    "Custom",
    "Model",
    "Plain",
    "Prompts",
    "RunConfig",
    "TestbedReward",
    "build_trainer",
    "json_schema",
    "load_config",
    "to_dict",
    "validate",
]
