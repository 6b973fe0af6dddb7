"""The head of the LAION aesthetic predictor and of HP: five linear layers, with only dropout between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsaft.rewards.checkpoint import load_strictly, read_weights, take
from rsaft.rewards.frozen import Frozen, wide

LAYERS = (0, 2, 4, 6, 7)
"""Where the linear layers lie in the published sequences; dropouts are between, which do nothing at test time."""


class LinearHead(Frozen):
    """Features (b, d) -> (b,). Without activations it is one affine map, computed layer by layer as published."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {str(i): nn.Linear(a, b) for i, a, b in zip(LAYERS, widths[:-1], widths[1:], strict=True)}
        )

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """One number for each row, in fp32 at least."""
        x = wide(features)
        for layer in self.layers.values():
            x = layer(x)
        return x.squeeze(1)


def load_head(path: Path, reward: str, *, device: torch.device, dtype: torch.dtype) -> LinearHead:
    """The head in a file with the keys `layers.0.weight`, ..., `layers.7.bias`; its widths follow from the shapes.

    It is small, so it is kept in fp32 whatever half precision `dtype` names.

    Raises:
        ConfigError: names the file and the key that is missing, unknown, or does not fit.
    """
    weights = read_weights(path, reward)
    with torch.device("meta"):
        head = LinearHead(_widths(weights, path, reward))
    dtype = torch.promote_types(dtype, torch.float32)
    load_strictly(head, {k: v.to(device, dtype, copy=True) for k, v in weights.items()}, path, reward)
    head.freeze()
    return head


def _widths(weights: Mapping[str, Tensor], path: Path, reward: str) -> tuple[int, ...]:
    shapes = [take(dict(weights), f"layers.{i}.weight", path, reward).shape for i in LAYERS]
    return (shapes[0][1], *(shape[0] for shape in shapes))
