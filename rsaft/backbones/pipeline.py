"""`DiffusersBackbone`: a diffusers pipeline of any supported family as a Backbone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rsaft.backbones import prompt_cache as cache
from rsaft.backbones.decode import decode
from rsaft.backbones.family import Conditioning, Family, stacked
from rsaft.backbones.half import entering, leaving, unscale_gradients_of
from rsaft.backbones.lora import LoRA
from rsaft.backbones.quiet import silent_truncation
from rsaft.errors import ConfigError
from rsaft.schedules import Schedule
from rsaft.types import Denoiser, Images, Latents


class DiffusersBackbone:
    """A pipeline as a Backbone. Text encoders and VAE are frozen; everything is in eval mode.

    Attributes:
        pipe: the pipeline; a user may call it as usual, it shares the trained weights.
        family: what is peculiar to its family.
        network: the denoiser that is trained, a UNet or a transformer.
        lora: settings of the adapter that is trained, or None for full fine-tuning.
        source: path or hub id that the pipeline was loaded from.
        compute_dtype: precision of the network's arithmetic.
        latent_shape: (channels, height, width).
        kept_base: a copy of the network as it was loaded, or None; an adapter needs none.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        *,
        lora: LoRA | None,
        source: str,
        compute_dtype: torch.dtype,
        resolution: tuple[int, int] | None = None,
        negative_prompt: str | None = None,
        max_sequence_length: int | None = None,
        prompt_cache: Path | None = None,
        keep_base: bool = False,
    ) -> None:
        self.pipe = pipe  # Any: diffusers sets a pipeline's parts at run time
        self.family = family
        self.network: Any = getattr(pipe, family.network)
        self.lora = lora
        self.source = source
        self.compute_dtype = compute_dtype
        self.latent_shape = family.latent_shape(pipe, resolution)
        if compute_dtype == torch.float16:
            unscale_gradients_of(self.parameters())
        self._negative_prompt = negative_prompt
        self._max_sequence_length = max_sequence_length
        self._has_text_encoders = True
        self.kept_base = deepcopy(self.network).requires_grad_(False) if keep_base and lora is None else None
        self._cache = (
            None if prompt_cache is None else cache.open_cache(prompt_cache, pipe, family, max_sequence_length)
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def schedule(self, num_steps: int) -> Schedule:
        return self.family.schedule(self.pipe, num_steps, self.latent_shape)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the text encoders say of the prompts, from the prompt cache where there is one.

        A prompt over an encoder's length (CLIP: 77 tokens) is cut there, in silence.

        Raises:
            ConfigError: if a prompt is not in the cache and the text encoders were dropped.
        """
        if self._cache is None:
            found = self._encode(prompts)
        else:
            found = cache.cached(self._cache, prompts, self._encode)
        return found.to(self.device, self.dtype)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        if not self._has_text_encoders:
            raise ConfigError(
                f"prompt {prompts[0]!r:.60}: it is not in the prompt cache, and the text encoders were dropped; "
                "pass it to cache_prompts before drop_text_encoders."
            )
        with silent_truncation():
            return self.family.encode(self.pipe, prompts, self._max_sequence_length)

    @torch.no_grad()
    def cache_prompts(self, prompts: Sequence[str], *, batch_size: int = 16) -> None:
        """Encode the prompts that the prompt cache lacks, and what guidance and exports need besides.

        Raises:
            ConfigError: if the backbone was loaded without `prompt_cache`.
        """
        if self._cache is None:
            raise ConfigError("cache_prompts: this backbone has no prompt cache; give load_backbone a prompt_cache.")
        wanted = list(dict.fromkeys([*prompts, "", self._negative_prompt or ""]))
        for first in range(0, len(wanted), batch_size):
            cache.cached(self._cache, wanted[first : first + batch_size], self._encode)

    def drop_text_encoders(self) -> None:
        """Take the text encoders out of memory; from now on prompts come from the prompt cache alone.

        Raises:
            ConfigError: if the backbone was loaded without `prompt_cache`.
        """
        self.cache_prompts([])
        for name in self.family.text_encoders:
            setattr(self.pipe, name, None)
        self._has_text_encoders = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def denoiser(self, prompts: Sequence[str], *, guidance: float, detach_unconditional: bool) -> Denoiser:
        """The guided network for the prompts; one network call an evaluation (two with a detached branch).

        u = u_uncond + w (u_cond - u_uncond) (Ho & Salimans, 2022); w = 1 skips the unconditional branch. Where the
        family is distilled from guided samples, w is an input of the network, and there is one branch only.
        """
        cond = self.encode(prompts)
        if detach_unconditional and not self.family.classifier_free:
            warnings.warn(
                f"sampling.detach_unconditional: {self.family.pipeline} has no unconditional branch, so this changes "
                "nothing; leave it out.",
                stacklevel=2,
            )
        if guidance == 1 or not self.family.classifier_free:
            return lambda x_t, t: self._predict(x_t, t, cond, guidance)
        uncond = self._unconditional(cond)
        both = stacked([uncond, cond])

        def joint(x_t: Latents, t: float) -> Latents:
            u_uncond, u_cond = self._predict(torch.cat([x_t, x_t]), t, both, guidance).chunk(2)
            return u_uncond + guidance * (u_cond - u_uncond)

        def detached(x_t: Latents, t: float) -> Latents:
            with torch.no_grad():
                u_uncond = self._predict(x_t, t, uncond, guidance)
            return u_uncond + guidance * (self._predict(x_t, t, cond, guidance) - u_uncond)

        return detached if detach_unconditional else joint

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, denoisers are those of the model as it was loaded: its adapter is off, or its kept copy is used.

        Raises:
            ConfigError: if the whole network is trained and no copy was kept.
        """
        if self.lora is not None:
            self.network.disable_adapters()
            try:
                yield
            finally:
                self.network.enable_adapters()
            return
        if self.kept_base is None:
            raise ConfigError(
                "base model: the whole network is trained, and no copy of it was kept; load it with keep_base=True."
            )
        trained, self.network = self.network, self.kept_base
        try:
            yield
        finally:
            self.network = trained

    def _unconditional(self, cond: Conditioning) -> Conditioning:
        if self._negative_prompt is None and self.family.zero_unconditional(self.pipe):
            return cond.zeros()
        return self.encode([self._negative_prompt or ""]).expand(len(cond.text))

    def _predict(self, x_t: Latents, t: float, conditioning: Conditioning, guidance: float) -> Latents:
        """The network's output in the latents' dtype; a half-precision network sees them cast, and gives them back."""
        dtype, fp16 = x_t.dtype, self.compute_dtype == torch.float16
        half = self.compute_dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(x_t.device.type, dtype=self.compute_dtype) if half else nullcontext():
            out = self.family.predict(
                self.network,
                entering(x_t) if fp16 else x_t,
                t,
                conditioning,
                guidance=guidance,
                pixels_per_latent=self.pipe.vae_scale_factor,
            ).to(dtype)
        return leaving(out) if fp16 else out

    def decode(self, latents: Latents) -> Images:
        """fp32 images in [0, 1], differentiable.

        Raises:
            NonFiniteError: if a half-precision VAE overflows.
        """
        return decode(self.pipe.vae, latents)
