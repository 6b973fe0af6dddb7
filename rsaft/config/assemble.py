"""From validated settings to what they describe: loads models, worlds and prompts, and imports the user's own code."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rsaft.config.messages import did_you_mean, shown
from rsaft.config.objectives import ParetoTransport
from rsaft.config.rewards import MODELS
from rsaft.config.sections import KL, PIPELINES, TESTBED, TINY, Custom, Model, Plain, TestbedReward
from rsaft.config.settings import RunConfig, to_dict
from rsaft.errors import ConfigError
from rsaft.prompts import read_prompts

if TYPE_CHECKING:
    from rsaft.backbones.pipeline import DiffusersBackbone
    from rsaft.rdrl.loop import Trainer
    from rsaft.testbed import Testbed
    from rsaft.testbed.tiny import TinyFamily

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """What a config describes besides the model."""

    algorithm: Any
    rewards: dict[str, Any]
    held_out: dict[str, Any]
    objective: Any
    step: Any
    prompts: tuple[str, ...]
    eval_prompts: tuple[str, ...] | None
    measures: dict[str, Any]


def components(config: RunConfig) -> Components:
    """Import the user's own code, load rewards and read prompts: cheap beside the model, so a mistake shows first.

    Raises:
        ConfigError: if something that the settings name does not exist or does not fit.
    """
    from rsaft.rdrl.score import plain_step

    step = component(config.step, "config.step")
    algorithm = with_kl(component(config.algorithm, "config.algorithm"), config.kl)
    prompts = load_prompts(config.prompts.train, "train")
    objective = _objective(config, prompts, algorithm)  # before the rewards, which may take minutes
    return Components(
        algorithm=algorithm,
        rewards=load_rewards(config.rewards, "config.rewards"),
        held_out=load_rewards(config.held_out, "config.held_out"),
        objective=objective,
        step=plain_step if isinstance(step, Plain) else step,
        prompts=prompts,
        eval_prompts=None if config.prompts.eval is None else load_prompts(config.prompts.eval, "eval"),
        measures=_measures(config.held_out),
    )


def trainer(config: RunConfig, run: Path) -> Trainer:
    """The Trainer of a run directory; see `rsaft.config.build_trainer`."""
    from rsaft.config.frontiers import check_base
    from rsaft.rdrl.loop import Trainer

    parts = components(config)
    backbone = load_model(config.model, seed=config.train.seed, keep_base=config.kl is not None)
    check_base(parts.objective, backbone)
    prepare_prompts(backbone, config.model, [*parts.prompts, *(parts.eval_prompts or ())])
    return Trainer(
        backbone,
        algorithm=parts.algorithm,
        rewards=parts.rewards,
        objective=parts.objective,
        step=parts.step,
        prompts=parts.prompts,
        eval_prompts=parts.eval_prompts,
        held_out=parts.held_out,
        measures=parts.measures,
        config=config.train,
        gauge=config.gauge,
        run_dir=run,
        description=yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120),
    )


def _objective(config: RunConfig, prompts: tuple[str, ...], algorithm: Any) -> Any:
    if not isinstance(config.objective, ParetoTransport):
        return component(config.objective, "config.objective")
    from rsaft.config.frontiers import transport

    return transport(config.objective, config, prompts, algorithm.sampling)


def prepare_prompts(backbone: DiffusersBackbone, model: Model, prompts: Sequence[str]) -> None:
    """Warn of prompts that are cut, and encode them all beforehand where the config says so."""
    from rsaft.backbones.text_limits import cut_note, text_readers

    readers = text_readers(backbone.pipe, backbone.family, model.max_sequence_length)
    note = cut_note(readers, prompts)
    if note and not model.path.startswith(TINY):  # a tiny model cuts almost any prompt
        _log.warning(note)
    if model.prompt_cache is not None:
        backbone.cache_prompts(prompts)
    if model.drop_text_encoders:
        backbone.drop_text_encoders()


def with_kl(algorithm: Any, kl: KL | None) -> Any:
    """The algorithm with the term that the config asks for.

    Raises:
        ConfigError: if its weight is not above 0.
    """
    from rsaft.rdrl.kl import WithKL

    return algorithm if kl is None else WithKL(algorithm, kl.weight)


def load_model(model: Model, *, seed: int, keep_base: bool = False) -> DiffusersBackbone:
    """The backbone of a config's section `model`; `seed` is of the adapter's initial values.

    Raises:
        ConfigError: if there is no such model, or it is not of the family that the config names.
    """
    from rsaft.backbones.load import load_backbone

    backbone = load_backbone(
        _model_source(model.path),
        lora=model.lora,
        dtype=model.dtype,
        revision=model.revision,
        variant=model.variant,
        gradient_checkpointing=model.gradient_checkpointing,
        seed=seed,
        resolution=model.resolution,
        negative_prompt=model.negative_prompt,
        max_sequence_length=model.max_sequence_length,
        prompt_cache=model.prompt_cache,
        vae_dtype=model.vae_dtype,
        vae_slicing=model.vae_slicing,
        vae_tiling=model.vae_tiling,
        vae_checkpointing=model.vae_checkpointing,
        compile=model.compile,
        keep_base=keep_base,
    )
    if model.path.startswith(TINY):
        backbone.source = model.path  # the folder it was loaded from is gone with this process
    expected = None if model.family is None else PIPELINES[model.family]
    if expected is not None and backbone.family.pipeline != expected:
        raise ConfigError(
            f"config.model.family: '{model.family}' is a {expected}, and '{model.path}' is a "
            f"{backbone.family.pipeline}; change one of the two, or leave family out."
        )
    return backbone


def _model_source(path: str) -> str:
    """The folder or hub id that a model's path stands for."""
    if path.startswith(TESTBED):
        return str(_world(path).path)
    return _tiny_folder(path.removeprefix(TINY)).name if path.startswith(TINY) else path


