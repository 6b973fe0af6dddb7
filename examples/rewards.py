"""A reward of one's own: any callable (images, prompts) -> (B,) that is differentiable and maximises.

Named in a run file by `type: examples.rewards:Colourfulness`, when rsaft is started in the folder above `examples`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Colourfulness:
    """Colourfulness of Hasler and Suesstrunk (2003) on images in [0, 1]. It knows nothing of prompts, and is hacked."""

    mean_weight: float = 0.3  # of the mean's distance from grey, beside the spread around it

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        red, green, blue = images.float().flatten(2).unbind(dim=1)
        axes = torch.stack([red - green, (red + green) / 2 - blue], dim=1)  # (B, 2, h * w)
        spread = axes.var(dim=2).sum(dim=1).add(1e-12).sqrt()
        return spread + self.mean_weight * axes.mean(dim=2).pow(2).sum(dim=1).add(1e-12).sqrt()
