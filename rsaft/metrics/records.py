"""Reading a run directory back: metrics.jsonl, samples/, config.yaml, env.json. Tolerates a run that was cut off."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rsaft.errors import RunDirectoryError

GOLD = "held_out/gold"  # the ground truth's key, where a run has one


@dataclass(frozen=True)
class Run:
    """What a run left behind; records in the order of steps."""

    path: Path
    name: str
    train: tuple[dict[str, Any], ...]
    evals: tuple[dict[str, Any], ...]
    samples: dict[int, dict[str, Any]]  # step -> prompts, sample_ids, scores
    grids: dict[int, Path]  # step -> picture
    config: dict[str, Any]
    environment: dict[str, Any]

    def keys(self, prefix: str) -> list[str]:
        """Keys of the evaluations that begin so, in order of appearance; counts excluded."""
        return list(dict.fromkeys(key for record in self.evals for key in record if key.startswith(prefix)))


def read_run(path: Path) -> Run:
    """The run in that directory; what is missing is empty.

    A last line that was cut off is left out, and of two records of one kind and step the later one holds.

    Raises:
        RunDirectoryError: if there is no metrics.jsonl, or a line before the last is damaged.
    """
    records = read_records(path / "metrics.jsonl")
    by_kind: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}}
    for record in records:
        by_kind.setdefault(record.get("kind", ""), {})[int(record.get("step", 0))] = record
    folder = path / "samples"
    samples = {_step(file): _json(file) for file in sorted(folder.glob("step-*.json"))}
    config = yaml.safe_load((path / "config.yaml").read_text()) if (path / "config.yaml").is_file() else None
    return Run(
        path=path,
        name=path.name,
        train=tuple(record for _, record in sorted(by_kind["train"].items())),
        evals=tuple(record for _, record in sorted(by_kind["eval"].items())),
        samples=samples,
        grids={_step(file): file for file in sorted(folder.glob("step-*.png"))},
        config=config if isinstance(config, dict) else {},
        environment=_json(path / "env.json") if (path / "env.json").is_file() else {},
    )


def all_keys(runs: Sequence[Run], prefixes: Sequence[str]) -> list[str]:
    """Keys of the runs' evaluations that begin so, in the order of the prefixes, gold first."""
    keys = dict.fromkeys(key for prefix in prefixes for run in runs for key in run.keys(prefix))
    return sorted(keys, key=lambda key: (prefixes.index(key.split("/")[0] + "/"), key != GOLD))


def curve(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one key; NaN where a record lacks it."""
    return [int(record["step"]) for record in records], [number(record.get(key)) for record in records]


def train_reward(run: Run) -> list[float]:
    """Mean over the train rewards at each evaluation, on the evaluation's prompts; NaN where one is missing."""
    columns = [curve(run.evals, key)[1] for key in run.keys("reward/")]
    return [math.fsum(row) / len(row) for row in zip(*columns, strict=True)] if columns else [math.nan] * len(run.evals)


def truth(run: Run, held_out: Sequence[str] | None = None) -> list[float]:
    """Gold at each evaluation, or the mean of the held-out rewards without it; of these keys, or all of the run's."""
    held_out = run.keys("held_out/") if held_out is None else held_out
    columns = [curve(run.evals, key)[1] for key in ([GOLD] if GOLD in held_out else held_out)]
    return [math.fsum(row) / len(row) for row in zip(*columns, strict=True)] if columns else [math.nan] * len(run.evals)


def scores(run: Run, step: int, key: str) -> dict[tuple[str, int], float]:
    """One score of each sample of an evaluation, by (prompt, sample id); only finite ones."""
    sample = run.samples.get(step, {})
    values = sample.get("scores", {}).get(key, [])
    rows = zip(sample.get("prompts", []), sample.get("sample_ids", []), values, strict=False)
    return {(prompt, int(i)): number(value) for prompt, i, value in rows if math.isfinite(number(value))}


def by_prompt(values: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Mean over the samples of each prompt: samples of one prompt are not independent."""
    groups: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        groups.setdefault(prompt, []).append(value)
    return {prompt: math.fsum(group) / len(group) for prompt, group in groups.items()}


def flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and printed values of a nested mapping."""
    if isinstance(tree, Mapping) and tree:
        nested = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
        return {key: value for part in nested for key, value in part.items()}
    return {prefix or "value": tree if isinstance(tree, str) else json.dumps(tree, default=str)}


def side_by_side(trees: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table of settings: key, and the printed value in each tree, with a dash where there is none."""
    columns = [flat(tree) if tree else {} for tree in trees]
    keys = dict.fromkeys(key for column in columns for key in column)
    return [{"key": key, "values": [column.get(key, "–") for column in columns]} for key in keys]


def differing(trees: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `side_by_side` whose values are not all equal."""
    return [row for row in side_by_side(trees) if len(set(row["values"])) > 1]


def number(value: Any) -> float:
    """The value as a float; NaN if it is none."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, without a last line that a kill cut off.

    Raises:
        RunDirectoryError: if the file is missing, or a line before the last is damaged.
    """
    if not path.is_file():
        raise RunDirectoryError(f"{path.parent} holds no {path.name}, so it is no run directory; name one.")
    lines = path.read_text().splitlines()
    records = []
    for i, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if i == len(lines):  # a run that was killed while writing
                break
            raise RunDirectoryError(f"{path}, line {i} is damaged ({error.msg}); restore or remove it.") from error
        records.append(record)
    return records


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{path} is damaged ({error.msg}); restore or remove it.") from error
    return content if isinstance(content, dict) else {}


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
