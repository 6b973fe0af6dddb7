"""The pretraining term of ReFL: keep denoising real images while a reward is maximised (Xu et al., 2023).

L_pre = E || target - network(alpha_t x_0 + sigma_t eps, t, prompt) ||^2,  target = eps, v or the flow's velocity
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.randomness import integer, key_of, normal
from rsaft.schedules import Schedule
from rsaft.types import Backbone, Batch, Denoiser, Latents


@dataclass(frozen=True)
class Pretraining:
    """Where the pairs of latents and prompts are, and the weight of the term. `save_pairs` writes such a file.

    Cost: one denoiser call with gradient for each sample, without guidance.
    """

    path: str  # .safetensors file of pairs; it counts from the working directory
    weight: float = 1.0  # lambda of L_reward + lambda L_pre

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(f"pretrain.weight multiplies a loss, so weight > 0; got {self.weight}; or drop pretrain.")


@dataclass(frozen=True)
class DenoisingTerm:
    """The term for one batch: sample i has its own pair and noise, and all of an update share the timestep."""

    weight: float
    denoise: Denoiser
    schedule: Schedule
    i: int  # step whose noise level is used
    x_0: Latents
    eps: Latents

    def __call__(self) -> Float[Tensor, " b"]:
        """weight * mean squared error of each sample's prediction, with a graph."""
        x_t = self.schedule.add_noise(self.x_0, self.eps, self.i)
        error = self.denoise(x_t, self.schedule.timesteps[self.i]) - self.schedule.prediction_of(
            self.x_0, self.eps, self.i
        )
        return self.weight * error.square().flatten(1).mean(dim=1)


def denoising_term(settings: Pretraining, backbone: Backbone, batch: Batch, schedule: Schedule) -> DenoisingTerm:
    """Draw pairs, noise and timestep: pair and noise by (seed, step, sample id), the timestep by (seed, step).

    Raises:
        ConfigError: if there is no such file, or its latents are not the backbone's.
    """
    x_0, prompts = _read_pairs(Path(settings.path), batch, backbone.latent_shape)
    eps = normal(
        backbone.latent_shape,
        seed=batch.seed,
        purpose="pretrain-noise",
        step=batch.step,
        sample_ids=batch.sample_ids,
        device=backbone.device,
        dtype=backbone.dtype,
    )
    return DenoisingTerm(
        settings.weight,
        backbone.denoiser(prompts, guidance=1.0, detach_unconditional=False),
        schedule,
        integer(0, schedule.num_steps, seed=batch.seed, purpose="pretrain-step", step=batch.step),
        x_0.to(backbone.device, backbone.dtype),
        eps,
    )


def save_pairs(path: str | os.PathLike[str], latents: Latents, prompts: Sequence[str]) -> None:
    """Write the pairs that `Pretraining` reads.

    Args:
        path: of the file, which ends in .safetensors.
        latents: n images as the denoiser sees them: encoded by the VAE, shifted and scaled.
        prompts: their n prompts.
    """
    if len(latents) != len(prompts) or not len(prompts):
        raise ValueError(
            f"a pair has one latent and one prompt; got {len(latents)} latents and {len(prompts)} prompts."
        )
    save_file({"latents": latents.detach().cpu().contiguous()}, path, metadata={"prompts": json.dumps(list(prompts))})


def _read_pairs(path: Path, batch: Batch, latent_shape: tuple[int, int, int]) -> tuple[Latents, list[str]]:
    """One pair for each sample of the batch; only their rows are read."""
    try:
        with safe_open(path, framework="pt") as file:
            prompts = json.loads((file.metadata() or {})["prompts"])
            latents = file.get_slice("latents")
            shape = tuple(latents.get_shape())
            if shape != (len(prompts), *latent_shape):
                raise ConfigError(
                    f"pretrain.path: '{path}' holds latents {shape} for {len(prompts)} prompts, and the model's have "
                    f"shape {tuple(latent_shape)}; encode the images with this model's VAE."
                )
            rows = [key_of(batch.seed, "pretrain-pair", batch.step, i) % len(prompts) for i in batch.sample_ids]
            return torch.cat([latents[row : row + 1] for row in rows]), [prompts[row] for row in rows]
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(
            f"pretrain.path: '{path}' is no file of pairs ({error}); write one with rsaft.rdrl.pretraining.save_pairs."
        ) from error
