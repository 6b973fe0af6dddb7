"""rsaft: fine-tune text-to-image diffusion and flow models with rewards, without letting the reward be hacked.

The public names below are resolved when first used: `import rsaft` does no work.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_backbone": "rsaft.backbones",
    "LoRA": "rsaft.backbones",
    "Trainer": "rsaft.rdrl.loop",
    "TrainConfig": "rsaft.rdrl.train_config",
    "RunResult": "rsaft.rdrl.run_result",
    "Sampling": "rsaft.sampling",
    "sample": "rsaft.sampling",
}
_PACKAGES = ("backbones", "errors", "flatten", "metrics", "pareto", "rdrl", "rewards", "testbed", "types")

__all__ = [*_HOMES, *_PACKAGES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"rsaft.{name}")
    raise AttributeError(f"module 'rsaft' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
