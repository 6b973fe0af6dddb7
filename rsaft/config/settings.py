"""The dataclasses of a run file, validated by pydantic here and nowhere else.

The settings of a component are the dataclass beside its code (`DRaFT`, `RSAFT`, `TrainConfig`, ...). A section with a
`type` is one of `TYPES`, or `package.module:Name`: code of the user's own. Importing this module imports no torch.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rsaft.config.files import read_settings
from rsaft.config.messages import did_you_mean, explain, field_names, shown, unknown_key
from rsaft.config.objectives import ParetoTransport
from rsaft.config.sections import KL, TESTBED, WORLDS, Custom, Model, Prompts
from rsaft.errors import ConfigError

if TYPE_CHECKING:
    from rsaft.rdrl.loop import Trainer

TYPES: dict[str, dict[str, str]] = {
    "algorithm": {
        "refl": "rsaft.rdrl.refl:ReFL",
        "draft": "rsaft.rdrl.draft:DRaFT",
        "alignprop": "rsaft.rdrl.alignprop:AlignProp",
        "drtune": "rsaft.rdrl.drtune:DRTune",
    },
    "reward": {
        "testbed": "rsaft.config.sections:TestbedReward",
        "hpsv2": "rsaft.config.rewards:HPSv2",
        "pickscore": "rsaft.config.rewards:PickScore",
        "image_reward": "rsaft.config.rewards:ImageReward",
        "clip_score": "rsaft.config.rewards:CLIPScore",
        "aesthetic": "rsaft.config.rewards:AestheticScore",
        "ict": "rsaft.config.rewards:ICT",
        "hp": "rsaft.config.rewards:HP",
        "mps": "rsaft.config.rewards:MPS",
        "vlm": "rsaft.config.rewards:VLMReward",
        "remote": "rsaft.config.rewards:RemoteReward",
    },
    "objective": {
        "weighted_sum": "rsaft.rdrl.objectives:WeightedSum",
        "hinge": "rsaft.rdrl.objectives:Hinge",
        "softmin": "rsaft.rdrl.objectives:SoftMin",
        "min": "rsaft.rdrl.objectives:Min",
        "conservative": "rsaft.rdrl.objectives:Conservative",
        "log_sigmoid": "rsaft.rdrl.objectives:LogSigmoid",
        "pareto_transport": "rsaft.config.objectives:ParetoTransport",
    },
    "step": {"plain": "rsaft.config.sections:Plain", "rsaft": "rsaft.flatten.rsa_ft:RSAFT"},
}
"""For each kind of component, the built-in types and where their settings are."""

REQUIRED = ("model", "prompts", "algorithm", "rewards", "objective")


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run. `Any` stands for one of the dataclasses of `TYPES`, or Custom."""

    model: Model
    prompts: Prompts
    algorithm: Any
    rewards: Mapping[str, Any]  # name -> what is trained on, through the objective
    objective: Any
    held_out: Mapping[str, Any]  # name -> what is only measured
    step: Any
    train: Any  # a TrainConfig
    kl: KL | None = None  # null: no term
    gauge: Any = None  # a Gauge


def load_config(paths: Sequence[Path], overrides: Sequence[str] = ()) -> RunConfig:
    """The validated settings of YAML files, each laid over those before it, with `key=value` on top.

    Args:
        paths: a complete file first, then overlays.
        overrides: `train.lr=1e-4` and its like; the value is read as YAML.

    Raises:
        ConfigError: in one sentence with the key's path, for anything that is wrong, missing or out of range.
    """
    return validate(read_settings([Path(p) for p in paths], overrides))


