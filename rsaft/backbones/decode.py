"""From latents to images in [0, 1] without losing the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsaft.backbones.half import entering, leaving
from rsaft.errors import NonFiniteError
from rsaft.types import Images, Latents


class _StraightThroughClamp(torch.autograd.Function):
    """Clamped value, identity gradient: a plain clamp would cut the gradient at every saturated pixel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def to_images(decoded: Tensor) -> Images:
    """Images in [0, 1] from a decoder's [-1, 1], at least fp32 (a perturbation of 1e-2 drowns in half precision)."""
    decoded = decoded if decoded.dtype == torch.float64 else decoded.float()
    return _StraightThroughClamp.apply(decoded / 2 + 0.5)


def decode(vae: Any, latents: Latents) -> Images:
    """Images in [0, 1], fp32 at least, with the VAE's own scale and shift.

    Raises:
        NonFiniteError: if a half-precision VAE makes something non-finite of finite latents. In fp32 that is left to
            the rewards' own guard, which masks the sample.
    """
    config = vae.config
    z = latents / config.scaling_factor + (config.shift_factor or 0.0)
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (z.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        z = z * std + mean
    fp16 = vae.dtype == torch.float16
    decoded = vae.decode((entering(z) if fp16 else z).to(vae.dtype), return_dict=False)[0]
    half = decoded.dtype in (torch.float16, torch.bfloat16)
    if half and not decoded.isfinite().all() and latents.isfinite().all():
        raise NonFiniteError(
            f"vae: {type(vae).__name__} in {str(decoded.dtype).removeprefix('torch.')} decodes finite latents to "
            "values that are not finite; load the backbone with vae_dtype fp32, or a checkpoint whose VAE was made for "
            "fp16."
        )
    return to_images(leaving(decoded.float()) if fp16 else decoded)
