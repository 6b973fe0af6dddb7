"""Stable Diffusion 1.x and 2.x: an eps- or v-prediction UNet on 4-channel latents, one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor, nn

from rsaft.backbones.decode import to_images
from rsaft.backbones.lora import LoRA
from rsaft.backbones.schedules import ddim_schedule
from rsaft.schedules import Schedule
from rsaft.types import Denoiser, Images, Latents


class StableDiffusion:
    """A `StableDiffusionPipeline` as a Backbone. Text encoder and VAE are frozen; everything is in eval mode.

    Attributes:
        pipe: the pipeline; a user may call it as usual, it shares the trained weights.
        network: the UNet.
        lora: settings of the adapter that is trained, or None for full fine-tuning.
        source: path or hub id that the pipeline was loaded from.
    """

    def __init__(self, pipe: Any, *, lora: LoRA | None, compute_dtype: torch.dtype, source: str) -> None:
        self.pipe = pipe  # Any: diffusers sets a pipeline's parts at run time
        self.network: Any = pipe.unet
        self.lora = lora
        self.source = source
        self._compute_dtype = compute_dtype
        self._scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.network.config.sample_size
        return (self.network.config.in_channels, size, size)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self._compute_dtype == torch.float64 else torch.float32

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def schedule(self, num_steps: int) -> Schedule:
        return ddim_schedule(self._scheduler, num_steps)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Float[Tensor, "b tokens d"]:
        """Text embeddings; a prompt over the encoder's length (77 tokens for CLIP) is truncated."""
        tokens = self.pipe.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.pipe.text_encoder(tokens.input_ids.to(self.device))[0]

    def denoiser(self, prompts: Sequence[str], *, guidance: float, detach_unconditional: bool) -> Denoiser:
        """The guided network for the prompts; one network call an evaluation (two with a detached branch).

        eps = eps_uncond + w (eps_cond - eps_uncond) (Ho & Salimans, 2022); w = 1 skips the unconditional branch.
        """
        cond = self.encode(prompts)
        if guidance == 1:
            return lambda x_t, t: self._network(x_t, t, cond)
        uncond = self.encode([""]).expand_as(cond)

        def joint(x_t: Latents, t: float) -> Latents:
            eps_uncond, eps_cond = self._network(torch.cat([x_t, x_t]), t, torch.cat([uncond, cond])).chunk(2)
            return eps_uncond + guidance * (eps_cond - eps_uncond)

        def detached(x_t: Latents, t: float) -> Latents:
            with torch.no_grad():
                eps_uncond = self._network(x_t, t, uncond)
            return eps_uncond + guidance * (self._network(x_t, t, cond) - eps_uncond)

        return detached if detach_unconditional else joint

    def _network(self, x_t: Latents, t: float, text: Float[Tensor, "b tokens d"]) -> Latents:
        half = self._compute_dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(x_t.device.type, dtype=self._compute_dtype) if half else nullcontext():
            out = self.network(x_t, t, encoder_hidden_states=text, return_dict=False)[0]
        return out.to(x_t.dtype)

    def decode(self, latents: Latents) -> Images:
        vae = self.pipe.vae
        z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return to_images(vae.decode(z.to(vae.dtype), return_dict=False)[0])
