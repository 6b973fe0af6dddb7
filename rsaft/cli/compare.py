"""`rsaft compare`: finished run directories, grouped by their settings, against the first group."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from rsaft.config import TYPES
from rsaft.config.settings import load_type
from rsaft.errors import ConfigError
from rsaft.files import write_atomic
from rsaft.metrics.comparability import refuse_incomparable
from rsaft.metrics.comparison import Group, compare
from rsaft.metrics.comparison_page import as_json, html, markdown
from rsaft.metrics.records import Run, flat, read_run
from rsaft.rdrl.run_directory import write_json_atomic

DERIVED = ("step.network_dtype",)  # follows from another setting
TOLD = ("step.rho", "step.rho_w")  # in a name even where they are the defaults: the radii are the method


def compare_runs(paths: Sequence[Path], out: Path | None) -> tuple[str, list[Path]]:
    """The comparison as text, and the files that were written.

    Args:
        paths: run directories; the group of the first is what the others are compared with.
        out: NAME.html, beside which NAME.json is written; or a folder, made if missing; None writes nothing.

    Raises:
        ConfigError: if a run was named twice, or the runs cannot be compared.
        RunDirectoryError: if a directory is no run directory, or a file in it is damaged.
    """
    page = out if out is None or out.suffix == ".html" else out / "compare.html"
    if page is not None and (page.is_dir() or page.parent.is_file()):
        raise ConfigError(f"out: '{out}' is in the way; name a file NAME.html or a folder, new or not.")
    runs = [read_run(path) for path in paths]
    refuse_incomparable(runs)
    found = compare(grouped(runs))
    text = markdown(found)
    if page is None:
        return text, []
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, html(found).encode("utf-8"))
    write_json_atomic(page.with_suffix(".json"), as_json(found))
    return text, [page, page.with_suffix(".json")]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by their settings, in order of appearance, each group named by what differs between the groups.

    Raises:
        ConfigError: if two runs have the same settings and seed, or some have no config.yaml.
    """
    if any(run.config for run in runs) and not all(run.config for run in runs):
        lacking = next(run.path for run in runs if not run.config)
        raise ConfigError(
            f"compare: {lacking} has no config.yaml, and other runs have; leave out the one or the others."
        )
    groups: dict[str, dict[int, Run]] = {}
    settings: list[dict[str, Any]] = []
    for run in runs:
        config, seed = _settings(run)
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in groups:
            settings.append(config)
        of_seed = groups.setdefault(key, {})
        if seed in of_seed:
            raise ConfigError(
                f"compare: {of_seed[seed].path} and {run.path} have the same settings and seed {seed}; leave out one."
            )
        of_seed[seed] = run
    return [Group(name, by_seed) for name, by_seed in zip(names(settings), groups.values(), strict=True)]


def names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """`step=rsaft rho_w=0.01` and its like: what differs between the groups.

    Of a component whose type differs, settings that are its defaults are left out, but for the radii. A key is
    shortened to its last part where only one key ends so; a `type` is called after its component.
    """
    trees = [flat(tree) for tree in settings]
    every = dict.fromkeys(key for tree in trees for key in tree)
    differing = [key for key in every if len({tree.get(key) for tree in trees}) > 1 and key not in DERIVED]
    other_types = [key.removesuffix("type") for key in differing if key.endswith(".type")]
    usual = [_defaults(tree, other_types) for tree in settings]
    shown = [
        [key for key in differing if key in tree and (key in TOLD or tree[key] != default.get(key))]
        for tree, default in zip(trees, usual, strict=True)
    ]
    ends = [_end(key) for key in dict.fromkeys(key for keys in shown for key in keys)]
    made = [
        " ".join(f"{_end(key) if ends.count(_end(key)) == 1 else key}={tree[key]}" for key in keys)
        for tree, keys in zip(trees, shown, strict=True)
    ]
    if len(made) == 1:
        return ["all runs"]
    # Settings that only a newer version writes out, at their defaults, are in no name.
    return [
        (name or "the other settings") + (f" ({made[:i].count(name) + 1})" if name in made[:i] else "")
        for i, name in enumerate(made)
    ]


def _end(key: str) -> str:
    return key.removesuffix(".type").rpartition(".")[2]


def _defaults(settings: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, str]:
    """Printed defaults of the built-in components that begin with one of the prefixes."""
    result: dict[str, str] = {}
    for kind, types in TYPES.items():
        path = types.get(dict(settings.get(kind) or {}).get("type", ""))
        if f"{kind}." not in prefixes or path is None:
            continue
        for field in fields(load_type(path)):
            value = field.default_factory() if field.default_factory is not MISSING else field.default
            if value is not MISSING:
                plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
                result |= flat(plain, f"{kind}.{field.name}")
    return result


def _settings(run: Run) -> tuple[dict[str, Any], int]:
    """Settings without the seed, and the seed; of a run without config.yaml, from its folder's name METHOD.seedN."""
    if not run.config:
        match = re.fullmatch(r"(.+)\.seed(\d+)", run.path.resolve().name)
        if match is None:
            raise ConfigError(
                f"compare: {run.path} has no config.yaml to say what its settings were, nor is it called METHOD.seedN; "
                "name it so, or leave it out."
            )
        return {"method": match[1]}, int(match[2])
    train = dict(run.config.get("train") or {})
    seed = train.pop("seed", 0)
    return {**run.config, "train": train}, int(seed)
