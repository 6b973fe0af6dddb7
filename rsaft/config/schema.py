"""The JSON schema of a run file, put together from the schemas of its sections."""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import TypeAdapter

from rsaft.config.settings import KL, REQUIRED, TYPES, Custom, Model, Prompts, adapter, load_type

_FIELD = re.compile(r"((?:^    # [^\n]*\n)*)^    (\w+): [^#\n]*?(?:  # ([^\n]+))?$", flags=re.MULTILINE)


def run_schema() -> dict[str, Any]:
    """The schema; each key's description is the comment beside or above it in the code."""
    lora, train = load_type("rsaft.backbones.lora:LoRA"), load_type("rsaft.rdrl.train_config:TrainConfig")
    gauge, rule = load_type("rsaft.metrics.gauge:Gauge"), load_type("rsaft.metrics.stop_rule:StopRule")
    kinds = {kind: {name: load_type(path) for name, path in types.items()} for kind, types in TYPES.items()}
    classes = list(
        dict.fromkeys(
            [Model, Prompts, KL, lora, train, gauge, rule, Custom, *[c for k in kinds.values() for c in k.values()]]
        )
    )
    refs, shared = TypeAdapter.json_schemas([(cls, "validation", adapter(cls)) for cls in classes])
    ref = {cls: refs[(cls, "validation")]["additionalProperties"] for cls in classes}
    definitions = shared["$defs"]
    for cls in classes:
        _describe(definitions[_name(ref[cls])], cls)
    for types in kinds.values():
        for name, cls in types.items():
            _add_type(definitions[_name(ref[cls])], name)
    definitions["Custom"]["properties"]["type"]["pattern"] = ":"
    definitions["Model"]["properties"]["lora"] |= {"anyOf": [ref[lora], {"type": "null"}]}
    choice = {kind: {"anyOf": [*[ref[cls] for cls in types.values()], ref[Custom]]} for kind, types in kinds.items()}
    rewards = {"type": "object", "additionalProperties": choice["reward"]}
    sections = {
        "model": ref[Model],
        "prompts": ref[Prompts],
        "algorithm": choice["algorithm"],
        "rewards": rewards | {"minProperties": 1},
        "objective": choice["objective"],
        "held_out": rewards,
        "step": choice["step"],
        "train": ref[train],
        "kl": {"anyOf": [ref[KL], {"type": "null"}]},
        "gauge": ref[gauge],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rsaft run",
        "type": "object",
        "properties": sections,
        "required": list(REQUIRED),
        "additionalProperties": False,
        "$defs": definitions,
    }


def _name(ref: dict[str, str]) -> str:
    return ref["$ref"].rpartition("/")[2]


def _describe(definition: dict[str, Any], cls: type) -> None:
    """Add the class's first line and the comment of each field, and that there are no other fields."""
    definition["description"] = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
    definition["additionalProperties"] = False  # older pydantic leaves it out
    for above, key, beside in _FIELD.findall(inspect.getsource(cls)):
        text = " ".join(line.strip().lstrip("# ") for line in [*above.splitlines(), beside] if line.strip())
        if key in definition.get("properties", {}) and text:
            definition["properties"][key]["description"] = text


def _add_type(definition: dict[str, Any], name: str) -> None:
    """Add the key `type`, which says which dataclass a section is and is no field of it."""
    definition["properties"] = {"type": {"const": name}} | definition.get("properties", {})
    definition["required"] = ["type", *definition.get("required", [])]
