"""Sampling between the base model and the tuned one, after Annealed Importance Guidance (Jena et al., 2024).

    u(x_t, t) = u_base + g(t) (u_tuned - u_base),   g(t) = (1 - t / 1000)^power

Noise comes first: there the base model lays out the picture, with the diversity that tuning took; the tuned one
finishes it. Nothing is trained. The schedule g is ours: the authors' was not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rsaft.errors import ConfigError
from rsaft.types import BackboneWithBase, Denoiser, Images, Latents

_LAST = 1000.0  # timestep of pure noise, in all supported families


@dataclass(frozen=True)
class Annealed:
    """A Backbone for sampling and evaluation: `rsaft.sample(Annealed(backbone), prompts, sampling)`.

    Cost: two denoiser calls for one.
    """

    backbone: BackboneWithBase
    power: float = 1.0  # 0 is the tuned model at once; the larger, the longer the base model leads

    def __post_init__(self) -> None:
        if self.power < 0:
            raise ConfigError(f"power: of a share between 0 and 1, so power >= 0; got {self.power}.")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.backbone.latent_shape

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def parameters(self) -> list[torch.nn.Parameter]:
        return self.backbone.parameters()

    def schedule(self, num_steps: int) -> Any:
        return self.backbone.schedule(num_steps)

    def decode(self, latents: Latents) -> Images:
        return self.backbone.decode(latents)

    def denoiser(self, prompts: Sequence[str], *, guidance: float, detach_unconditional: bool) -> Denoiser:
        denoise = self.backbone.denoiser(prompts, guidance=guidance, detach_unconditional=detach_unconditional)

        def mixed(x_t: Latents, t: float) -> Latents:
            with self.backbone.base():
                base = denoise(x_t, t)
            share = max(1 - t / _LAST, 0.0) ** self.power
            return base + share * (denoise(x_t, t) - base)

        return mixed
