"""The folder of `rsaft frontier`: what decides the scores, and records of them while it goes.

settings.json        what decides the scores; another model, reward, prompt list, sampling or seed is refused here
scores-RANK.jsonl    one record a batch, by each process its own; a kill loses the batches that were being worked on
rewards.safetensors  the rewards of all samples, and
frontier.json        their prompts, names and origin: what `objective.frontiers` reads
frontiers.png        a few prompts' samples and frontiers, and the bounds of all prompts
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.cli.eval_store import changes, read_settings
from rsaft.config.frontiers import FINGERPRINT
from rsaft.errors import ConfigError
from rsaft.metrics.records import read_records
from rsaft.rdrl.run_directory import write_json_atomic

SETTINGS, RECORDS, PICTURE = "settings.json", "scores-*.jsonl", "frontiers.png"
FORMAT_VERSION = 1

Key = tuple[int, int]
"""Row of the prompt, number of its sample."""


def refuse_others(out: Path) -> None:
    """Refuse a folder that holds something else; reads only, so all processes may call it.

    Raises:
        ConfigError: if it does, or it is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: '{out}' is a file, and a folder is needed; choose another with --out.")
    if out.is_dir() and not (out / SETTINGS).is_file():
        mine = {".lock", f".{SETTINGS}.tmp"}  # of a command that was killed at once
        if {path.name for path in out.iterdir()} - mine:
            raise ConfigError(f"out: '{out}' is not empty, and holds no frontiers; choose another folder with --out.")


def refuse_changes(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse other settings than those of the scores that are there. Without a fingerprint, before the model is loaded,
    it is not compared.

    Raises:
        ConfigError: if they are others.
    """
    if not any(read_records(path) for path in out.glob(RECORDS)):
        return
    there = read_settings(out / SETTINGS)
    if FINGERPRINT not in settings:
        there.pop(FINGERPRINT, None)
    found = changes(there, as_json(settings))
    if found:
        raise ConfigError(
            f"out: '{out}' holds frontiers with other settings ({found}); repeat its command to go on with it, or "
            "choose another folder with --out."
        )


def write_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Say what decides the scores, before there are any."""
    write_json_atomic(out / SETTINGS, as_json(settings))


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they are read back."""
    result: dict[str, Any] = json.loads(json.dumps({"format_version": FORMAT_VERSION, **settings}, sort_keys=True))
    return result


def records_of(out: Path) -> list[dict[str, Any]]:
    """All records, of every process that ever worked here."""
    return [record for path in sorted(out.glob(RECORDS)) for record in read_records(path)]


def keys_of(record: Mapping[str, Any]) -> list[Key]:
    """The samples of a record."""
    return [(row, number) for row, number in record["samples"]]


def rewards_of(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], *, prompts: int, samples: int
) -> Float[Tensor, "p n m"]:
    """The scores of the first samples of each prompt; NaN where one is missing or was not finite."""
    rewards = torch.full((prompts, samples, len(names)), torch.nan, dtype=torch.float64)
    for record in records:
        columns = [[torch.nan if v is None else v for v in record["scores"][name]] for name in names]
        for (row, number), values in zip(keys_of(record), zip(*columns, strict=True), strict=True):
            if number < samples:
                rewards[row, number] = torch.tensor(values, dtype=torch.float64)
    return rewards
