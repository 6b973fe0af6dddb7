"""What every reward model shares: it is only read. Always in eval mode, no gradient to its weights, checked inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rsaft.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Frozen(nn.Module):
    """Parent of the networks that are only read: `.train()` leaves them in eval mode.

    Rewards hold dropout, and a trainer's `model.train()` that reached it would add noise to every score.
    """

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode, whatever `mode` says."""
        return super().train(False)

    def freeze(self) -> Frozen:
        """Take every parameter out of autograd and enter eval mode; the constructor's last line."""
        return self.requires_grad_(False).eval()


def network_dtype(dtype: Precision | torch.dtype, reward: str) -> torch.dtype:
    """The torch dtype of a network.

    Raises:
        ConfigError: if it is none of `DTYPES`.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ConfigError(f"{reward}: dtype is one of {', '.join(DTYPES)}; got {dtype!r}.")
    return found


def network_device(device: str | torch.device | None) -> torch.device:
    """The given device; by default this process's GPU if there is one, else the CPU."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or in float64 if it is that: norms, dot products and heads of rewards are computed so."""
    return x if x.dtype == torch.float64 else x.float()


def check_inputs(images: Tensor, prompts: Sequence[str], reward: str) -> None:
    """Refuse what would give a score of something else.

    Raises:
        ValueError: unless `images` is (b, 3, h, w) in floating point and there is one prompt for each.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"{reward}: images are a float tensor (b, 3, h, w) with values in [0, 1]; got {images.dtype} of shape "
            f"{tuple(images.shape)}."
        )
    if isinstance(prompts, str) or len(prompts) != len(images):
        found: Any = repr(prompts) if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"{reward}: one prompt for each image is needed; got {len(images)} images and {found}.")
