"""A frozen CLIP: features of pixels and prompts, and their cosine in fp32. What most rewards here are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import Source, beside, find_file, load_strictly, read_weights
from rsaft.rewards.clip_tokens import Cleaning, ClipTokens, check_tokens, load_tokens
from rsaft.rewards.frozen import Frozen, Precision, network_device, network_dtype, wide
from rsaft.rewards.open_clip_layout import (
    OPEN_CLIP_KEY,
    TRANSFORMERS_KEY,
    Activation,
    architecture,
    to_transformers,
)

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class Clip(Protocol):
    """What rewards need of a CLIP, whichever library runs it."""

    size: int  # side of the images that it reads, in pixels
    scale: float  # exp(logit_scale) of the checkpoint

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]: ...

    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]: ...


class FrozenClip(Frozen):
    """transformers' CLIPModel, only read. `text_features` has no graph: no reward needs one."""

    def __init__(self, network: Any, tokens: ClipTokens | None, scale: float) -> None:
        super().__init__()
        self.network, self.tokens, self.scale = network, tokens, scale
        self.size = int(network.config.vision_config.image_size)
        self.freeze()

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """Projected features of normalised pixels, in the network's dtype and not normalised."""
        weight = self.network.visual_projection.weight
        return pooled(self.network.get_image_features(pixel_values=pixels.to(weight.device, weight.dtype)))

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Projected features of prompts, in the network's dtype and not normalised."""
        return pooled(self.network.get_text_features(input_ids=self.token_ids(prompts)))

    def token_ids(self, prompts: Sequence[str]) -> Int[Tensor, "b n"]:
        """The tokens of prompts, on the network's device."""
        if self.tokens is None:
            raise ConfigError("this CLIP was loaded without its text tower: it reads no prompts.")
        return self.tokens(prompts).to(self.network.text_projection.weight.device)


def cosine(image: Float[Tensor, "b d"], text: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Cosine of each image with its own text, in fp32: a bf16 dot product leaves 105 different values of 4096."""
    return (unit(image) * unit(text)).sum(dim=-1)


def unit(features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Features of length 1, in fp32 at least."""
    return F.normalize(wide(features), dim=-1)


def load_clip(
    checkpoint: Source,
    *,
    reward: str,
    files: Sequence[str] = WEIGHT_FILES,
    device: str | torch.device | None = None,
    dtype: Precision | torch.dtype = "fp32",
    tokenizer: Source | None = None,
    default_tokenizer: Source | None = None,
    clean: Cleaning | None = None,
    activation: Activation = "gelu",
    reads_text: bool = True,
) -> FrozenClip:
    """A frozen CLIP from weights under open_clip's or transformers' names.

    Args:
        checkpoint: hub id, folder, or file.
        reward: name for the messages.
        files: what the weights may be called in a folder or on the hub.
        device: where to put it; this process's GPU if there is one.
        dtype: of its weights and arithmetic.
        tokenizer: folder or hub id; None looks beside the weights and then takes `default_tokenizer`.
        default_tokenizer: None is `checkpoint` itself.
        clean: what is done with prompts before they are tokenized.
        activation: of a checkpoint without config.json; weights do not tell.
        reads_text: False needs no tokenizer.

    Raises:
        ConfigError: in one sentence, if something is missing or does not fit.
    """
    path = find_file(checkpoint, files, reward)
    return clip_of(
        named_as_transformers(read_weights(path, reward), path, reward),
        path,
        checkpoint,
        reward=reward,
        device=network_device(device),
        dtype=network_dtype(dtype, reward),
        tokenizer=tokenizer,
        default_tokenizer=default_tokenizer,
        clean=clean,
        activation=activation,
        reads_text=reads_text,
    )


def clip_of(
    weights: Mapping[str, Tensor],
    path: Path,
    source: Source,
    *,
    reward: str,
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: Source | None = None,
    default_tokenizer: Source | None = None,
    clean: Cleaning | None = None,
    activation: Activation = "gelu",
    reads_text: bool = True,
) -> FrozenClip:
    """As `load_clip`, of weights that were read from `path` and have transformers' names; `source` is what was asked.

    Raises:
        ConfigError: as `load_clip`.
    """
    network = build(weights, path, clip_config(weights, path, source, activation, reward), device, dtype, reward)
    scale = float(weights["logit_scale"].float().exp())  # not of the network: bf16 makes 98.9 of 100
    if not reads_text:
        network.text_model = network.text_projection = None  # frees its memory
        return FrozenClip(network, None, scale)
    text = network.config.text_config
    fallback = source if default_tokenizer is None else default_tokenizer
    tokens = load_tokens(tokenizer, path.parent, fallback, text.max_position_embeddings, reward, clean)
    check_tokens(tokens, text.vocab_size, text.eos_token_id, reward)
    return FrozenClip(network, tokens, scale)


def named_as_transformers(weights: Mapping[str, Tensor], path: Path, reward: str) -> dict[str, Tensor]:
    """CLIP weights of either library under transformers' names.

    Raises:
        ConfigError: if they are neither's.
    """
    if OPEN_CLIP_KEY in weights:
        return to_transformers(weights, path, reward)
    if TRANSFORMERS_KEY in weights:
        # Files of transformers before 4.31 also hold the positions 0, 1, 2, ..., which are no weights.
        return {key: value for key, value in weights.items() if not key.endswith(".position_ids")}
    raise ConfigError(
        f"{reward}: '{path}' holds neither '{OPEN_CLIP_KEY}' (open_clip) nor '{TRANSFORMERS_KEY}' (transformers); its "
        f"first key is '{next(iter(weights))}', and this is no CLIP."
    )


def clip_config(weights: Mapping[str, Tensor], path: Path, source: Source, activation: Activation, reward: str) -> Any:
    """The CLIPConfig beside the weights if there is one, else one from their shapes.

    Raises:
        ConfigError: if the weights lack a key that says a size.
    """
    from transformers import CLIPConfig

    found = beside(path, source, "config.json")
    if found is not None:
        settings, _ = CLIPConfig.get_config_dict(str(found.parent))
        if settings.get("model_type") == "clip":
            return CLIPConfig.from_dict(settings)
    try:
        return CLIPConfig(**architecture(weights, activation))
    except KeyError as error:
        raise ConfigError(f"{reward}: '{path}' lacks the key {error}; it is no checkpoint of this model.") from error


def build(
    weights: Mapping[str, Tensor], path: Path, config: Any, device: torch.device, dtype: torch.dtype, reward: str
) -> Any:
    """transformers' CLIPModel with these weights; random ones are never made.

    Raises:
        ConfigError: names the key that does not fit.
    """
    from transformers import CLIPModel

    with torch.device("meta"):
        network = CLIPModel(config)
    load_strictly(network, {k: v.to(device, dtype, copy=True) for k, v in weights.items()}, path, reward)
    for tower in (network.text_model, network.vision_model):  # positions 0, 1, 2, ... are no part of a state dict
        length = tower.embeddings.position_embedding.num_embeddings
        tower.embeddings.position_ids = torch.arange(length, device=device).expand(1, -1)
    return network


def pooled(output: Any) -> Tensor:
    """transformers 4 returns the features, transformers 5 an output that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output
