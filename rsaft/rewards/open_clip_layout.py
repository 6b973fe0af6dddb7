"""Weights of CLIP under open_clip's names become transformers' and back, exactly; and the architecture, from shapes.

The two libraries hold the same numbers: open_clip joins the projections of queries, keys and values, and stores the two
last projections transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import take

Activation = Literal["gelu", "quick_gelu"]

OPEN_CLIP_KEY, TRANSFORMERS_KEY = "visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"
"""A key that tells whose names a checkpoint uses."""

_SINGLE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": TRANSFORMERS_KEY,
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_TOWERS = {
    "transformer.resblocks": "text_model.encoder.layers",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")

# Width of a head by the tower's width, where it is not 64 (open_clip's configurations of ViT-H, g and bigG).
_HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}


def to_transformers(weights: Mapping[str, Tensor], path: Path, reward: str) -> dict[str, Tensor]:
    """The weights of an open_clip CLIP under transformers' names.

    Raises:
        ConfigError: names the file and the first key that is missing or left over.
    """
    rest, result = dict(weights), {}
    for theirs, ours in _SINGLE.items():
        result[ours] = take(rest, theirs, path, reward)
    for theirs, ours in _TRANSPOSED.items():
        result[ours] = take(rest, theirs, path, reward).T
    for theirs, ours in _TOWERS.items():
        for i in range(_num_layers(rest, theirs)):
            for kind in ("weight", "bias"):
                joined = take(rest, f"{theirs}.{i}.attn.in_proj_{kind}", path, reward)
                for name, part in zip(_PROJECTIONS, joined.chunk(3), strict=True):
                    result[f"{ours}.{i}.self_attn.{name}.{kind}"] = part
                for a, b in _BLOCK.items():
                    result[f"{ours}.{i}.{b}.{kind}"] = take(rest, f"{theirs}.{i}.{a}.{kind}", path, reward)
    if rest:
        raise ConfigError(f"{reward}: '{path}' holds the key '{next(iter(rest))}', which no CLIP of open_clip has.")
    return result


def to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_transformers`, for complete weights."""
    result = {theirs: weights[ours] for theirs, ours in _SINGLE.items()}
    result |= {theirs: weights[ours].T for theirs, ours in _TRANSPOSED.items()}
    for theirs, ours in _TOWERS.items():
        for i in range(_num_layers(weights, ours)):
            for kind in ("weight", "bias"):
                parts = [weights[f"{ours}.{i}.self_attn.{name}.{kind}"] for name in _PROJECTIONS]
                result[f"{theirs}.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
                for a, b in _BLOCK.items():
                    result[f"{theirs}.{i}.{a}.{kind}"] = weights[f"{ours}.{i}.{b}.{kind}"]
    return result


def architecture(weights: Mapping[str, Tensor], activation: Activation) -> dict[str, Any]:
    """Arguments of transformers' CLIPConfig for weights under its names.

    Shapes do not tell the number of heads, which follows open_clip's rule (64 wide; 80 in ViT-H's image tower), nor the
    activation.
    """
    patches = weights[TRANSFORMERS_KEY].shape
    projection = weights["visual_projection.weight"].shape[0]
    grid = isqrt(weights["vision_model.embeddings.position_embedding.weight"].shape[0] - 1)
    words, context = (weights[f"text_model.embeddings.{name}_embedding.weight"].shape for name in ("token", "position"))
    return {
        "projection_dim": projection,
        "vision_config": {
            **_tower(weights, "vision_model", patches[0], activation),
            "patch_size": patches[-1],
            "image_size": grid * patches[-1],
        },
        "text_config": {
            **_tower(weights, "text_model", words[1], activation),
            "vocab_size": words[0],
            "max_position_embeddings": context[0],
            "bos_token_id": None,
            "eos_token_id": 2,  # transformers then pools where the id is largest, as open_clip does
        },
    }


def _tower(weights: Mapping[str, Tensor], name: str, width: int, activation: Activation) -> dict[str, Any]:
    prefix = f"{name}.encoder.layers"
    return {
        "hidden_size": width,
        "intermediate_size": weights[f"{prefix}.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _num_layers(weights, prefix),
        "num_attention_heads": max(1, width // _HEAD_WIDTH.get(width, 64)),
        "hidden_act": activation,
    }


def _num_layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return 1 + max((int(found[1]) for key in weights if (found := pattern.match(key))), default=0)
