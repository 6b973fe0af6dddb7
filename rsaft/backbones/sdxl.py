"""Stable Diffusion XL: an eps- or v-prediction UNet, two CLIP text encoders, and the image's size as an input.

Podell et al., 2023, "SDXL": the second encoder's pooled embedding and six numbers (original size, crop, target size)
are added to the timestep's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rsaft.backbones.family import Conditioning, Family, timesteps
from rsaft.backbones.schedules import ddim_schedule
from rsaft.backbones.stable_diffusion import latent_shape
from rsaft.types import Latents


def encode(pipe: Any, prompts: Sequence[str], max_sequence_length: int | None) -> Conditioning:
    """Both encoders' penultimate hidden states side by side, and the second one's pooled embedding."""
    text, _, pooled, _ = pipe.encode_prompt(
        list(prompts), device=pipe.text_encoder_2.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Conditioning(text, pooled)


def predict(
    network: Any, x_t: Latents, t: float, conditioning: Conditioning, *, guidance: float, pixels_per_latent: int
) -> Latents:
    """The UNet's output for an image that was never cropped and has the size asked for."""
    height, width = (pixels_per_latent * cells for cells in x_t.shape[-2:])
    size = x_t.new_tensor([height, width, 0, 0, height, width]).expand(len(x_t), -1)
    return network(
        x_t,
        timesteps(t, x_t),
        encoder_hidden_states=conditioning.text,
        added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": size},
        return_dict=False,
    )[0]


SDXL = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    network="unet",
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    encode=encode,
    predict=predict,
    schedule=lambda pipe, num_steps, latent_shape: ddim_schedule(pipe.scheduler, num_steps),
    latent_shape=latent_shape,
    zero_unconditional=lambda pipe: bool(pipe.config.force_zeros_for_empty_prompt),
    vae_overflows=True,
    load_args={"add_watermarker": False},
)
