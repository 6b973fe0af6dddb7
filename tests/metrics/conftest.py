"""Run directories as a training loop leaves them, with a known story: the reward rises, gold rises and then falls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rsaft.metrics import image_grid

PROMPTS = ("a photo of a red coat", "a photo of a <b>blue</b> bag & more", "a photo of a green shoe")


def train_record(step: int, pace: float) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": -0.01 * pace * step,
        "reward/proxy": 0.012 * pace * step + 0.05 * ((step * 7) % 5 - 2),
        "grad_norm": 1.0,
        "lr": 5e-5,
        "nonfinite/reward": int(step == 3),
        "nonfinite/grad": 0,
    }


def sample_scores(step: int, pace: float, shift: float, n: int) -> dict[str, list[float]]:
    """Gold is a parabola in the train reward, `shift` higher for a better run."""
    reward = 0.012 * pace * step
    gold = 0.36 + shift + 0.25 * reward - 0.4 * reward**2
    spread = [0.05 * ((i * 5) % 7 - 3) for i in range(n)]
    return {
        "reward/proxy": [reward + s for s in spread],
        "held_out/vit": [reward * (1 - reward) + s for s in spread],
        "held_out/gold": [gold + s for s in spread],
        "measure/gold/class": [0.7 + s for s in spread],
        "measure/gold/colour": [0.9 - 0.5 * reward + s for s in spread],
        "sharpness/proxy": [1.1 - 0.1 * reward for _ in spread],
    }


def write(
    path: Path, *, steps: int = 100, every: int = 20, pace: float = 1.0, shift: float = 0.0, size: int = 32, n: int = 12
) -> Path:
    (path / "samples").mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            lines.append(train_record(step, pace))
        if step % every:
            continue
        scores = sample_scores(step, pace, shift if step else 0.0, n)
        lines.append({"kind": "eval", "step": step} | {key: sum(v) / n for key, v in scores.items()})
        sample = {
            "step": step,
            "prompts": [PROMPTS[i % 3] for i in range(n)],
            "sample_ids": list(range(n)),
            "scores": scores,
        }
        (path / "samples" / f"step-{step:06d}.json").write_text(json.dumps(sample))
        images = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(step))
        image_grid(images, columns=4).save(path / "samples" / f"step-{step:06d}.png")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    config = {"algorithm": {"type": "draft", "k": 1}, "train": {"lr": 5e-5, "seed": 0, "steps": steps}}
    config["step"] = {"type": "rsaft", "rho_w": 0.1} if shift else {"type": "plain"}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "env.json").write_text(json.dumps({"torch": "2.13.0", "cpu": {"threads": 1}}))
    return path


@pytest.fixture
def write_run() -> Callable[..., Path]:
    return write
