"""From validated settings to what they describe: loads models, worlds and prompts, and imports the user's own code."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rsaft.config.messages import did_you_mean, shown
from rsaft.config.settings import Custom, Model, Plain, RunConfig, TestbedReward, to_dict
from rsaft.errors import ConfigError
from rsaft.prompts import read_prompts

if TYPE_CHECKING:
    from rsaft.backbones.pipeline import DiffusersBackbone
    from rsaft.rdrl.loop import Trainer
    from rsaft.testbed import Testbed


def trainer(config: RunConfig, run: Path) -> Trainer:
    """The Trainer of a run directory; see `rsaft.config.build_trainer`."""
    from rsaft.rdrl.loop import Trainer
    from rsaft.rdrl.score import plain_step

    # What is the user's own comes first: a mistake there shows before a model of gigabytes is loaded.
    step = component(config.step, "config.step")
    algorithm = component(config.algorithm, "config.algorithm")
    objective = component(config.objective, "config.objective")
    rewards = _rewards(config.rewards, "config.rewards")
    held_out = _rewards(config.held_out, "config.held_out")
    prompts = load_prompts(config.prompts.train, "train")
    return Trainer(
        load_model(config.model, seed=config.train.seed),
        algorithm=algorithm,
        rewards=rewards,
        objective=objective,
        step=plain_step if isinstance(step, Plain) else step,
        prompts=prompts,
        eval_prompts=None if config.prompts.eval is None else load_prompts(config.prompts.eval, "eval"),
        held_out=held_out,
        measures=_measures(config.held_out),
        config=config.train,
        run_dir=run,
        description=yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120),
    )


def load_model(model: Model, *, seed: int) -> DiffusersBackbone:
    """The backbone of a config's section `model`; `seed` is of the adapter's initial values.

    Raises:
        ConfigError: if there is no such model.
    """
    from rsaft.backbones.load import load_backbone

    is_world = model.path.startswith("testbed:")
    return load_backbone(
        str(_world(model.path).path) if is_world else model.path,
        lora=model.lora,
        dtype=model.dtype,
        revision=model.revision,
        variant=model.variant,
        gradient_checkpointing=model.gradient_checkpointing,
        seed=seed,
    )


def load_prompts(source: str, part: str) -> tuple[str, ...]:
    """The prompts of a file, or a world's own; `part` is train or eval."""
    if source.startswith("testbed:"):
        world = _world(source)
        return tuple(world.prompts_train if part == "train" else world.prompts_eval)
    return read_prompts(Path(source)).prompts


def component(settings: Any, path: str) -> Any:
    """A component from its settings: built-in ones are their settings, the user's own are imported.

    Raises:
        ConfigError: if there is no such module or name, its arguments do not fit, or it cannot be called.
    """
    if not isinstance(settings, Custom):
        return settings
    target = _imported(settings.type, f"{path}.type")
    if not callable(target):
        raise ConfigError(f"{path}.type: '{settings.type}' cannot be called: it is {shown(target)}; name a callable.")
    if settings.args is None and not isinstance(target, type):
        return target
    args = dict(settings.args or {})
    try:
        inspect.signature(target).bind(**args)
    except TypeError as error:
        raise ConfigError(f"{path}.args: {settings.type}{inspect.signature(target)}: {error}.") from error
    made = target(**args)
    if not callable(made) and not dataclasses.is_dataclass(made):
        raise ConfigError(f"{path}.type: '{settings.type}' made {shown(made)}, which cannot be called.")
    return made


def _imported(name: str, path: str) -> Any:
    module_name, _, attributes = name.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"{path}: there is no module '{error.name}' in the working directory or among the installed packages; "
                f"{name} is code of your own, so start rsaft where it can be imported."
            ) from error
        raise  # the user's module is there, and lacks something itself
    for attribute in attributes.split("."):
        if attribute not in dir(value):
            raise ConfigError(f"{path}: '{module_name}' has no '{attribute}'{did_you_mean(attribute, dir(value))}")
        value = getattr(value, attribute)
    return value


def _rewards(entries: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {name: _reward(entry, f"{path}.{name}") for name, entry in entries.items()}


def _reward(settings: Any, path: str) -> Any:
    if not isinstance(settings, TestbedReward):
        return component(settings, path)
    world = _world(settings.world)
    choices = {"reward": world.reward, "gold": world.gold, **world.held_out}
    if settings.name not in choices:
        raise ConfigError(
            f"{path}.name: the world '{settings.world}' has no reward {shown(settings.name)}; allowed are "
            f"{', '.join(choices)}{did_you_mean(settings.name, choices)}"
        )
    return choices[settings.name]


def _measures(held_out: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the judge's verdict, where a world's gold is held out."""
    return {
        name: _world(entry.world).gold.parts
        for name, entry in held_out.items()
        if isinstance(entry, TestbedReward) and entry.name == "gold"
    }


def _world(name: str) -> Any:
    return _loaded(name.removeprefix("testbed:"))


@functools.cache
def _loaded(world: str) -> Testbed:
    from rsaft import testbed

    try:
        return testbed.load(world)
    except FileNotFoundError as error:
        raise ConfigError(f"testbed:{world}: its data is not installed: {error}") from error
