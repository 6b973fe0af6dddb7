"""The folder of an evaluation: its settings, one record a batch while it goes, and what is made of them at the end.

settings.json    what decides the scores; another evaluation is refused here
scores.jsonl     one record a batch; a kill loses the batch that was being worked on
prompts.json     the prompts with their ids and categories, and the report on their file
scores.parquet   run, step, prompt_id, prompt, seed, reward, score
summary.json     what is printed, and more
images/          with --save-images
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsaft.cli.eval_parts import Part
from rsaft.errors import ConfigError
from rsaft.metrics.records import flat, read_records
from rsaft.metrics.score_table import PartScores
from rsaft.rdrl.run_directory import JsonLines, write_json_atomic

SETTINGS, RECORDS, PROMPTS, TABLE, SUMMARY = (
    "settings.json",
    "scores.jsonl",
    "prompts.json",
    "scores.parquet",
    "summary.json",
)
FORMAT_VERSION = 1
SHOWN_CHANGES = 3


def refuse_others(out: Path) -> None:
    """Refuse a folder that holds something else than an evaluation.

    Raises:
        ConfigError: if it does, or it is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: '{out}' is a file, and a folder is needed; choose another with --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        mine = {".lock", f".{SETTINGS}.tmp"}  # of an evaluation that was killed at once
        if {path.name for path in out.iterdir()} - mine:
            raise ConfigError(f"out: '{out}' is not empty, and holds no evaluation; choose another folder with --out.")


def open_records(out: Path, settings: Mapping[str, Any]) -> JsonLines:
    """The records of an evaluation with these settings, to be gone on with; a new file if there is none.

    Settings may change as long as no batch is done.

    Raises:
        ConfigError: if batches were done with other settings.
        RunDirectoryError: if a file is damaged or cannot be written.
    """
    wanted = json.loads(json.dumps({"format_version": FORMAT_VERSION, **settings}, sort_keys=True))
    path = out / SETTINGS
    done = bool(read_records(out / RECORDS)) if (out / RECORDS).is_file() else False
    if done:
        found = changes(read_settings(path), wanted)
        if found:
            raise ConfigError(
                f"out: '{out}' holds an evaluation with other settings ({found}); repeat its command to go on with "
                "it, or choose another folder with --out."
            )
    else:
        write_json_atomic(path, wanted)
    return JsonLines(out / RECORDS, sys.maxsize if done else None)


def records_of(out: Path) -> dict[int, dict[str, Any]]:
    """The records by batch."""
    return {int(record["step"]): record for record in read_records(out / RECORDS)}


def part_scores(part: Part, names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> PartScores:
    """The scores of a part from its records, in the order of its items."""
    columns: dict[str, Tensor] = {}
    for name in names:
        values = [value for record in records for value in record["scores"][name]]
        found = [float("nan") if value is None else float(value) for value in values]
        columns[name] = torch.tensor(found, dtype=torch.float64)
    return PartScores(part.run, part.step, part.items, columns)


def throughput(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Images a second, of "images" (sampled or read) and of each reward, over all batches."""
    count = sum(record["images"] for record in records)
    totals: dict[str, float] = {}
    for record in records:
        for name, seconds in record["seconds"].items():
            totals[name] = totals.get(name, 0.0) + seconds
    return {name: count / seconds for name, seconds in totals.items() if seconds > 0}


def read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"out: {path} is damaged or missing ({error}); choose another folder with --out.") from error
    return found if isinstance(found, dict) else {}


def changes(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first settings that differ, in words."""
    a, b = flat(there), flat(wanted)
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    said = [f"{key}: {_short(a.get(key))} there, {_short(b.get(key))} now" for key in keys[:SHOWN_CHANGES]]
    more = len(keys) - SHOWN_CHANGES
    return "; ".join(said) + (f"; {more} more" if more > 0 else "")


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return value if len(value) <= 40 else f"{value[:12]}..."
