"""Gradients of fp16 networks, scaled so that they do not underflow.

fp16 ends at 6e-8, and a reward's gradient at a latent is often smaller: without a scale the gradient of a tiny model
with a norm of 1e-6 pointed elsewhere (cosine 0.25 with fp32's). Between a network's output and its input everything is
linear in the incoming gradient, so that is multiplied there, and divided again where it leaves: at the input, and at
the trained tensors. bf16 has fp32's range and needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 2.0**14
"""A power of two rounds nothing. Overflow gives a gradient that is not finite, which the loop skips and counts."""


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def entering(x: Tensor) -> Tensor:
    """An input of the fp16 part, in fp32: the gradient that leaves there is divided."""
    return _ScaleGradient.apply(x, 1 / SCALE)


def leaving(x: Tensor) -> Tensor:
    """An output of the fp16 part, back in fp32: the gradient that comes in there is multiplied."""
    return _ScaleGradient.apply(x, SCALE)


def unscale_gradients_of(params: Iterable[nn.Parameter]) -> None:
    """Divide every gradient that reaches these tensors; all of them are to come through `leaving`."""
    for p in params:
        p.register_hook(lambda grad: grad / SCALE)
