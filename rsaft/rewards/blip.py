"""From the published ImageReward state dict (`blip.*`, `mlp.*`) to transformers' BLIP and an MLP; nothing is retrained.

Every tensor is used as it is: only the names change. `blip.vision_proj` and `blip.text_proj` lie in the file too, and
ImageReward never uses them (xu2023, ImageReward/models/BLIP/blip_pretrain.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rsaft.errors import ConfigError

VISION, TEXT, MLP = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
UNUSED = ("blip.vision_proj.", "blip.text_proj.", f"{TEXT}embeddings.position_ids")

_HEAD_WIDTH = 64  # of every attention head, in BLIP's ViT and in BERT
# transformers' names on the left, those of the published ViT on the right; the text encoder's agree already.
_VISION_NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers.", "blocks."),
    ("self_attn.projection", "attn.proj"),
    ("self_attn", "attn"),
    ("layer_norm", "norm"),
    ("post_layernorm", "norm"),
)


class BlipParts(NamedTuple):
    """The networks of ImageReward: image to tokens; text that attends to them; its first token to a raw score."""

    vision: BlipVisionModel
    text: BlipTextModel
    mlp: nn.Sequential


def blip_from_published(weights: Mapping[str, Tensor], path: Path, med_config: Path | None = None) -> BlipParts:
    """The networks that a published state dict holds, in its own dtype and on its own device.

    Args:
        weights: tensors by published name. Sizes are read off their shapes; attention heads are 64 wide.
        path: the file that they come from, for errors.
        med_config: the checkpoint's `med_config.json`, which may say otherwise of the text encoder's heads.

    Raises:
        ConfigError: names the file and the first key that is missing, of another shape, or unknown.
    """
    parts = _without_values(weights, path, med_config)
    for part in parts._fields:
        network = getattr(parts, part)
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        tensors = {name: _fitting(weights, published_name(part, name), shapes[name], path) for name in shapes}
        network.load_state_dict(tensors, assign=True)
    known = {published_name(part, name) for part in parts._fields for name in getattr(parts, part).state_dict()}
    unknown = [key for key in weights if key not in known and not key.startswith(UNUSED)]
    if unknown:
        raise ConfigError(
            f"image_reward: '{path}' holds {len(unknown)} keys like '{unknown[0]}', which ImageReward does not have."
        )
    # The one tensor of the networks that lies in no file.
    embeddings = parts.text.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1], device=parts.text.device)[None]
    return parts


def published_name(part: str, name: str) -> str:
    """What the file calls a tensor of one of `BlipParts`."""
    if part == "vision":
        for ours, theirs in _VISION_NAMES:
            name = name.replace(ours, theirs)
    return {"vision": VISION, "text": TEXT, "mlp": MLP}[part] + name


def _without_values(weights: Mapping[str, Tensor], path: Path, med_config: Path | None) -> BlipParts:
    """The networks on the meta device, of the sizes that the file's shapes say."""
    text, vision = _text_config(weights, path, med_config), _vision_config(weights, path)
    with torch.device("meta"):
        return BlipParts(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), _mlp(text.hidden_size))


def _vision_config(weights: Mapping[str, Tensor], path: Path) -> BlipVisionConfig:
    width, _, patch, _ = _size(weights, f"{VISION}patch_embed.proj.weight", 4, path)
    positions = _size(weights, f"{VISION}pos_embed", 3, path)[1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=_size(weights, f"{VISION}blocks.0.mlp.fc1.weight", 2, path)[0],
        num_hidden_layers=_count(weights, f"{VISION}blocks."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,  # as in the published ViT; transformers' default is another
    )


def _text_config(weights: Mapping[str, Tensor], path: Path, med_config: Path | None) -> BlipTextConfig:
    vocabulary, width = _size(weights, f"{TEXT}embeddings.word_embeddings.weight", 2, path)
    said = {} if med_config is None else json.loads(med_config.read_text())
    layer = f"{TEXT}encoder.layer.0."
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=_size(weights, f"{layer}crossattention.self.key.weight", 2, path)[1],
        intermediate_size=_size(weights, f"{layer}intermediate.dense.weight", 2, path)[0],
        num_hidden_layers=_count(weights, f"{TEXT}encoder.layer."),
        num_attention_heads=said.get("num_attention_heads", width // _HEAD_WIDTH),
        max_position_embeddings=_size(weights, f"{TEXT}embeddings.position_embeddings.weight", 2, path)[0],
        hidden_act=said.get("hidden_act", "gelu"),
        layer_norm_eps=said.get("layer_norm_eps", 1e-12),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )


def _mlp(width: int) -> nn.Sequential:
    """Five linear layers without activations, as published; Identity stands where that has dropout."""
    return nn.Sequential(
        *(nn.Linear(width, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity()),
        *(nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1)),
    )


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers, whose names are numbers from 0."""
    numbers = (key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix))
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)


def _size(weights: Mapping[str, Tensor], key: str, dimensions: int, path: Path) -> tuple[int, ...]:
    """Shape of a tensor that the networks' sizes are read off."""
    shape = tuple(_present(weights, key, path).shape)
    if len(shape) != dimensions:
        raise ConfigError(
            f"image_reward: '{path}', key '{key}' has the shape {shape}; {dimensions} numbers are needed."
        )
    return shape


def _fitting(weights: Mapping[str, Tensor], key: str, shape: torch.Size, path: Path) -> Tensor:
    value = _present(weights, key, path)
    if value.shape != shape:
        raise ConfigError(
            f"image_reward: '{path}', key '{key}' has the shape {tuple(value.shape)}, and the rest of the file needs "
            f"{tuple(shape)}."
        )
    return value


def _present(weights: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    if key not in weights:
        raise ConfigError(
            f"image_reward: '{path}' lacks the key '{key}'; it is no ImageReward checkpoint, which holds {VISION}*, "
            f"{TEXT}* and {MLP}*."
        )
    return weights[key]
