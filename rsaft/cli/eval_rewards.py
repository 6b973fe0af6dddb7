"""What `rsaft eval --rewards` names: built-in types, code of the user's own, a testbed's rewards, YAML files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsaft.config.files import read_yaml
from rsaft.config.messages import did_you_mean, shown
from rsaft.config.sections import TESTBED, WORLDS
from rsaft.config.settings import reward_settings
from rsaft.errors import ConfigError
from rsaft.testbed import DATA

SECTIONS = ("rewards", "held_out")  # of a YAML file


def rewards_named(names: Sequence[str]) -> dict[str, Any]:
    """Settings of the rewards, by name; nothing is loaded.

    - `hpsv2` and its like: a type of run files, with its defaults, under that name.
    - `my_pkg.mod:fn`: code of the user's own, under the name `fn`.
    - `testbed:fashion`: all of a world's rewards (reward, gold, and the held-out ones); `testbed:fashion:gold`: one.
    - `FILE.yaml`: its sections `rewards` and `held_out`; others are not looked at, so a run's config.yaml will do.

    Raises:
        ConfigError: if there is no such reward or section, or two of one name.
    """
    sections: dict[str, Any] = {}
    for name in names:
        for key, section in _sections(name).items():
            if key in sections:
                raise ConfigError(
                    f"rewards: there are two called '{key}', the second by '{name}'; name them apart in a YAML file."
                )
            sections[key] = section
    return reward_settings(sections, "rewards")


def _sections(name: str) -> Mapping[str, Any]:
    if name.endswith((".yaml", ".yml")):
        return _of_file(Path(name))
    if name.startswith(TESTBED):
        return _of_world(name.removeprefix(TESTBED))
    if ":" in name:
        return {name.rpartition(":")[2].rpartition(".")[2]: {"type": name}}
    return {name: {"type": name}}


def _of_file(path: Path) -> dict[str, Any]:
    settings = read_yaml(path)
    found: dict[str, Any] = {}
    for section in SECTIONS:
        entries = settings.get(section) or {}
        if not isinstance(entries, Mapping):
            raise ConfigError(f"{path}, {section}: a mapping from names to rewards is expected; got {shown(entries)}.")
        if twice := sorted(found.keys() & entries.keys()):
            raise ConfigError(f"{path}: rewards and held_out both have '{twice[0]}'; name them apart.")
        found |= entries
    if not found:
        raise ConfigError(
            f"rewards '{path}': it has no section 'rewards' with a reward in it; write one as in a run file."
        )
    return found


def _of_world(text: str) -> dict[str, Any]:
    world, _, one = text.partition(":")
    if world not in WORLDS:
        raise ConfigError(
            f"rewards '{TESTBED}{text}': there is no world {shown(world)}; allowed are "
            f"{', '.join(TESTBED + w for w in WORLDS)}{did_you_mean(world, WORLDS)}"
        )
    learned = sorted(path.stem for path in (DATA / world / "rewards").glob("*.safetensors"))
    names = [one] if one else ["reward", "gold", *(name for name in learned if name != "train")]
    return {name: {"type": "testbed", "world": world, "name": name} for name in names}
