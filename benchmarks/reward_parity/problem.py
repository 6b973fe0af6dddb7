"""What both sides score: pictures, prompts and random weights, the same everywhere. Needs numpy, torch and PIL."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PROMPTS = ("a red cat on a hill", "two dogs in the rain, oil painting", "a small house near the sea at night")
SQUARE, PHOTO = (224, 224), (384, 512)  # height, width; a square needs no resize, so its gradient can be compared
STD = (0.26862954, 0.26130258, 0.27577711)  # OpenAI's deviations: the originals' gradients are to normalised pixels

# ViT-H-14's widths with two layers a tower (1280 / 80 heads wide, 1024 / 64), and all 49,408 words.
CLIP = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 2},
}


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Waves, an edge and noise."""
    draw = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]), indexing="ij")
    waves = np.stack([np.sin(2 * np.pi * (a * x + b * y)) for a, b in draw.uniform(-6, 6, (3, 2))], axis=2)
    values = 0.5 + 0.3 * waves + 0.2 * (x > draw.uniform())[..., None] + draw.normal(0, 0.05, (*size, 3))
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def pictures(size: tuple[int, int]) -> list[Image.Image]:
    return [picture(size, seed) for seed in range(len(PROMPTS))]


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    """(b, 3, h, w) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).float() / 255


def fill(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random values for every tensor of a state dict, by name, of a size that lets each move the score."""
    draw = np.random.default_rng(0)
    filled = {}
    for name in sorted(state):
        value = state[name]
        if not value.is_floating_point() or name.endswith("inv_freq"):  # constants, no weights
            filled[name] = value.clone()
            continue
        if name.endswith("logit_scale"):
            filled[name] = torch.tensor(math.log(100.0))
            continue
        fan = max(1, value[0].numel()) if value.ndim > 1 and "embed" not in name else 16
        noise = torch.from_numpy(draw.standard_normal(tuple(value.shape), dtype=np.float32)) / math.sqrt(fan)
        centre = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
        filled[name] = centre + (0.1 * noise if centre else noise)
    return filled


def arguments(text: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("folder", type=Path, help="where the sides meet")
    parser.add_argument("cases", nargs="*", help="which; all of this side by default")
    return parser.parse_args()


def save(folder: Path, case: str, side: str, values: dict[str, Any], versions: dict[str, str]) -> None:
    """Scores and gradients of a side, as numpy arrays."""
    arrays = {name: value.detach().cpu().numpy() for name, value in values.items()}
    np.savez(folder / f"{case}.{side}.npz", versions=json.dumps(versions), **arrays)
    print(case, side, {name: value.shape for name, value in arrays.items()}, flush=True)
