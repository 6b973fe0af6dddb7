"""The settings behind `--tiny`: the same run on a tiny random model, on a CPU in seconds.

It goes through everything that the run goes through: family, adapter, precision, algorithm, step, objective, trainer,
evaluation, checkpoints, export. It says nothing about images, rewards, memory or speed.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from rsaft.config.objectives import ParetoTransport
from rsaft.config.sections import FAMILIES, TINY, Custom, Model
from rsaft.config.settings import RunConfig
from rsaft.errors import ConfigError

TOY_REWARD = Custom("rsaft.testbed.toy:toy_reward")
SAMPLING_STEPS = 4
STEP_COUNTS = {"k": 2, "last": 2, "early_stop": 2, "truncation": 3}
"""Settings of algorithms that count sampling steps, and the most that they may be of 4."""


def tiny(config: RunConfig) -> RunConfig:
    """The run with a tiny random model of its family, a toy reward in place of each reward, and 3 updates.

    Kept: adapter, precision, guidance, algorithm, objective, step, optimizer, prompts. Code of the user's own is kept,
    but for rewards. Frontiers are random ones.

    Raises:
        ConfigError: if the config does not name the family of its model.
    """
    group_size = min(config.train.group_size, 2)
    train = replace(
        config.train,
        steps=3,
        batch_size=2,  # so one or two processes
        group_size=group_size,
        # None for a group, which no micro-batch may cut
        micro_batch=None if config.train.micro_batch is None or group_size > 1 else 1,
        warmup_steps=min(config.train.warmup_steps, 1),
        eval_every=3,
        eval_samples=2,
        eval_batch=2,
        save_every=3,
        grid=2,
        trackers=(),
    )
    return replace(
        config,
        model=tiny_model(config.model),
        algorithm=few_steps(config.algorithm),
        rewards=dict.fromkeys(config.rewards, TOY_REWARD),
        held_out=dict.fromkeys(config.held_out, TOY_REWARD),
        objective=tiny_frontiers(config.objective),
        train=train,
    )


def tiny_frontiers(objective: Any) -> Any:
    """The objective with random frontiers in place of those that it has."""
    if not isinstance(objective, ParetoTransport) or objective.frontiers is None:
        return objective
    return replace(objective, frontiers=TINY)


def tiny_model(model: Model) -> Model:
    """A tiny model of the same family, with the settings that make sense for it."""
    if model.path.startswith(TINY):
        return model
    if model.family is None:
        raise ConfigError(
            f"config.model.family: --tiny takes a tiny model of the family of '{model.path}', so name it: "
            f"{', '.join(FAMILIES)}."
        )
    return replace(
        model,
        path=f"{TINY}{model.family}",
        revision=None,
        variant=None,
        resolution=None,
        max_sequence_length=None,
        prompt_cache=None,
        drop_text_encoders=False,
        compile=False,
    )


def few_steps(algorithm: Any) -> Any:
    """The algorithm with at most 4 sampling steps, and what counts them cut to fit; the user's own stays as it is."""
    if isinstance(algorithm, Custom):
        return algorithm
    sampling = replace(algorithm.sampling, num_steps=min(algorithm.sampling.num_steps, SAMPLING_STEPS))
    changes: dict[str, Any] = {"sampling": sampling}
    for field in fields(algorithm):
        value = vars(algorithm)[field.name]
        if field.name in STEP_COUNTS and isinstance(value, int):
            changes[field.name] = min(value, STEP_COUNTS[field.name], sampling.num_steps)
        elif field.name == "pretrain":  # pairs of latents of the real model's shape
            changes[field.name] = None
    return replace(algorithm, **changes)
