"""What differs between families of text-to-image models: a few names and plain functions, as one value a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.schedules import Schedule
from rsaft.types import Latents


@dataclass(frozen=True)
class Conditioning:
    """What the text encoders say of b prompts."""

    text: Float[Tensor, "b tokens d"]
    pooled: Float[Tensor, "b d_pooled"] | None = None  # None: the family has no pooled embedding

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """The same on a device, in a dtype."""
        return Conditioning(self.text.to(device, dtype), None if self.pooled is None else self.pooled.to(device, dtype))

    def expand(self, b: int) -> Conditioning:
        """One prompt's conditioning for b samples; nothing is copied."""
        return Conditioning(self.text.expand(b, -1, -1), None if self.pooled is None else self.pooled.expand(b, -1))

    def zeros(self) -> Conditioning:
        """Zeros of the same shapes."""
        return Conditioning(torch.zeros_like(self.text), None if self.pooled is None else torch.zeros_like(self.pooled))

    def row(self, i: int) -> Conditioning:
        """Prompt i alone."""
        return Conditioning(self.text[i : i + 1], None if self.pooled is None else self.pooled[i : i + 1])


def stacked(parts: Sequence[Conditioning]) -> Conditioning:
    """Several conditionings below each other."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(torch.cat([part.text for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class Family:
    """One family of pipelines. The functions take diffusers objects and hold no state.

    encode(pipe, prompts, max_sequence_length): conditioning of the prompts, without gradient.
    predict(network, x_t, t, conditioning, guidance=, pixels_per_latent=): the network's output as latents.
    schedule(pipe, num_steps, latent_shape): alpha and sigma on the checkpoint's own grid.
    latent_shape(pipe, resolution): (channels, height, width) for (height, width) in pixels; None: the checkpoint's own.
    """

    name: Literal["sd", "sdxl", "sd3", "flux"]
    pipeline: str  # diffusers' class name
    network: Literal["unet", "transformer"]  # the pipeline's attribute that is trained
    text_encoders: tuple[str, ...]  # attributes of the pipeline
    tokenizers: tuple[str, ...]  # attributes of the pipeline
    lora_targets: tuple[str, ...]  # ends of the names of the layers that an adapter goes on by default
    encode: Callable[[Any, Sequence[str], int | None], Conditioning]
    predict: Callable[..., Latents]
    schedule: Callable[[Any, int, tuple[int, int, int]], Schedule]
    latent_shape: Callable[[Any, tuple[int, int] | None], tuple[int, int, int]]
    classifier_free: bool = True  # False: guidance is an input of the network, and there is no unconditional branch
    zero_unconditional: Callable[[Any], bool] = lambda pipe: False  # without a negative prompt: zeros, or the text ""
    vae_overflows: bool = False  # in fp16, unless the VAE's config says force_upcast: false
    optional: tuple[str, ...] = ()  # parts of the pipeline that a checkpoint may lack
    load_args: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline's from_pretrained


def latent_size(pipe: Any, resolution: tuple[int, int], *, patch: int = 1) -> tuple[int, int]:
    """(height, width) of latents for a resolution in pixels.

    Raises:
        ConfigError: if the pixels do not divide into the autoencoder's cells and the network's patches.
    """
    multiple = pipe.vae_scale_factor * patch
    if any(pixels < multiple or pixels % multiple for pixels in resolution):
        raise ConfigError(
            f"resolution: height and width in pixels are multiples of {multiple} for this model; got {resolution}."
        )
    return resolution[0] // pipe.vae_scale_factor, resolution[1] // pipe.vae_scale_factor


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a config's size, which is one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def timesteps(t: float, x_t: Latents) -> Float[Tensor, " b"]:
    """The timestep for each sample, as a tensor: a compiled network is not compiled again for each value."""
    return torch.full((len(x_t),), t, device=x_t.device, dtype=x_t.dtype)
