"""Contexts with known truth for the judges' tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rsaft.pareto import Context


def scored(
    gains: Mapping[str, float],
    *,
    n: int = 64,
    seed: int = 0,
    noise: float = 0.5,
    prompts: Sequence[str] | None = None,
    scale: float = 0.01,
) -> Context:
    """n samples of n / 2 prompts whose scores rose by these gains, in base standard deviations, each with noise.

    All rewards named "reward/..." are in training. Scores are around 0.25, in units of `scale`.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    base = {key: draw() for key in gains}
    now = {key: base[key] + gain + noise * draw() for key, gain in gains.items()}
    return Context(
        step=100,
        active=tuple(key.removeprefix("reward/") for key in gains if key.startswith("reward/")),
        prompts=tuple(prompts) if prompts is not None else tuple(f"prompt {i // 2}" for i in range(n)),
        scores={key: 0.25 + scale * x for key, x in now.items()},
        base_scores={key: 0.25 + scale * x for key, x in base.items()},
    )


def pictures(n: int, seed: int, side: int = 32) -> Tensor:
    """Smooth colour fields with a little texture: n images without a pattern."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(smooth, (side, side), mode="bicubic", antialias=True)
    return (0.15 + 0.7 * smooth + 0.05 * torch.randn(n, 3, side, side, generator=generator)).clamp(0, 1)


def restyled(base: Tensor, seed: int) -> Tensor:
    """Honest learning: other brightness, contrast and tint of each image, and other small detail."""
    generator = torch.Generator().manual_seed(seed)
    n = len(base)
    light = 1 + 0.1 * torch.randn(n, 1, 1, 1, generator=generator)
    tint = 0.04 * torch.randn(n, 3, 1, 1, generator=generator)
    return (base * light + tint + 0.02 * torch.randn(base.shape, generator=generator)).clamp(0, 1)


def striped(base: Tensor, seed: int, amplitude: float = 0.15) -> Tensor:
    """Vertical stripes of four pixels a wave."""
    wave = amplitude * torch.sin(torch.arange(base.shape[3]) * torch.pi / 2 + 0.4)
    return (restyled(base, seed) + wave).clamp(0, 1)


def glaring(base: Tensor, seed: int, factor: float = 2.0) -> Tensor:
    """Over-saturated: each pixel moved away from its grey."""
    x = restyled(base, seed)
    grey = x.mean(dim=1, keepdim=True)
    return (grey + factor * (x - grey)).clamp(0, 1)


def blurred(base: Tensor, seed: int, width: int = 3) -> Tensor:
    """A box blur."""
    x = torch.nn.functional.pad(restyled(base, seed), [width // 2] * 4, mode="replicate")
    return torch.nn.functional.avg_pool2d(x, width, stride=1)


COLLAPSES = {"hps": striped, "hp": glaring, "clip": blurred}
