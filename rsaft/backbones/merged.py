"""The trained model as an ordinary diffusers folder, its adapter added to the weights; the live model is untouched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsaft.backbones.lora import ADAPTER
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.backbones.quiet import silent_bars
from rsaft.backbones.round_trip import layer_update
from rsaft.errors import ConfigError


def save_merged(backbone: DiffusersBackbone, folder: Path) -> dict[str, Tensor]:
    """Write the whole pipeline into `folder`, with W + (alpha / rank) B A where an adapter lies.

    The sum is taken in at least fp32 and rounded once, to the network's own precision.

    Returns:
        The network's tensors as they were written; those that no adapter lies on are the live ones.

    Raises:
        ConfigError: if the text encoders were dropped, so that the pipeline is not whole.
    """
    if getattr(backbone.pipe, backbone.family.text_encoders[0]) is None:
        raise ConfigError(
            "format merged writes the whole pipeline, and its text encoders were dropped from memory; load the "
            "backbone again, or export it in another format."
        )
    tensors = _merged_tensors(backbone.network)
    with torch.device("meta"):
        network = type(backbone.network).from_config(backbone.network.config)
    network.load_state_dict(tensors, assign=True)
    pipe = copy.copy(backbone.pipe)  # shares every part but the one that is put in its place
    setattr(pipe, backbone.family.network, network)
    with silent_bars():
        pipe.save_pretrained(folder, safe_serialization=True)
    return tensors


@torch.no_grad()
def _merged_tensors(network: Any) -> dict[str, Tensor]:
    """The network's tensors under the checkpoint's names, new ones only where an adapter lies."""
    from peft.tuners.lora import LoraLayer

    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            weight = tensors[f"{name}.weight"]
            update = layer_update(layer)
            tensors[f"{name}.weight"] = (weight.to(update.dtype) + update).to(weight.dtype)
    return tensors
