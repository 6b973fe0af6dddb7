"""Stable Diffusion 3 and 3.5 (Medium, Large): a flow transformer on 16-channel latents, two CLIP encoders and a T5.

Esser et al., 2024, "Scaling rectified flow transformers for high-resolution image synthesis".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rsaft.backbones.family import Conditioning, Family, latent_size, pair, timesteps
from rsaft.backbones.schedules import flow_schedule, resolution_shift
from rsaft.errors import ConfigError
from rsaft.schedules import Schedule
from rsaft.types import Latents

MAX_T5_TOKENS = 256


def encode(pipe: Any, prompts: Sequence[str], max_sequence_length: int | None) -> Conditioning:
    """CLIP's hidden states (padded to T5's width) above T5's; both CLIP encoders' pooled embeddings side by side.

    A checkpoint without its T5 (text_encoder_3) gives zeros in T5's place, as in diffusers.
    """
    length = max_sequence_length
    if length is None:
        length = MAX_T5_TOKENS if pipe.tokenizer_3 is None else min(MAX_T5_TOKENS, pipe.tokenizer_3.model_max_length)
    text, _, pooled, _ = pipe.encode_prompt(
        list(prompts),
        None,
        None,
        device=pipe.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
    )
    return Conditioning(text, pooled)


def predict(
    network: Any, x_t: Latents, t: float, conditioning: Conditioning, *, guidance: float, pixels_per_latent: int
) -> Latents:
    """The transformer's velocity; guidance and size are no inputs of it."""
    return network(
        hidden_states=x_t,
        timestep=timesteps(t, x_t),
        encoder_hidden_states=conditioning.text,
        pooled_projections=conditioning.pooled,
        return_dict=False,
    )[0]


def schedule(pipe: Any, num_steps: int, latent_shape: tuple[int, int, int]) -> Schedule:
    """The checkpoint's shifted grid; the shift depends on the resolution only where its scheduler says so."""
    patch = pipe.transformer.config.patch_size
    tokens = (latent_shape[1] // patch) * (latent_shape[2] // patch)
    return flow_schedule(pipe.scheduler, num_steps, mu=resolution_shift(pipe.scheduler, tokens))


def latent_shape(pipe: Any, resolution: tuple[int, int] | None) -> tuple[int, int, int]:
    """The transformer's channels and, without a resolution, its own size.

    Raises:
        ConfigError: if the pixels do not divide, or go past the transformer's table of positions.
    """
    config = pipe.transformer.config
    if resolution is None:
        return (config.in_channels, *pair(config.sample_size))
    size = latent_size(pipe, resolution, patch=config.patch_size)
    if max(size) > config.pos_embed_max_size * config.patch_size:
        most = config.pos_embed_max_size * config.patch_size * pipe.vae_scale_factor
        raise ConfigError(
            f"resolution: this model's table of positions ends at {most} pixels of height and width; got {resolution}."
        )
    return (config.in_channels, *size)


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    network="transformer",
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
    # Attention of the image and of the text; the ends also match 3.5 Medium's second attention (attn2).
    lora_targets=(
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    ),
    encode=encode,
    predict=predict,
    schedule=schedule,
    latent_shape=latent_shape,
    optional=("text_encoder_3", "tokenizer_3"),
)
