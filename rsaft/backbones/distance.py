"""How far training has moved a model's weights from the model as it was loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rsaft.backbones.lora import ADAPTER
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.distributed import is_sharded


@torch.no_grad()
def weight_distance(backbone: DiffusersBackbone) -> float | None:
    """||W - W_base|| / ||W_base|| over the weights that training can move, adapters merged.

    Returns:
        None where the base is not at hand: a network trained whole without `keep_base`, or sharded.

    Cost: with an adapter, B A of each layer, one after the other; no copy of the network.
    """
    moved = base = 0.0
    for delta, weight in _adapted(backbone) if backbone.lora is not None else _copied(backbone):
        moved += float(delta.double().square().sum())
        base += float(weight.double().square().sum())
    return math.sqrt(moved / base) if base else None


def _adapted(backbone: DiffusersBackbone) -> Iterator[tuple[Tensor, Tensor]]:
    """What each adapted layer's weight has moved by, and that weight."""
    from peft.tuners.lora import LoraLayer

    for layer in backbone.network.modules():
        if isinstance(layer, LoraLayer):
            yield layer.get_delta_weight(ADAPTER), layer.get_base_layer().weight


def _copied(backbone: DiffusersBackbone) -> Iterator[tuple[Tensor, Tensor]]:
    trained = backbone.parameters()
    if backbone.kept_base is None or any(is_sharded(p) for p in trained):
        return
    for p, before in zip(trained, backbone.kept_base.parameters(), strict=True):
        yield p - before, before
