"""Frontiers of a run file: what they must have been made from, and the objective that is made of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rsaft.config import objectives
from rsaft.config.sections import TINY
from rsaft.config.settings import RunConfig, to_dict
from rsaft.errors import ConfigError
from rsaft.pareto import FrontierStore, ParetoTransport
from rsaft.randomness import generator
from rsaft.sampling import Sampling

if TYPE_CHECKING:
    from rsaft.backbones.pipeline import DiffusersBackbone

_log = logging.getLogger(__name__)

MODEL_KEYS = ("dtype", "resolution", "negative_prompt", "max_sequence_length")
"""Settings of the model that decide its images, beside its weights."""

NO_MATTER = ("device", "timeout", "retries", "backoff", "max_mib")
"""Settings of a reward that say where and how it runs, and change no score."""

FINGERPRINT = "model.fingerprint"
TINY_SAMPLES = 8


def origin(config: RunConfig, sampling: Sampling) -> dict[str, Any]:
    """What decides the rewards of samples of the untrained model, but for its weights, by key, in JSON's types."""
    settings = to_dict(config)
    found = {f"model.{key}": settings["model"][key] for key in MODEL_KEYS}
    found |= {"sampling.num_steps": sampling.num_steps, "sampling.guidance": float(sampling.guidance)}
    for name, reward in settings["rewards"].items():
        found |= {f"rewards.{name}.{key}": value for key, value in reward.items() if key not in NO_MATTER}
        if ":" in reward["type"]:  # of the user's own
            found[f"rewards.{name}.args"] = reward.get("args")
    return found


def base_origin(backbone: DiffusersBackbone) -> dict[str, str]:
    """The part of an origin that takes the loaded model."""
    from rsaft.backbones.fingerprint import fingerprint

    return {FINGERPRINT: fingerprint(backbone)}


def transport(
    settings: objectives.ParetoTransport, config: RunConfig, prompts: Sequence[str], sampling: Sampling
) -> ParetoTransport:
    """The objective of a run, with its frontiers loaded and compared with all of the run but its weights.

    Raises:
        ConfigError: if the frontiers are not there, damaged, or of other rewards, prompts, sampling or precision; or
            the settings do not fit together.
    """
    names = settings.active or tuple(config.rewards)
    wanted = origin(config, sampling)
    needed = {k: v for k, v in wanted.items() if not k.startswith("rewards.") or k.split(".")[1] in names}
    if settings.strategy == "offline" and config.train.group_size == 1:
        _log.warning(
            "train.group_size is 1: alone, a sample is pulled to the mean of its prompt's frontier, and nothing is "
            "transported; the objective is made for several samples of a prompt."
        )
    try:
        store = None
        if settings.frontiers is not None:
            is_tiny = settings.frontiers == TINY
            store = tiny_store(prompts, tuple(config.rewards)) if is_tiny else FrontierStore.load(settings.frontiers)
            store.check(needed, names)
            store.rows(prompts)
        return ParetoTransport(
            strategy=settings.strategy,
            frontiers=store,
            active=settings.active,
            source=settings.source,
            cost=settings.cost,
            normalize=settings.normalize,
            reg=settings.reg,
            unroll=settings.unroll,
        )
    except ConfigError as error:
        raise ConfigError(f"config.objective: {error}") from error


def check_base(objective: Any, backbone: DiffusersBackbone) -> None:
    """Refuse a model that the objective's frontiers, if it has any, were not made with.

    Raises:
        ConfigError: if it is another one.
    """
    if isinstance(objective, ParetoTransport) and objective.frontiers is not None:
        try:
            objective.frontiers.check(base_origin(backbone), ())
        except ConfigError as error:
            raise ConfigError(f"config.objective: {error}") from error


def tiny_store(prompts: Sequence[str], names: tuple[str, ...]) -> FrontierStore:
    """Random frontiers for `--tiny`, above whatever the toy reward gives, so that every sample has a target."""
    texts = tuple(dict.fromkeys(prompts))
    shape = (len(texts), TINY_SAMPLES, len(names))
    drawn = torch.rand(shape, generator=generator(0, "tiny frontiers"), dtype=torch.float64)
    return FrontierStore(texts, names, 1 + drawn)
