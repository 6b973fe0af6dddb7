"""From the range of a VAE to images in [0, 1] without losing the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsaft.types import Images


class _StraightThroughClamp(torch.autograd.Function):
    """Clamped value, identity gradient: a plain clamp would cut the gradient at every saturated pixel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def to_images(decoded: Tensor) -> Images:
    """Images in [0, 1] from a decoder's [-1, 1], at least fp32 (a perturbation of 1e-2 drowns in half precision)."""
    decoded = decoded if decoded.dtype == torch.float64 else decoded.float()
    return _StraightThroughClamp.apply(decoded / 2 + 0.5)
