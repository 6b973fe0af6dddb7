"""Reading a run's settings: YAML files, overlays on top of them, and `key=value` on top of those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from rsaft.errors import ConfigError

PATH_KEYS = (("model", "path"), ("prompts", "train"), ("prompts", "eval"), ("objective", "frontiers"))
"""Keys that may hold a path; it counts from the YAML's folder if it exists there, else from the working directory."""

REMOVABLE = (("rewards",), ("held_out",), ("objective", "weights"))
"""Mappings whose keys are the user's: there, `name: null` in an overlay takes the entry out."""


def read_settings(paths: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of the files, each laid over those before it, with the overrides on top; not yet validated.

    Mappings are merged key by key, everything else is replaced. A section whose `type` changes is replaced as a whole,
    because the keys of one type mean nothing to another.

    Raises:
        ConfigError: if a file is missing or no YAML, or an override is not `key=value`.
    """
    settings: dict[str, Any] = {}
    for path in paths:
        settings = merged(settings, _anchored(read_yaml(path), path.parent))
    settings = merged(settings, parse_overrides(overrides))
    for keys in REMOVABLE:
        entries = _mapping_at(settings, keys)
        for name in [name for name, value in entries.items() if value is None]:
            del entries[name]
    return _anchored(settings, Path())


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: if the file is missing, is not UTF-8, is not YAML, repeats a key, or holds no mapping.
    """
    if path.is_dir():
        raise ConfigError(f"config file '{path}': it is a folder; give the path of a YAML file.")
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean '{path.parent / near[0]}'?" if near else "; give the path of a YAML file."
        raise ConfigError(f"config file '{path}': there is no such file{hint}")
    try:
        return parse_mapping(path.read_text(encoding="utf-8"), f"config file '{path}'")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file '{path}': it is not UTF-8 at byte {error.start}; save it as UTF-8.") from error


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML text; `where` begins the error messages."""
    value = _parse(text, where)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a mapping of sections is expected (model: ..., prompts: ...); got {value!r:.60}.")
    return value


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`train.lr=1e-4` and its like as one nested mapping; a value is read as YAML.

    Raises:
        ConfigError: if one is not `key=value`, or one is a part of another.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override '{override}': key=value is expected, as in train.lr=1e-4.")
        value = _parse(text, f"override '{override}'")
        inner: Any = settings
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"override '{override}': another override sets '{part}' itself; keep one of the two.")
        inner[parts[-1]] = value
    return settings


def merged(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overlay` laid over it; neither is changed."""
    if "type" in base and "type" in overlay and base["type"] != overlay["type"]:
        return dict(overlay)
    result = dict(base)
    for key, value in overlay.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def _parse(text: str, where: str) -> Any:
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{where}: anchors and aliases (&, *) are not allowed; write the value out.")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _check_keys(node, where)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: this is not YAML that can be read: {' '.join(str(error).split())}.") from error


def _check_keys(node: yaml.Node, where: str) -> None:
    """Refuse keys that are no text, and a key given twice, of which YAML would silently keep the last."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(
                    f"{where}, line {line}: a key is plain text; got {key.value!r:.60}; put it in quotes."
                )
            if key.value in seen:
                raise ConfigError(f"{where}, line {line}: the key '{key.value}' is given twice; keep one.")
            seen.add(key.value)
            _check_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, where)


def _anchored(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with each path that exists below `folder` made absolute."""
    for keys in PATH_KEYS:
        section, value = _mapping_at(settings, keys[:-1]), _mapping_at(settings, keys[:-1]).get(keys[-1])
        if isinstance(value, str) and value and "\0" not in value and not value.startswith("testbed:"):
            path = folder / Path(value).expanduser()
            if _exists(path):
                section[keys[-1]] = str(path.resolve())
    return settings


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system: it names no file
        return False


def _mapping_at(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The mapping below the given keys; an empty one of its own if there is none."""
    value: Any = settings
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
