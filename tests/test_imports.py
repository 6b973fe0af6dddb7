"""Arrows between the packages point one way, and importing rsaft costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rsaft

ROOT = Path(rsaft.__file__).parent
CORE = {"types", "errors", "files", "schedules", "sampling", "randomness", "distributed", "prompts"}
MODELS = {"diffusers", "transformers", "peft", "accelerate"}

# For each part of rsaft: the other parts and the model libraries that it may import.
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(CORE, CORE),
    "backbones": CORE | MODELS,
    "rewards": CORE | MODELS,
    "flatten": CORE | {"metrics"},
    "metrics": CORE | {"flatten"},
    "pareto": CORE | {"metrics"},
    "drm": CORE,
    "rdrl": CORE | MODELS | {"backbones", "rewards", "flatten", "metrics", "pareto", "drm"},
}
TOP = {"cli", "config", "testbed", "__init__", "__main__"}
MODULES = sorted(ROOT.rglob("*.py"))


def _part(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def _imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, also in functions, under TYPE_CHECKING, or as `rsaft.x`."""
    here = ["rsaft", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} - {"rsaft"}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rsaft":
            found.add(f"rsaft.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "rsaft" else {module}
    return found


def _forbidden(path: Path) -> list[str]:
    allowed = {*ALLOWED[_part(path)], _part(path), "__version__"}
    ours = {name: name.split(".")[1] for name in _imports(path) if name.startswith("rsaft.")}
    models = {name: name.split(".")[0] for name in _imports(path) if name.split(".")[0] in MODELS}
    return sorted(name for name, target in (ours | models).items() if target not in allowed)


def test_every_part_has_a_place_in_the_order():
    assert {_part(path) for path in MODULES} <= set(ALLOWED) | TOP


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_arrows_point_one_way(part):
    wrong = {str(p.relative_to(ROOT)): _forbidden(p) for p in MODULES if _part(p) == part}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_nothing_imports_torchvision():
    assert [p for p in MODULES if any(n.split(".")[0] == "torchvision" for n in _imports(p))] == []


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_rsaft_loads_no_library():
    heavy = ["torch", "numpy", "diffusers", "transformers", "peft", "pydantic", "typer", "matplotlib"]
    assert _python(f"import rsaft, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_the_core_loads_no_model_library():
    names = ", ".join(f"rsaft.{name}" for name in sorted(CORE))
    assert _python(f"import {names}, sys; print([m for m in {sorted(MODELS)} if m in sys.modules])") == "[]"


def test_every_public_name_resolves():
    for name in rsaft.__all__:
        assert getattr(rsaft, name) is not None
    assert set(rsaft.__all__) <= set(dir(rsaft))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rsaft.nothing  # noqa: B018