def validate(settings: Mapping[str, Any]) -> RunConfig:
    """The settings as dataclasses. Imports the components that they name, but none of the user's own code.

    Raises:
        ConfigError: as `load_config`.
    """
    for key in settings:
        if key not in field_names(RunConfig):
            raise ConfigError(unknown_key("config", key, field_names(RunConfig)))
    for key in REQUIRED:
        if settings.get(key) is None:
            raise ConfigError(f"config.{key}: this section is missing; a run needs {', '.join(REQUIRED)}.")
    model = _checked(Model, settings["model"], "config.model")
    if model.lora is not None:
        model = replace(model, lora=_checked(load_type("rsaft.backbones.lora:LoRA"), model.lora, "config.model.lora"))
    step, held_out, train = (
        {} if settings.get(key) is None else settings[key] for key in ("step", "held_out", "train")
    )
    step = {"type": "plain"} if step == {} else step
    if isinstance(step, Mapping) and step.get("type") == "rsaft":
        step = {"network_dtype": model.dtype} | dict(step)  # RSAFT's log of rounding is about this network
    config = RunConfig(
        model=model,
        prompts=_checked(Prompts, settings["prompts"], "config.prompts"),
        algorithm=_component("algorithm", settings["algorithm"], "config.algorithm"),
        rewards=reward_settings(settings["rewards"], "config.rewards"),
        objective=_component("objective", settings["objective"], "config.objective"),
        held_out=reward_settings(held_out, "config.held_out"),
        step=_component("step", step, "config.step"),
        train=_checked(load_type("rsaft.rdrl.train_config:TrainConfig"), train, "config.train"),
        gauge=_checked(load_type("rsaft.metrics.gauge:Gauge"), _gauge(settings.get("gauge")), "config.gauge"),
        kl=None if settings.get("kl") is None else _checked(KL, settings["kl"], "config.kl"),
    )
    _check_together(config)
    return config


def _gauge(section: Any) -> Any:
    """YAML reads a bare `off` as false."""
    if isinstance(section, Mapping) and section.get("stop") is False:
        return {**section, "stop": "off"}
    return {} if section is None else section


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The settings as they would be written in one complete file; `validate` gives the same config back."""
    result: dict[str, Any] = {}
    for section in fields(config):
        value = getattr(config, section.name)
        if value is None:
            continue
        if isinstance(value, Mapping):
            result[section.name] = {name: _section(entry) for name, entry in value.items()}
        else:
            result[section.name] = _section(value)
    return result


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file, for editors; each key's description is the comment beside it in the code."""
    from rsaft.config.schema import run_schema

    return run_schema()


def build_trainer(config: RunConfig, run: Path) -> Trainer:
    """The Trainer of a run directory: loads the model, the prompts and the rewards, and imports the user's own code.

    Raises:
        ConfigError: if something that the settings name does not exist or does not fit.
    """
    from rsaft.config.assemble import trainer

    return trainer(config, run)


def reward_settings(value: Any, path: str) -> dict[str, Any]:
    """The section `rewards` or `held_out` as name -> settings; nothing is loaded, and no code of the user's imported.

    Args:
        value: what the file holds there.
        path: its key, which begins the errors.

    Raises:
        ConfigError: in one sentence with the key's path.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: a mapping from names to rewards is expected; got {shown(value)}.")
    for name in value:
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_+-]*", name)):
            raise ConfigError(f"{path}: a reward's name has letters, digits, _, + and - in it; got {shown(name)}.")
    return {name: _component("reward", entry, f"{path}.{name}") for name, entry in value.items()}


@functools.cache
def adapter(cls: type) -> TypeAdapter:
    """Validates {"": settings of a `cls`}, and refuses keys that it does not have."""
    # Of a dict that holds the dataclass: pydantic takes settings for a dict and hands them down to dataclasses in it,
    # where the dataclass itself would have to carry them.
    return TypeAdapter(dict[str, cls], config=ConfigDict(extra="forbid", allow_inf_nan=False))  # type: ignore[valid-type]


def load_type(path: str) -> Any:
    """The class at "module:Name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _checked(cls: Any, value: Any, path: str) -> Any:
    try:
        result = adapter(cls).validate_python({"": value})[""]
    except ValidationError as error:
        raise ConfigError(explain(error, cls, value, path)) from error
    _refuse_booleans(value, result, path)
    return result


