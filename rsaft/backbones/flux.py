"""Flux.1: a flow transformer on packed 16-channel latents, a CLIP encoder and a T5; guidance is one of its inputs.

Black Forest Labs, 2024. Flux.1-dev is distilled from guided sampling: `guidance` is embedded, one network call a step.
Flux.1-schnell has no such input and is used without guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.backbones.family import Conditioning, Family, latent_size, pair, timesteps
from rsaft.backbones.schedules import flow_schedule, resolution_shift
from rsaft.errors import ConfigError
from rsaft.schedules import Schedule
from rsaft.types import Latents

MAX_T5_TOKENS = 512
PATCH = 2  # a token is a patch of 2 x 2 latents


def encode(pipe: Any, prompts: Sequence[str], max_sequence_length: int | None) -> Conditioning:
    """T5's last hidden states, and CLIP's pooled embedding."""
    text, pooled, _ = pipe.encode_prompt(
        list(prompts),
        device=pipe.text_encoder.device,
        max_sequence_length=max_sequence_length or min(MAX_T5_TOKENS, pipe.tokenizer_2.model_max_length),
    )
    return Conditioning(text, pooled)


def pack(x: Latents) -> Float[Tensor, "b tokens d"]:
    """Patches of 2 x 2 latents as tokens of 4 c numbers."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Float[Tensor, "b tokens d"], shape: Sequence[int]) -> Latents:
    """Latents of `shape` (b, c, h, w) from their tokens; the inverse of `pack`."""
    b, c, h, w = shape
    return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def positions(x: Latents) -> Float[Tensor, "tokens 3"]:
    """(0, row, column) of each token."""
    rows = torch.arange(x.shape[-2] // 2, device=x.device, dtype=x.dtype)
    columns = torch.arange(x.shape[-1] // 2, device=x.device, dtype=x.dtype)
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


def predict(
    network: Any, x_t: Latents, t: float, conditioning: Conditioning, *, guidance: float, pixels_per_latent: int
) -> Latents:
    """The transformer's velocity.

    Raises:
        ConfigError: if a network without a guidance embedding is asked for guidance.
    """
    embeds_guidance = network.config.guidance_embeds
    if not embeds_guidance and guidance != 1:
        raise ConfigError(
            f"sampling.guidance: this Flux has no guidance embedding (as Flux.1-schnell), so guidance is 1; "
            f"got {guidance}."
        )
    velocity = network(
        hidden_states=pack(x_t),
        timestep=timesteps(t, x_t) / 1000,
        guidance=timesteps(guidance, x_t) if embeds_guidance else None,
        pooled_projections=conditioning.pooled,
        encoder_hidden_states=conditioning.text,
        txt_ids=x_t.new_zeros(conditioning.text.shape[1], 3),
        img_ids=positions(x_t),
        return_dict=False,
    )[0]
    return unpack(velocity, x_t.shape)


def schedule(pipe: Any, num_steps: int, latent_shape: tuple[int, int, int]) -> Schedule:
    """sigma from 1 to 1 / num_steps in equal steps, shifted by the resolution where the scheduler says so."""
    tokens = latent_shape[1] * latent_shape[2] // PATCH**2
    sigmas = None
    if not pipe.scheduler.config.get("use_flow_sigmas", False):
        sigmas = torch.linspace(1.0, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    return flow_schedule(pipe.scheduler, num_steps, mu=resolution_shift(pipe.scheduler, tokens), sigmas=sigmas)


def latent_shape(pipe: Any, resolution: tuple[int, int] | None) -> tuple[int, int, int]:
    """The autoencoder's channels and, without a resolution, its own size (1024 pixels in Flux.1)."""
    size = latent_size(pipe, resolution or pair(pipe.vae.config.sample_size), patch=PATCH)
    return (pipe.transformer.config.in_channels // PATCH**2, *size)


FLUX = Family(
    name="flux",
    pipeline="FluxPipeline",
    network="transformer",
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    # Attention of the image and of the text, in the double-stream and the single-stream blocks.
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
    classifier_free=False,
)
