"""Which samples and prompts belong to an update, a process and a micro-batch; nothing here keeps a state."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rsaft.errors import ConfigError
from rsaft.prompts import read_prompts
from rsaft.randomness import prompt_rows
from rsaft.rdrl.train_config import TrainConfig
from rsaft.types import Batch


def prompt_list(prompts: Sequence[str] | str | os.PathLike[str]) -> list[str]:
    """The prompts themselves, or those of a file.

    Raises:
        ConfigError: if there is none, or the file cannot be read.
    """
    if isinstance(prompts, str | os.PathLike):
        return list(read_prompts(Path(prompts)).prompts)
    if not prompts:
        raise ConfigError("prompts: the list is empty; give at least one prompt.")
    return list(prompts)


def micro_batch_ids(config: TrainConfig, *, world: int, rank: int) -> list[range]:
    """Sample ids of one process's micro-batches: equal parts, so that a mean of means is the mean.

    Args:
        config: its `batch_size` and `micro_batch`.
        world: number of processes.
        rank: number of this one.

    Raises:
        ConfigError: if the batch does not split evenly.
    """
    size, per = config.batch_size, config.batch_size // world
    micro = config.micro_batch or per
    if size % world or per % micro:
        raise ConfigError(
            f"train.batch_size: {size} samples must split evenly over {world} processes and then into micro-batches of "
            f"{micro}; choose a multiple of {world * micro}."
        )
    return [range(first, first + micro) for first in range(rank * per, (rank + 1) * per, micro)]


def batches_of(
    step: int,
    *,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    parts: Sequence[range],
    group_size: int = 1,
) -> list[Batch]:
    """The micro-batches of update `step`: the same prompts for the same samples, however the batch is split.

    Args:
        step: updates done before.
        prompts: the training prompts.
        seed: of the run.
        batch_size: samples of the update, over all processes.
        parts: sample ids of each micro-batch.
        group_size: samples in a row that share a prompt; divides `batch_size`.
    """
    rows = prompt_rows(len(prompts), seed=seed, step=step, batch_size=batch_size // group_size)
    return [
        Batch(tuple(prompts[rows[i // group_size]] for i in ids), tuple(ids), step=step, seed=seed) for ids in parts
    ]


def refuse_split_groups(config: TrainConfig, *, world: int) -> None:
    """Refuse a batch whose groups no forward pass, or no simultaneous passes of all processes, see as a whole.

    An objective by prompt compares the samples of a group with each other. They must be in memory together: within one
    micro-batch, or, where a process has no other micro-batch, spread over processes.

    Raises:
        ConfigError: if a group is cut.
    """
    per = config.batch_size // world
    micro = config.micro_batch or per
    if micro % config.group_size and micro < per:
        raise ConfigError(
            f"train.micro_batch: the objective compares the {config.group_size} samples of a prompt, and micro-batches "
            f"of {micro} cut them apart; choose a multiple of {config.group_size}, or leave micro_batch out."
        )