def _refuse_booleans(found: Any, made: Any, path: str) -> None:
    """Refuse `true` where it became the number 1, as it does in Python."""
    if isinstance(found, bool) and not isinstance(made, bool) and isinstance(made, int | float):
        raise ConfigError(f"{path}: a number is expected; got {str(found).lower()}.")
    if isinstance(found, Mapping):
        for key, value in found.items():
            _refuse_booleans(value, made[key] if isinstance(made, Mapping) else getattr(made, key), f"{path}.{key}")
    elif isinstance(found, list) and isinstance(made, list | tuple):
        for i, (value, item) in enumerate(zip(found, made, strict=True)):
            _refuse_booleans(value, item, f"{path}[{i}]")


def _component(kind: str, value: Any, path: str) -> Any:
    builtin = TYPES[kind]
    choice = f"allowed are {', '.join(builtin)}, or package.module:Name for your own"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: a mapping with a 'type' is expected; got {shown(value)}; {choice}.")
    name = value.get("type")
    if not isinstance(name, str):
        found = f"the type is {shown(name)}" if "type" in value else "the key 'type' is missing"
        raise ConfigError(f"{path}.type: {found}; {choice}.")
    if ":" in name:
        return _checked(Custom, value, path)
    if name not in builtin:
        raise ConfigError(f"{path}.type: there is no {kind} {shown(name)}; {choice}{did_you_mean(name, builtin)}")
    return _checked(load_type(builtin[name]), {key: entry for key, entry in value.items() if key != "type"}, path)


def _check_together(config: RunConfig) -> None:
    """What no section can know alone."""
    if not config.rewards:
        raise ConfigError("config.rewards: at least one reward is needed to train on; got none.")
    if isinstance(config.objective, ParetoTransport):
        _check_transport(config.objective, config)
    elif not isinstance(config.objective, Custom):
        for name in config.objective.weights:
            if name not in config.rewards:
                raise ConfigError(
                    f"config.objective.weights.{name}: there is no such reward; config.rewards has "
                    f"{', '.join(config.rewards)}{did_you_mean(name, config.rewards)}"
                )
        if not any(config.objective.weights.values()):
            raise ConfigError("config.objective.weights: at least one reward needs a weight other than 0.")
    for key, value in (("train", config.prompts.train), ("eval", config.prompts.eval)):
        if value is not None and not value.startswith(TESTBED):
            _check_prompt_file(value, f"config.prompts.{key}")


def _check_transport(objective: ParetoTransport, config: RunConfig) -> None:
    for name in objective.active or ():
        if name not in config.rewards:
            raise ConfigError(
                f"config.objective.active: there is no reward '{name}'; config.rewards has "
                f"{', '.join(config.rewards)}{did_you_mean(name, config.rewards)}"
            )
    if objective.strategy == "online" and config.train.group_size == 1:
        raise ConfigError(
            "config.train.group_size: the online strategy compares the samples of a prompt in an update, and with 1 "
            "there is nothing to compare; raise it."
        )


def _check_prompt_file(value: str, path: str) -> None:
    if "\0" in value or len(value) > 1024 or not Path(value).is_file():
        raise ConfigError(
            f"{path}: there is no file {shown(value)} beside the config file or in the working directory; allowed are "
            f"a .txt, .jsonl, .csv or .tsv file, {' and '.join(f'{TESTBED}{world}' for world in WORLDS)}."
        )


def _section(value: Any) -> dict[str, Any]:
    """A component's dataclass as plain YAML values, its type first."""
    settings = _plain(asdict(value))
    for types in TYPES.values():
        for name, path in types.items():
            if path == f"{type(value).__module__}:{type(value).__qualname__}":
                return {"type": name, **settings}
    return {key: entry for key, entry in settings.items() if not (isinstance(value, Custom) and entry is None)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
