"""Reward models as plain callables (images in [0, 1], prompts) -> (b,), differentiable to the images.

The public names below are resolved when first used: `import rsaft.rewards` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AestheticScore": "rsaft.rewards.aesthetic",
    "CLIPScore": "rsaft.rewards.clip_score",
    "HP": "rsaft.rewards.hp",
    "HPSv2": "rsaft.rewards.hpsv2",
    "ICT": "rsaft.rewards.ict",
    "ImageReward": "rsaft.rewards.image_reward",
    "MPS": "rsaft.rewards.mps",
    "PickScore": "rsaft.rewards.pickscore",
    "RemoteReward": "rsaft.rewards.remote",
    "VLMReward": "rsaft.rewards.vlm",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rsaft.rewards' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
