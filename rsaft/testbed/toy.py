"""A reward for `--tiny`: it needs no weights, has a gradient everywhere, and means nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.types import Images


def toy_reward(images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """A smooth reward in [-1, 1]: rows that grow brighter downwards, more so for a longer prompt."""
    ramp = torch.linspace(-1, 1, images.shape[2], dtype=images.dtype, device=images.device)
    slope = (images.mean(dim=(1, 3)) * ramp).mean(dim=1)
    length = images.new_tensor([float(len(prompt)) for prompt in prompts])
    return torch.tanh((5 + 0.01 * length) * slope)
