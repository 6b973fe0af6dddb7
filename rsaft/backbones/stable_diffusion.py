"""Stable Diffusion 1.x and 2.x: an eps- or v-prediction UNet on 4-channel latents, one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rsaft.backbones.family import Conditioning, Family, latent_size, pair, timesteps
from rsaft.backbones.schedules import ddim_schedule
from rsaft.types import Latents


def encode(pipe: Any, prompts: Sequence[str], max_sequence_length: int | None) -> Conditioning:
    """CLIP's last hidden states; a prompt over the encoder's length (77 tokens) is truncated."""
    text, _ = pipe.encode_prompt(
        list(prompts), device=pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Conditioning(text)


def predict(
    network: Any, x_t: Latents, t: float, conditioning: Conditioning, *, guidance: float, pixels_per_latent: int
) -> Latents:
    """The UNet's output; guidance and size are no inputs of it."""
    return network(x_t, timesteps(t, x_t), encoder_hidden_states=conditioning.text, return_dict=False)[0]


def latent_shape(pipe: Any, resolution: tuple[int, int] | None) -> tuple[int, int, int]:
    """The UNet's channels and, without a resolution, its own size."""
    config = pipe.unet.config
    size = pair(config.sample_size) if resolution is None else latent_size(pipe, resolution)
    return (config.in_channels, *size)


STABLE_DIFFUSION = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    network="unet",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    encode=encode,
    predict=predict,
    schedule=lambda pipe, num_steps, latent_shape: ddim_schedule(pipe.scheduler, num_steps),
    latent_shape=latent_shape,
    # The safety checker alone would read what the feature extractor makes; a merged export names neither.
    load_args={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
)