@functools.cache  # holds the folder until the process ends
def _tiny_folder(family: TinyFamily) -> tempfile.TemporaryDirectory[str]:
    """A folder with the tiny random pipeline of a family, as a hub checkpoint would lie there."""
    from rsaft.backbones.quiet import silent_bars
    from rsaft.testbed.tiny import tiny_pipeline

    folder = tempfile.TemporaryDirectory(prefix="rsaft-tiny-")
    with silent_bars():
        tiny_pipeline(family).save_pretrained(folder.name)
    return folder


def load_prompts(source: str, part: str) -> tuple[str, ...]:
    """The prompts of a file, or a world's own; `part` is train or eval."""
    if source.startswith(TESTBED):
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


def load_rewards(entries: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The rewards that settings describe, by name; `path` is their section, which begins the errors.

    Raises:
        ConfigError: if one does not exist or does not fit.
    """
    return {name: _reward(entry, f"{path}.{name}") for name, entry in entries.items()}


def _reward(settings: Any, path: str) -> Any:
    if isinstance(settings, MODELS):
        return _reward_model(settings, path)
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


def _reward_model(settings: Any, path: str) -> Any:
    """`rsaft.rewards.NAME` of the settings `rsaft.config.rewards.NAME`, loaded."""
    from rsaft import rewards

    try:
        return getattr(rewards, type(settings).__name__)(**vars(settings))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _measures(held_out: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the judge's verdict, where a world's gold is held out."""
    return {
        name: _world(entry.world).gold.parts
        for name, entry in held_out.items()
        if isinstance(entry, TestbedReward) and entry.name == "gold"
    }


def _world(name: str) -> Any:
    return _loaded(name.removeprefix(TESTBED))


@functools.cache
def _loaded(world: str) -> Testbed:
    from rsaft import testbed

    try:
        return testbed.load(world)
    except FileNotFoundError as error:
        raise ConfigError(f"testbed:{world}: its data is not installed: {error}") from error
